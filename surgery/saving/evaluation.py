"""An evaluation's rows as a reader looks for them: what the summary, the page and the model card share."""

from __future__ import annotations

import math
from typing import Any

from surgery.calibration.mixtures import seen_of
from surgery.calibration.texts import label


def headline_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows (measure, original, twin, difference) of what a reader looks for first."""
    rows: list[tuple[str, ...]] = []
    if text := report.get("text"):
        lost, nats, perplexity = text["nats_lost"], text["nats"], text["perplexity"]
        span = f" [{lost['low']:+.4f}, {lost['high']:+.4f}]" if lost["low"] is not None else ""
        rows += [
            ("perplexity", f"{perplexity['original']:.3f}", f"{perplexity['twin']:.3f}", ""),
            (
                "nats per token",
                *(f"{nats[name]['value']:.4f}" for name in ("original", "twin")),
                f"{lost['value']:+.4f}{span}",
            ),
        ]
        if bits := text.get("bits_per_byte"):
            change = bits["twin"] - bits["original"]
            rows.append(("bits per byte", f"{bits['original']:.4f}", f"{bits['twin']:.4f}", f"{change:+.4f}"))
        rows.append(("KL(original ‖ twin), nats", "", f"{text['divergence']['value']:.4f}", ""))
        rows.append(("same first choice", "", f"{text['top1_agreement']['value']:.1%}", ""))
    if outputs := report.get("outputs"):
        rows.append(("cosine of outputs, mean", "", f"{outputs['cosine']['mean']:.5f}", ""))
        rows.append(("relative error of outputs, mean", "", f"{outputs['relative_error']['mean']:.4f}", ""))
    if speed := report.get("speed"):
        for kind in ("prefill", "decode"):
            found = speed[f"{kind}_tokens_per_second"]
            ratio = found["twin"] / found["original"]  # of what stands beside it
            span = f"× {ratio:.2f} [{min(ratio, found['ratio_low']):.2f}, {max(ratio, found['ratio_high']):.2f}]"
            rows.append((f"{kind}, tokens per second", f"{found['original']:.1f}", f"{found['twin']:.1f}", span))
        for name, unit, scale in (
            ("flops_per_token", "MFLOPs per token", 1e6),
            ("parameters", "million parameters", 1e6),
        ):
            one, two = speed[name]["original"] / scale, speed[name]["twin"] / scale
            rows.append((unit, f"{one:.1f}", f"{two:.1f}", f"× {two / one:.3f}"))
        size = speed["weight_bytes"]
        if size["original"] and size["twin"]:
            rows.append(("weight files, MiB", *(f"{size[n] / 2**20:.1f}" for n in ("original", "twin")), ""))
    return rows


def task_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Rows (task, metric, original, twin, difference ± standard error)."""

    def value(row: dict[str, Any], name: str) -> str:
        error = row[f"{name}_stderr"]
        return f"{row[name]:.4f}" + (f" ± {error:.4f}" if isinstance(error, int | float) else "")

    rows = []
    for row in report.get("tasks") or ():
        error = row["difference_stderr"]
        change = f"{row['difference']:+.4f}" + ("" if error is None else f" ± {error:.4f}")
        rows.append((row["task"], row["metric"].partition(",")[0], value(row, "original"), value(row, "twin"), change))
    return rows


def trust_notes(report: dict[str, Any]) -> list[str]:
    """What a reader must know to trust the figures."""
    lines = []
    if text := report.get("text"):
        lines.append(
            f"Text: {text['source']}, {text['tokens']:,} tokens predicted in windows of {text['window']}, stride "
            f"{text['stride']}. Brackets are 95 % bootstrap intervals over {text['windows']} windows, paired."
        )
        conversion = (report["models"]["twin"] or {}).get("conversion")
        refined = ((conversion or {}).get("refined_on") or {}).get(label(text["source"]))
        if refined:
            first, last = report["settings"]["skip"], report["settings"]["skip"] + report["settings"]["tokens"]
            outside = (first >= refined["begin"] and last <= refined["end"]) or first >= refined["read"]
            lines.append(
                f"The twin was refined on this text, all but tokens {refined['begin']:,} to {refined['end']:,}; "
                + ("they alone were measured." if outside else "part of what was measured here was SEEN IN TRAINING.")
            )
        elif conversion and (end := seen_of(conversion["calibration"], text["source"])):
            seen = report["settings"]["skip"] < end
            lines.append(
                f"The twin was calibrated on tokens from among the first {end:,} of this text; "
                + ("part of what was measured here was SEEN BY THE FIT." if seen else "they were passed over.")
            )
    few = _fewer_than_wanted(report)
    if few:
        lines.append(f"Fewer tokens than asked for were unseen: {few}. Intervals over a few windows say little.")
    misled = [row for row in report.get("blocks") or () if row["gaussian_misleads"]]
    if misled:
        worst = max(misled, key=lambda row: abs(math.log(max(row["fvu"], 1e-12) / max(row["fvu_gaussian"], 1e-12))))
        apart = f"{worst['path']}: {worst['fvu']:.4f} against {worst['fvu_gaussian']:.4f}"
        lines.append(
            f"In {len(misled)} block{'s' * (len(misled) > 1)} the unexplained variance on text differs from that under "
            f"the fitted Gaussian by more than a factor of two ({apart}). Trust the one on text."
        )
    if report.get("tasks") and report["settings"]["task_settings"]["limit"]:
        lines.append("Tasks were run on a part of their documents (--limit): for orientation only.")
    if report["reused"]:
        lines.append("Reused from earlier runs with the same models and settings: " + ", ".join(report["reused"]) + ".")
    return lines


def _fewer_than_wanted(report: dict[str, Any]) -> str:
    """Texts of which there was much less than the settings say."""
    settings = report["settings"]
    rows = [
        (row["kind"], row["tokens"], settings["kind_tokens"]) for row in (report.get("kinds") or {}).get("kinds", ())
    ]
    return ", ".join(f"{name} {tokens:,} of {wanted:,}" for name, tokens, wanted in rows if tokens < 0.8 * wanted)


KIND_COLUMNS = ("kind of text", "tokens", "original, nats", "nats lost (95 %)", "KL", "")
SEEN = {"no": "", "kind": "its kind was seen", "text": "another part of it was seen"}


def interval(found: dict[str, Any]) -> str:
    """+0.123 [0.110, 0.140]"""
    bounds = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['value']:+.3f}{bounds}".replace("-0.000", "0.000").replace("+0.000", "0.000")


def kind_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row per kind: its name, tokens, the original's nats, nats lost, KL, and whether it was seen."""
    return [
        (
            row["kind"],
            f"{row['tokens']:,}",
            f"{row['nats']['original']['value']:.3f}",
            interval(row["nats_lost"]),
            f"{row['divergence']['value']:.3f}",
            SEEN[row["seen"]],
        )
        for row in found["kinds"]
    ]


def sentence(text: str) -> str:
    """The text as a line of its own."""
    return text[:1].upper() + text[1:]


def unseen_line(found: dict[str, Any]) -> str:
    """Mean and worst over the kinds that the twin has not seen."""
    over = found["unseen"]
    if over is None:
        return "every kind measured was seen by the twin"
    return (
        f"over {over['kinds']} unseen kind{'s' * (over['kinds'] > 1)}: {interval(over['mean'])} nats lost on average, "
        f"{over['worst']['value']:+.3f} on the worst ({over['worst']['kind']})"
    )
