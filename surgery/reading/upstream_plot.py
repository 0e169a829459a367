"""Who writes into what is read, as a picture: an earlier block's features, what a later one reads, what it writes."""

from __future__ import annotations

from typing import Any

from surgery.reading.picture import NEGATIVE, POSITIVE, as_png, label, name_of, new_figure

EIGENVECTORS, FEATURES, WRITERS = 3, 5, 3  # how many of each are drawn, the writers of each reader
COLUMNS = (0.0, 1.0, 2.0)


def readers(report: dict[str, Any]) -> list[tuple[str, float, list[dict[str, Any]]]]:
    """What the later block reads: (name, sign of what it writes, who writes into it)."""
    found = []
    for number, pair in enumerate(report.get("eigenpairs", [])[:EIGENVECTORS]):
        if pair.get("upstream"):
            found.append((f"eigenvector {number}", pair["value"], pair["upstream"]))
    features = report.get("features", {})
    strength = {term["features"][0]: term["strength"] for term in features.get("alone", [])}
    for name, one in list(features.get("described", {}).items())[:FEATURES]:
        if one.get("upstream"):
            found.append((label(features["described"], int(name)), strength.get(int(name), 0.0), one["upstream"]))
    return found


def upstream_plot(report: dict[str, Any]) -> bytes:
    """The direct paths of an explanation with `upstream`, PNG.

    Raises SurgeryError where matplotlib is missing.
    """
    read = readers(report)
    writers = {row["feature"]: row for _, _, rows in read for row in rows[:WRITERS]}
    heights = [_spread(len(writers)), _spread(len(read)), [0.5]]
    place = dict(zip(writers, heights[0], strict=True))
    figure = new_figure(11, 1.2 + 0.34 * max(len(writers), len(read)))
    axes = figure.subplots()
    largest = max((abs(row["moves"]) for _, _, rows in read for row in rows[:WRITERS]), default=1.0) or 1.0
    for (name, sign, rows), height in zip(read, heights[1], strict=True):
        for row in rows[:WRITERS]:
            colour = POSITIVE if row["moves"] > 0 else NEGATIVE
            ends = ([COLUMNS[0], COLUMNS[1]], [place[row["feature"]], height])
            axes.plot(*ends, color=colour, linewidth=0.5 + 3.5 * abs(row["moves"]) / largest, alpha=0.75)
        colour = "#999999" if sign == 0 else POSITIVE if sign > 0 else NEGATIVE
        axes.plot([COLUMNS[1], COLUMNS[2]], [height, 0.5], color=colour, linewidth=1, alpha=0.6)
        axes.text(COLUMNS[1], height + 0.02, name.replace("$", r"\$"), ha="center", fontsize=7)
    for number, row in writers.items():
        words = name_of(number, row["contexts"])
        axes.text(COLUMNS[0] - 0.03, place[number], words.replace("$", r"\$"), ha="right", va="center", fontsize=7)
    axes.text(COLUMNS[2] + 0.03, 0.5, report["direction"]["name"].replace("$", r"\$"), va="center", fontsize=8)
    for column, points in zip(COLUMNS, heights, strict=True):
        axes.scatter([column] * len(points), points, s=18, color="#444444", zorder=3)
    block = report["settings"]["upstream"].partition("=")[0]
    titles = (f"features of block {block}", f"read by block {report['block']['index']}", "written")
    for column, title in zip(COLUMNS, titles, strict=True):
        axes.text(column, 1.08, title, ha="center", fontsize=9, color="#555555")
    axes.set(xlim=(-0.8, 2.6), ylim=(-0.08, 1.15))
    axes.set_axis_off()
    return as_png(figure)


def _spread(count: int) -> list[float]:
    """Heights from 1 down to 0."""
    return [1 - (place + 0.5) / count for place in range(count)]
