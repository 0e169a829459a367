"""Terms of features as a picture: a graph of which features meet, a heat map, and how well few terms tell the whole."""

from __future__ import annotations

import math
from typing import Any

from surgery.reading.picture import NEGATIVE, POSITIVE, as_png, label, new_figure

GRAPHED = 10  # pairs in the graph, and half as many single features


def feature_plot(found: dict[str, Any]) -> bytes:
    """The terms of one direction (`explanation.json`'s `features`), PNG.

    Raises SurgeryError where matplotlib is missing.
    """
    figure = new_figure(13, 4.6)
    graph, heat, line = figure.subplots(1, 3, width_ratios=(1.25, 1, 0.9))
    _graph(graph, found)
    _heat(figure, heat, found["map"])
    _curve(line, found)
    return as_png(figure)


def _graph(axes: Any, found: dict[str, Any]) -> None:
    """Features on a circle; a line for each pair, a ring for what a feature writes alone: blue up, red down."""
    terms = found["together"][:GRAPHED] + found["alone"][: GRAPHED // 2]
    numbers = list(dict.fromkeys(number for term in terms for number in term["features"]))
    angles = {number: math.tau * place / max(len(numbers), 1) for place, number in enumerate(numbers)}
    largest = max((abs(term["strength"]) for term in terms), default=1.0) or 1.0
    for term in terms:
        colour = POSITIVE if term["strength"] > 0 else NEGATIVE
        width = 0.6 + 4.4 * abs(term["strength"]) / largest
        ends = [(math.cos(angles[number]), math.sin(angles[number])) for number in term["features"]]
        if len(ends) == 2:
            axes.plot(*zip(*ends, strict=True), color=colour, linewidth=width, alpha=0.75, zorder=1)
        else:
            axes.scatter(*ends[0], s=190, facecolors="none", edgecolors=colour, linewidths=width, zorder=2)
    for number, angle in angles.items():
        x, y = math.cos(angle), math.sin(angle)
        axes.scatter(x, y, s=46, color="#444444", zorder=3)
        side = "left" if x >= 0 else "right"
        words = label(found["described"], number).replace("$", r"\$")
        axes.text(1.14 * x, 1.14 * y, words[:34], ha=side, va="center", fontsize=7)
    axes.set(xlim=(-2.4, 2.4), ylim=(-1.35, 1.35), title="strongest terms")
    axes.set_axis_off()


def _heat(figure: Any, axes: Any, drawn: dict[str, Any]) -> None:
    largest = max((abs(value) for row in drawn["strength"] for value in row), default=1.0) or 1.0
    image = axes.imshow(drawn["strength"], cmap="RdBu", vmin=-largest, vmax=largest)
    places = range(len(drawn["features"]))
    axes.set_xticks(places, drawn["features"], rotation=90, fontsize=7)
    axes.set_yticks(places, drawn["features"], fontsize=7)
    axes.set_title("what two write together\n(alone on the diagonal)", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)


def _curve(axes: Any, found: dict[str, Any]) -> None:
    number = [row["terms"] for row in found["curve"]]
    for key, style in (("correlation", "-"), ("r2", "--")):
        values = [row[key] for row in found["curve"]]
        name = "R²" if key == "r2" else key
        axes.plot(number, values, style, marker="o", markersize=3, color=POSITIVE, label=name)
        axes.axhline(found["whole"][key], linestyle=style, color="#888888", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_ylim(min(0.0, *(row["r2"] for row in found["curve"]), 0.0) - 0.02, 1.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="terms kept (grey: all)", title="told on other text")
    axes.legend(frameon=False, fontsize=8)
