"""The recipe of a whole run: a YAML file with a section for each stage.

    model: HuggingFaceTB/SmolLM2-135M-Instruct    # Hub id, folder or .gguf file
    output: twins/smollm2
    convert: {degree: [2, 1, 3], tokens: 65k}      # options of `surgery convert`
    refine: {tokens: 1M}                           # options of `surgery refine`
    eval: {kind: {novel: alice.txt}}               # options of `surgery eval`
    card: {license: apache-2.0}                    # options of `surgery card`
    push: {repository: me/smollm2-polynomial}      # options of `surgery push`

A stage without a section is left out, but for the conversion. Of several degrees the first is the twin that is refined
and published; the others are converted and measured beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from evals.kinds import BUILT_IN
from evals.settings import EvalSettings, evaluation_settings
from surgery.conversion.recipe import Recipe, problems_error, problems_of
from surgery.conversion.selection import check_named
from surgery.errors import RecipeError, SurgeryError, did_you_mean, first_line
from surgery.models import loading
from surgery.publishing.hub import check_repository
from surgery.refining.run import refine_settings
from surgery.refining.settings import RefineSettings, check_settings
from surgery.runtime.vocabulary import FORMER, current
from surgery.runtime.yaml_file import parsed, read_mapping

STAGES = ("convert", "refine", "eval", "card", "push")
ABOUT = ("model", "revision", "output", "device")
OWN = {
    "convert": {"model", "revision", "output", "device"},
    "refine": {"twin", "original", "original_revision", "output", "device"},
    "eval": {"twin", "original", "original_revision", "revision", "output", "device", "task_settings", "unseen_by"},
}
"""What the run itself says, so that a section need not."""


@dataclass(frozen=True)
class RunRecipe:
    """What a run does.

    Attributes:
        output: folder for everything; a twin is in `output`/degree-N, the refined one in `output`/refined.
        conversions: one per degree, the first is the twin that is refined and published.
        refine, eval, card, push: options of the stage; None where it is left out.
    """

    name: str
    model: str
    revision: str | None
    output: Path
    device: str
    conversions: tuple[Recipe, ...]
    refine: dict[str, Any] | None
    eval: dict[str, Any] | None
    card: dict[str, Any] | None
    push: dict[str, Any] | None

    @property
    def twin(self) -> Path:
        """The converted twin."""
        return Path(str(self.conversions[0].output))

    @property
    def twins(self) -> list[Path]:
        """All that the run makes."""
        made = [Path(str(plan.output)) for plan in self.conversions]
        return [*made, self.final] if self.refine is not None else made

    @property
    def final(self) -> Path:
        """The twin that is published: the refined one, if there is one."""
        return self.output / "refined" if self.refine is not None else self.twin

    def refinement(self) -> RefineSettings:
        """The settings of the refinement."""
        return refine_settings(
            self.twin,
            self.model,
            self.final,
            **{"original_revision": self.revision, "device": self.device},
            **(self.refine or {}),
        )

    def evaluation(self, twin: Path) -> dict[str, Any]:
        """The options of `surgery eval` for one of the twins; tasks and speed are for the final one alone."""
        given = {"kind": dict(BUILT_IN)} | (self.eval or {})
        if twin != self.final:
            given |= {"tasks": (), "speed": False}
        about = {"original": self.model, "original_revision": self.revision, "device": self.device}
        return {**about, **given, "unseen_by": [str(one) for one in self.twins if one != twin]}


def load_run(path: str | Path, sets: Iterable[str] = (), output: str | Path | None = None) -> RunRecipe:
    """A recipe from a file, checked as far as no model is needed.

    Args:
        sets: changes to it, `convert.degree=3` each, as YAML.
        output: folder, instead of the recipe's.
    Raises:
        RecipeError: every problem at once, each with its line.
    """
    file = Path(path).expanduser()
    values, lines = read_mapping(file)
    flat = set(values) - set(ABOUT)
    if flat and not set(values) & set(STAGES) and flat <= set(Recipe.model_fields) | set(FORMER):
        raise RecipeError(
            "the recipe is of one conversion",
            where=str(file),
            fix=f"`surgery convert --recipe {path}`, or put its options below a line `convert:`",
        )
    changed = {_set(values, change) for change in sets}
    if output is not None:
        values["output"] = str(output)
    checker = _Checker(file, lines, changed)
    found = checker.run(values)
    if checker.problems:
        raise problems_error(checker.problems, "recipe", "run")
    assert found is not None
    return found


def _set(values: dict[str, Any], change: str) -> str:
    """Puts one change into the values; the dotted name."""
    name, equals, text = change.partition("=")
    *outer, last = name.strip().split(".")
    if not equals or not last:
        raise RecipeError(f"{change!r} is not KEY=VALUE", where="--set", fix="as in --set convert.degree=3")
    try:
        value = parsed(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{text!r} is not YAML", where=f"--set {name}", cause=first_line(error)) from error
    inside = values
    for part in outer:
        below = inside.setdefault(part, {})
        if not isinstance(below, dict):
            below = inside[part] = {}
        inside = below
    inside[last] = value
    return name.strip()


class _Checker:
    """Looks at one section after the other and gathers what is wrong."""

    def __init__(self, file: Path, lines: Mapping[str, int], changed: set[str]) -> None:
        self.file, self.lines, self.changed = file, lines, changed
        self.problems: list[str] = []

    def say(self, key: str, text: str) -> None:
        """A problem at a key: where it stands in the file, unless it was set on the command line."""
        where = "--set: " if key in self.changed else f"{self.file}:{self.lines[key]}: " if key in self.lines else ""
        self.problems.append(f"{where}{text}")

    def run(self, values: dict[str, Any]) -> RunRecipe | None:
        known = (*ABOUT, *STAGES)
        unknown = [key for key in values if key not in known]
        about = {key: values.get(key) for key in ABOUT}
        for key, value in about.items():
            if value is not None and not isinstance(value, str):
                self.say(key, f"{key}: {value!r} will not do: it should be text")
        if not about["model"]:
            self.problems.append("model: no model was named")
        if self.problems:
            return None
        for key in unknown:
            inside = next((stage for stage in STAGES if key in self.known(stage)), None)
            hint = f" (it belongs below `{inside}:`)" if inside else did_you_mean(str(key), known)
            self.say(str(key), f"{key}: unknown key{hint}")
        sections = {stage: self.section(stage, values) for stage in STAGES}
        name = self.file.stem
        output = Path(str(about["output"] or Path("runs") / name)).expanduser()
        conversions = self.conversions(sections["convert"] or {}, about, output)
        recipe = RunRecipe(
            name, str(about["model"]), about["revision"], output, about["device"] or "auto", tuple(conversions),
            *(sections[stage] for stage in STAGES[1:]),
        )  # fmt: skip
        if conversions:
            self.rest(recipe)
        return recipe

    def known(self, stage: str) -> set[str]:
        """The keys of a section."""
        if stage == "convert":
            return set(Recipe.model_fields) - OWN[stage]
        if stage == "refine":
            return {field.name for field in fields(RefineSettings)} - OWN[stage]
        if stage == "eval":
            return ({field.name for field in fields(EvalSettings)} | _named(evaluation_settings)) - OWN[stage]
        if stage == "card":
            return {"base_model", "license"}
        return {"repository", "private", "revision", "create_pr"}

    def section(self, stage: str, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """The options of a stage, or None where it is left out."""
        given = values.get(stage, False if stage != "convert" else None)
        if given is False and stage != "convert":
            return None
        if given is None or given is True:
            given = {}
        if not isinstance(given, dict):
            off = "" if stage == "convert" else ", or false to leave the stage out"
            self.say(stage, f"{stage}: {given!r} will not do: it should be a mapping of options to values{off}")
            return None
        found, known = {}, self.known(stage)
        for key, value in given.items():
            now = FORMER.get(key, key)
            if now in known:
                found[key] = value
            elif now in OWN.get(stage, ()):
                self.say(f"{stage}.{key}", f"{stage}.{key}: this belongs at the top of the recipe, or follows from it")
            else:
                self.say(f"{stage}.{key}", f"{stage}.{key}: unknown key{did_you_mean(str(key), known)}")
        return current(found)

    def conversions(self, given: dict[str, Any], about: Mapping[str, Any], output: Path) -> list[Recipe]:
        degrees = given.get("degree", Recipe.model_fields["degree"].default)
        degrees = degrees if isinstance(degrees, list) else [degrees]
        if not degrees or len(set(map(str, degrees))) < len(degrees):
            self.say(
                "convert.degree",
                f"convert.degree: {degrees!r} will not do: name at least one degree, and each only once",
            )
            return []
        top = {key: value for key, value in about.items() if value is not None}
        found = []
        for degree in degrees:
            place = output / (f"degree-{degree}" if given.get("budget") is None else f"budget-{given['budget']}")
            try:
                found.append(Recipe.model_validate({**given, **top, "degree": degree, "output": str(place)}))
            except ValidationError as error:
                for key, text in problems_of(error):
                    self.say(f"convert.{key}" if key not in ABOUT else key, f"convert.{text}")
                break
        return found

    def rest(self, recipe: RunRecipe) -> None:
        """What the other stages can say before there is a twin."""
        checks: dict[str, Callable[[], Any]] = {"convert": lambda: check_named(recipe.conversions[0])}
        if recipe.refine is not None:
            checks["refine"] = lambda: check_settings(recipe.refinement())
        if recipe.eval is not None:
            checks["eval"] = lambda: evaluation_settings(recipe.final, **recipe.evaluation(recipe.final))
        if recipe.push is not None:
            if not recipe.push.get("repository"):
                self.say("push", "push: repository is missing; as in `repository: user/name`")
            else:
                checks["push"] = lambda: check_repository(str((recipe.push or {})["repository"]))
        checks["device"] = lambda: loading.placed(recipe.device)
        for stage, check in checks.items():
            try:
                check()
            except SurgeryError as error:
                self.say(self.place(stage), f"{stage}: {error}")

    def place(self, stage: str) -> str:
        """The key that an error of a stage is shown at: what was set there on the command line, if anything was."""
        return next((key for key in sorted(self.changed) if key.startswith(f"{stage}.")), stage)


def _named(function: Callable[..., Any]) -> set[str]:
    """The keyword parameters of a function."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {name for name, one in inspect.signature(function).parameters.items() if one.kind in kinds}
