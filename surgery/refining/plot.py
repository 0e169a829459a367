"""The picture of a refinement: training loss and held-out nats against tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.runtime.public import as_label


def plot_refinement(record: dict[str, Any], file: Path) -> bool:
    """Writes a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    tokens = [row["tokens"] for row in record["curve"]]
    a_step = record["tokens_seen"] / max(1, len(record["losses"]))
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([a_step * (step + 1) for step in range(len(record["losses"]))], record["losses"], lw=0.8)
    left.set(title="training loss, nats", xlabel="tokens")
    right.plot(tokens, [row["lost"] for row in record["curve"]], "o-", ms=3, label="perplexity, in nats lost")
    right.plot(tokens, [row["divergence"] for row in record["curve"]], "o-", ms=3, label="KL to the original")
    for name in record["curve"][0].get("texts", ()):
        lost = [row["texts"][name]["lost"] for row in record["curve"]]
        right.plot(tokens, lost, ":", lw=1, label=as_label(f"nats lost on {name}"))
    right.axhline(0, color="black", lw=0.6)
    right.set(title="held-out text", xlabel="tokens")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    return True
