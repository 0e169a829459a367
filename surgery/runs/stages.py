"""The stages of a run, and which of them have to be done.

What a result depends on is one key: the options, the fingerprints of model and texts, the version of this package, and
the keys of the stages before. A result is kept while its key is the one it was made with and its files are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals.memo import model_fingerprint
from evals.report import JSON
from evals.settings import CHAT, LINES, evaluation_settings
from surgery.calibration.mixtures import Mixture
from surgery.errors import CheckpointError, RecipeError
from surgery.runs.recipe import RunRecipe
from surgery.runtime.files import sha256, write_json
from surgery.runtime.public import public
from surgery.saving.folder import REPORT
from surgery.saving.report import read_verified_report
from surgery.version import __version__

RECORD = "run.json"
FORMAT = 1
ELSEWHERE = {"output", "device", "original", "twin", "unseen_by"}
"""Settings that change no result, or are in the key by content."""


@dataclass(frozen=True)
class Stage:
    """One stage: what it does, for which twin, and what its result depends on."""

    kind: str
    twin: Path
    label: str
    key: str

    @property
    def name(self) -> str:
        """As the record has it."""
        return f"{self.kind} {self.twin.name}"


def stages_of(recipe: RunRecipe) -> list[Stage]:
    """In the order in which they run."""
    model = model_fingerprint(recipe.model, recipe.revision)
    made: dict[Path, str] = {}
    found: list[Stage] = []
    labels: dict[Path, str] = {}

    def add(kind: str, twin: Path, depends: Any) -> str:
        text = json.dumps([kind, depends, __version__], sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        found.append(Stage(kind, twin, labels[twin], key))
        return key

    for plan in recipe.conversions:
        twin = Path(str(plan.output))
        labels[twin] = f"degree {plan.degree}" if plan.budget is None else f"within {plan.budget:g} nats"
        depends = [model, _settings(plan.model_dump()), _texts(Mixture.of(plan.text))]
        if plan.moments:
            depends.append(_content(plan.moments))
        made[twin] = add("convert", twin, depends)
    if recipe.refine is not None:
        settings = recipe.refinement()
        labels[recipe.final] = f"{labels[recipe.twin]}, refined"
        depends = [made[recipe.twin], _settings(asdict(settings)), _texts(Mixture.of(settings.text))]
        made[recipe.final] = add("refine", recipe.final, depends)
    if recipe.eval is not None:
        for twin, maker in list(made.items()):
            settings_of = evaluation_settings(twin, **({"skip": 0} | recipe.evaluation(twin)))
            sources = [settings_of.text, *(source for _, source in settings_of.kind)]
            contents = [_content(text) for text in sources]
            add("eval", twin, [maker, sorted(made.values()), model, _settings(asdict(settings_of)), contents])
    said = [stage.key for stage in found]
    if recipe.card is not None or recipe.push is not None:
        said.append(add("card", recipe.final, [said, recipe.card]))
    if recipe.push is not None:
        add("push", recipe.final, [said, recipe.push])
    return found


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in ELSEWHERE}


def _texts(mixture: Mixture) -> list[Any]:
    return [[_content(part.source), part.share] for part in mixture.parts]


def _content(source: str) -> str:
    """A file by what is in it, anything else by its name."""
    name = source.removeprefix(CHAT).removeprefix(LINES)
    file = Path(name).expanduser()
    return f"{source.removesuffix(name)}{sha256(file)}" if file.is_file() else source


def read_record(folder: Path) -> dict[str, Any]:
    """`run.json`, or an empty record. Raises CheckpointError where it cannot be read."""
    file = folder / RECORD
    if not file.is_file():
        return {"format": FORMAT, "stages": {}, "begun": {}}
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(found["stages"], dict) and isinstance(found.setdefault("begun", {}), dict)
    except (OSError, ValueError, KeyError, AssertionError, TypeError) as error:
        raise CheckpointError(
            f"{RECORD} cannot be read", where=str(folder), fix="delete it to do every stage again"
        ) from error
    return found


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Under a temporary name first; it names no place on this machine."""
    write_json(folder / RECORD, public(dict(record)))


def reason_to_do(stage: Stage, record: Mapping[str, Any]) -> str:
    """Why the stage has to be done: "not done yet", or what has changed. Empty where it is done."""
    kept = record["stages"].get(stage.name)
    if stage.kind in ("convert", "refine") and not (stage.twin / REPORT).is_file():
        return "not done yet"
    if kept is None:
        if stage.kind in ("convert", "refine"):
            raise RecipeError(
                "the folder holds a twin that this run did not make",
                where=str(stage.twin),
                fix="give another output, or delete the folder",
            )
        return "not done yet"
    if stage.kind in ("convert", "refine"):
        weights = read_verified_report(stage.twin)["verification"]["weights"]
        if weights != kept.get("weights") or not all((stage.twin / name).is_file() for name in weights):
            return "the twin is not the one this run made"
    if stage.kind == "eval" and not (stage.twin / "evaluation" / JSON).is_file():
        return "not done yet"
    if stage.kind == "card" and not (stage.twin / "README.md").is_file():
        return "not done yet"
    return "" if kept["key"] == stage.key else "settings, model or texts have changed"
