"""An explanation as people and programs read it: explanation.json, spectrum.png and one self-contained HTML page."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from surgery.reading.feature_lines import feature_lines, writer_line
from surgery.reading.feature_plot import feature_plot
from surgery.reading.picture import NEGATIVE, POSITIVE, as_png, label, new_figure
from surgery.reading.upstream_plot import readers, upstream_plot
from surgery.runtime.files import not_written, write_bytes

JSON, PAGE, PLOT = "explanation.json", "explanation.html", "spectrum.png"
FEATURES, UPSTREAM = "features.png", "upstream.png"


def files_of(report: dict[str, Any]) -> list[str]:
    """Names of what :func:`write_explanation` writes."""
    plots = [PLOT] if "eigenpairs" in report else []
    plots += [FEATURES] if "curve" in report.get("features", {}) else []
    return [JSON, PAGE, *plots, *([UPSTREAM] if readers(report) else [])]


def write_explanation(report: dict[str, Any], folder: Path) -> None:
    """Writes :func:`files_of`, each under a temporary name first.

    Raises:
        SurgeryError: the folder cannot be written, or matplotlib is missing.
    """
    names = files_of(report)
    files: dict[str, bytes] = {JSON: (json.dumps(report, indent=2, allow_nan=False) + "\n").encode()}
    if PLOT in names:
        files[PLOT] = spectrum_plot(report)
    if FEATURES in names:
        files[FEATURES] = feature_plot(report["features"])
    if UPSTREAM in names:
        files[UPSTREAM] = upstream_plot(report)
    files[PAGE] = page(report, {name: files[name] for name in (PLOT, FEATURES, UPSTREAM) if name in files}).encode()
    try:
        for name, content in files.items():
            write_bytes(folder / name, content)
    except OSError as error:
        raise not_written(error, "the explanation cannot be written", folder) from error


def spectrum_plot(report: dict[str, Any]) -> bytes:
    """The leading eigenvalues as bars, PNG."""
    pairs = report["eigenpairs"]
    figure = new_figure(8, 2.6)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    values = [pair["value"] for pair in pairs]
    axes.bar(range(len(pairs)), values, color=[POSITIVE if value > 0 else NEGATIVE for value in values])
    for place, pair in enumerate(pairs):
        axes.annotate(
            f"{pair['share']:.1%}", (place, pair["value"]), ha="center", va="bottom" if pair["value"] > 0 else "top"
        )
    axes.axhline(0, color="#222222", linewidth=0.8)
    axes.margins(y=0.2)
    axes.set_xticks(range(len(pairs)))
    axes.set(xlabel="eigenpair", ylabel="λ")
    return as_png(figure, 120)


def page(report: dict[str, Any], plots: dict[str, bytes]) -> str:
    """explanation.html: no scripts, nothing loaded from elsewhere; plots by their names."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["ink"] = _ink
    environment.filters["shown"] = _shown
    environment.filters["named"] = label
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        title=title(report),
        plots={name.partition(".")[0]: base64.b64encode(plot).decode() for name, plot in plots.items()},
        details=json.dumps(
            {key: report[key] for key in ("settings", "model", "block", "text", "spectrum") if key in report}, indent=2
        ),
    )


def title(report: dict[str, Any]) -> str:
    """`MODEL, block 12 → token: Paris`."""
    name = Path(report["model"]["name"]).name
    what = report["direction"]["name"] if "direction" in report else "its own output directions"
    return f"{name}, block {report['block']['index']} → {what}"


def lines(report: dict[str, Any]) -> list[str]:
    """The explanation for a terminal."""
    out = [title(report)]
    if "own" in report:
        for kind in ("linear", "quadratic"):
            out += [
                "",
                f"own directions of the {kind} part (share of its squared norm; tokens promoted and suppressed)",
            ]
            for row in report["own"][kind]:
                out.append(f"  {row['name']:13} {row['share']:6.1%}  {_words(row['promotes'])}")
        return out + (feature_lines(report["features"]) if "features" in report else [])
    parts = report["parts"]
    out.append(
        f"variance over the text: linear {parts['linear']:.1%}, quadratic {parts['quadratic']:.1%}, higher "
        f"{parts['higher']:.1%}; effective rank of the quadratic part {report['spectrum']['effective_rank']:.1f}"
    )
    out.append(f"linear part reads   {_words(report['linear']['embedding'])}")
    for number, pair in enumerate(report["eigenpairs"]):
        out.append(f"\n{number}  λ = {pair['value']:+.4g} ({pair['share']:.1%} of the spectrum)")
        out.append(f"   embeddings   {_words(pair['embedding'])}")
        out.append(f"   unembeddings {_words(pair['unembedding'])}")
        if "upstream" in pair:
            out.append(f"   written into by {writer_line(pair['upstream'])}")
        for sign, end in (("+", "positive"), ("−", "negative")):
            for example in pair["contexts"][end][:2]:
                at = example["peak"]
                text = "".join(example["tokens"][:at]) + "⟦" + example["tokens"][at] + "⟧"
                out.append(f"   {sign} {example['value']:6.2f}  …{text[-90:]!r}")
    return out + (feature_lines(report["features"]) if "features" in report else [])


def _words(ends: dict[str, list[dict[str, Any]]] | None) -> str:
    if ends is None:
        return "(no tokens)"
    return " | ".join(" ".join(repr(row["token"]) for row in ends[end][:6]) for end in ("positive", "negative"))


def _ink(value: float, largest: float) -> str:
    """Background of a token: blue for positive, red for negative, stronger for larger."""
    strength = min(1.0, abs(value) / largest) if largest > 0 else 0.0
    colour = "31,111,235" if value > 0 else "209,36,47"
    return f"rgba({colour},{0.75 * strength:.2f})"


def _shown(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "⇥")
