"""The picture of a budget."""

from __future__ import annotations

from typing import Any

from surgery.conversion.budget import Budget


def plot_costs(budget: Budget, file: Any) -> bool:
    """Bars of each block's cost, coloured by what was chosen; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    place = range(len(budget.costs))
    for degree, colour, shift in ((2, "#4878a8", -0.2), (3, "#d99058", 0.2)):
        bars = axes.bar(
            [at + shift for at in place],
            [cost.divergence[degree] for cost in budget.costs],
            0.4,
            color=colour,
            label=f"degree {degree}",
        )
        for bar, cost in zip(bars, budget.costs, strict=True):
            bar.set_alpha(1.0 if budget.degrees[cost.path] == degree else 0.3)
    axes.set(xlabel="block", ylabel="KL, this block alone, nats")
    axes.set_title(f"{budget.measured:+.4f} of {budget.nats} nats; solid: chosen", loc="left", fontsize=9)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    return True
