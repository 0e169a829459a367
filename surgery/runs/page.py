"""One page of a run, as Markdown and as HTML: what was done, what it cost, on which texts, with pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evals import plots
from evals.kinds import over_unseen, unseen_by_all
from evals.report import JSON
from surgery.publishing.card import COMPARED_PLOT
from surgery.runs.recipe import RunRecipe
from surgery.runs.stages import Stage
from surgery.runtime.files import write_bytes, write_text
from surgery.runtime.public import in_markdown, public
from surgery.saving.evaluation import interval
from surgery.saving.report import read_report

MARKDOWN, HTML, PICTURE = "run.md", "run.html", "run.png"


@dataclass(frozen=True)
class TwinResult:
    """One twin of a run: its name in the tables, its folder, its report, and its evaluation where there is one."""

    label: str
    folder: Path
    report: dict[str, Any]
    evaluation: dict[str, Any] | None

    @property
    def kinds(self) -> dict[str, Any] | None:
        """The comparison on kinds of text."""
        return (self.evaluation or {}).get("kinds")

    @property
    def bytes(self) -> int:
        """Of its weights."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))


@dataclass(frozen=True)
class Section:
    """A heading, with text, a table and a picture below it, each as far as there is one."""

    title: str
    text: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    picture: tuple[str, Path] | None = None
    code: str = ""


def twins_of(stages: Sequence[Stage]) -> list[TwinResult]:
    """What the stages have made, by degree; the refined twin after the one it was made from."""
    found = []
    for stage in (stage for stage in stages if stage.kind in ("convert", "refine")):
        file = stage.twin / "evaluation" / JSON
        measured = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        found.append(TwinResult(stage.label, stage.twin, read_report(stage.twin), measured))
    return sorted(found, key=lambda twin: (twin.report["recipe"]["degree"], len(twin.label)))


def draw_picture(plan: RunRecipe, stages: Sequence[Stage]) -> Path | None:
    """Writes run.png, and a copy where the card of the final twin shows it; None where no kinds were measured."""
    compared = [(twin.label, twin.kinds) for twin in twins_of(stages) if twin.kinds]
    if not compared:
        return None
    draw = plots.twins(compared) if len(compared) > 1 else plots.kinds(compared[0][1])
    picture = plots.png(*draw)
    write_bytes(plan.output / PICTURE, picture)
    write_bytes(plan.final / COMPARED_PLOT, picture)
    return plan.output / PICTURE


def write_pages(
    plan: RunRecipe, stages: Sequence[Stage], record: Mapping[str, Any], twins: list[TwinResult]
) -> tuple[Path, ...]:
    """Writes run.png (where kinds of text were measured), run.md and run.html; their paths."""
    picture = draw_picture(plan, stages)
    title = f"{public(plan.model)} and its polynomial twin"
    sections = _sections(plan, stages, record, twins, picture)
    write_text(plan.output / MARKDOWN, _markdown(title, sections, plan.output))
    write_text(plan.output / HTML, _html(title, sections))
    return (*([picture] if picture else []), plan.output / MARKDOWN, plan.output / HTML)


def result_columns() -> tuple[str, ...]:
    """Of :func:`result_rows`."""
    return ("feed-forward blocks", "perplexity", "nats lost", "unseen kinds: mean", "worst", "R² of blocks", "weights")


def result_rows(twins: Sequence[TwinResult]) -> list[tuple[str, ...]]:
    """The original and every twin: what it costs."""
    first = next((_perplexity(twin) for twin in twins if _perplexity(twin)), None)
    unseen = unseen_by_all(twin.kinds for twin in twins if twin.kinds)
    rows: list[tuple[str, ...]] = [("original", f"{first[0]:.2f}" if first else "", "", "", "", "", "")]
    for twin in twins:
        seen, over = _perplexity(twin), over_unseen((twin.kinds or {}).get("kinds", []), unseen)
        measured = (twin.evaluation or {}).get("blocks")
        held = sorted(
            [row["r2"] for row in measured] if measured else [row["r2_held"] for row in twin.report["blocks"]]
        )
        rows.append(
            (
                twin.label,
                f"{seen[1]:.2f}" if seen else "",
                f"{seen[2]:+.3f}" if seen else "",
                interval(over["mean"]) if over else "",
                f"{over['worst']['value']:+.3f} ({over['worst']['kind']})" if over else "",
                f"{held[len(held) // 2]:.3f} (least {held[0]:.3f})"
                if measured or "refinement" not in twin.report
                else "",
                f"{twin.bytes / 1e6:,.0f} MB",
            )
        )
    return rows


def _perplexity(twin: TwinResult) -> tuple[float, float, float] | None:
    """The original's, the twin's, and nats lost: of the evaluation, else of the conversion."""
    if text := (twin.evaluation or {}).get("text"):
        return text["perplexity"]["original"], text["perplexity"]["twin"], text["nats_lost"]["value"]
    seen = twin.report["perplexity"]
    if seen and "refinement" not in twin.report:
        return seen["original"], seen["twin"], seen["nats"]
    return None


def _sections(
    plan: RunRecipe, stages: Sequence[Stage], record: Mapping[str, Any], twins: list[TwinResult], picture: Path | None
) -> list[Section]:
    final = next(twin for twin in twins if twin.folder == plan.final)
    found = [
        Section(
            "What it cost",
            (
                f"In {plan.final.name}/ the feed-forward blocks of {public(plan.model)} are polynomials "
                f"({final.report['form']} form).", *_measured_on(final),
            ),
            result_columns(),
            tuple(result_rows(twins)),
            ("Nats lost per token on each kind of text", picture) if picture else None,
        )
    ]  # fmt: skip
    if kinds := final.kinds:
        found.append(_kinds_section(twins, kinds))
    if (final.evaluation or {}).get("blocks"):
        found.append(Section("Blocks", picture=("FVU of each block", plan.final / "evaluation" / "blocks.png")))
    if final.report.get("refinement") and (plan.final / "refinement.png").is_file():
        found.append(Section("Refinement", picture=("Loss during training", plan.final / "refinement.png")))
    rows = []
    for stage in stages:
        kept = record["stages"].get(stage.name, {})
        result = kept.get("address") or "; ".join(f"missing: {item}" for item in kept.get("missing", ()))
        rows.append((stage.kind, stage.label, f"{kept.get('seconds', 0):,.0f} s", kept.get("finished", ""), result))
    texts = [
        f"{twin.label}: calibrated on {_calibrated(twin.report)}" for twin in twins if "refinement" not in twin.report
    ]
    texts += [f"{twin.label}: trained on {_trained(twin.report)}" for twin in twins if "refinement" in twin.report]
    found.append(Section("What was done", tuple(texts), ("stage", "twin", "time", "finished", "result"), tuple(rows)))
    left = tuple(f"Left as it was: {item['path']} ({item['reason']})" for item in final.report["left_alone"])
    if left:
        found.append(Section("Not converted", left))
    return [*found, Section("Next", code=next_commands(plan)), Section("The recipe", code=_recipe(plan))]


def _measured_on(final: TwinResult) -> list[str]:
    if text := (final.evaluation or {}).get("text"):
        return [f"Perplexity and nats: {text['tokens']:,} tokens of {text['source']} that the twin has not seen."]
    seen = final.report["perplexity"]
    return [f"Perplexity and nats: {seen['text']}."] if seen else []


def _kinds_section(twins: list[TwinResult], kinds: Mapping[str, Any]) -> Section:
    there = [(twin.label, twin.kinds["kinds"]) for twin in twins if twin.kinds]
    rows = []
    for row in kinds["kinds"]:
        cells = []
        for _, measured in there:
            other = next(one for one in measured if one["kind"] == row["kind"])
            cells.append(interval(other["nats_lost"]) + ("" if other["seen"] == "no" else " (seen)"))
        rows.append(
            (row["kind"], row["source"], f"{row['tokens']:,}", f"{row['nats']['original']['value']:.3f}", *cells)
        )
    columns = ("kind", "text", "tokens", "original, nats", *(label for label, _ in there))
    note = "Nats lost per token, 95 % intervals; (seen): the twin has read another part of the text, or of its kind."
    return Section("Kinds of text", (note,), columns, tuple(rows))


def _calibrated(report: Mapping[str, Any]) -> str:
    found = report["calibration"]
    return f"{found['tokens']:,} tokens of {found['source']}" + (f" ({found['note']})" if found.get("note") else "")


def _trained(report: Mapping[str, Any]) -> str:
    found = report["refinement"]
    return f"{found['tokens_seen']:,} tokens of {', '.join(found['settings']['text'])}"


def next_commands(plan: RunRecipe) -> str:
    """What to type after a run."""
    lines = [f"surgery explain {plan.final} --block 0   # read a block"]
    if plan.refine is None and not (plan.output / "refined").exists():
        lines.append(f"surgery refine {plan.final} --original {plan.model} -o {plan.output / 'refined'}   # train it")
    if plan.push is None:
        lines.append(f"surgery push {plan.final} USER/NAME --dry-run   # what publishing would upload")
    return "\n".join(lines)


def _recipe(plan: RunRecipe) -> str:
    stages = {name: getattr(plan, name) for name in ("refine", "eval", "card", "push")}
    first = plan.conversions[0]
    chosen = first.model_dump(exclude_defaults=True, exclude={"model", "revision", "output", "device"})
    degrees = [one.degree for one in plan.conversions]
    chosen["degree"] = degrees if len(degrees) > 1 else degrees[0]
    about = {"model": plan.model, "revision": plan.revision, "convert": chosen}
    said = {name: value for name, value in (about | stages).items() if value is not None}
    return str(yaml.safe_dump(public(said), sort_keys=False, allow_unicode=True)).strip()


def _markdown(title: str, sections: Sequence[Section], folder: Path) -> str:
    lines = [f"# {in_markdown(title)}"]
    for section in sections:
        lines += ["", f"## {section.title}"]
        for text in section.text:
            lines += ["", in_markdown(text)]
        if section.picture:
            caption, file = section.picture
            lines += ["", f"![{caption}]({file.relative_to(folder)})"]
        if section.rows:
            table = (section.columns, ("---",) * len(section.columns), *section.rows)
            lines += ["", *("| " + " | ".join(in_markdown(cell) for cell in row) + " |" for row in table)]
        if section.code:
            lines += ["", "```", section.code, "```"]
    return "\n".join(lines) + "\n"


def _html(title: str, sections: Sequence[Section]) -> str:
    import jinja2

    template = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    shown = [
        (section, base64.b64encode(section.picture[1].read_bytes()).decode() if section.picture else "")
        for section in sections
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(title=title, sections=shown)
