"""Where a twin's loss sits: by position in the window, and by how often calibration saw the token.

Usage: python recipes/where.py TWIN MODEL [TEXT]. Measured on the text that `surgery convert` held back for perplexity;
TEXT is the file where that was not a built-in source.
"""

import os
import sys
from itertools import pairwise

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from rich.console import Console
from rich.table import Table

import surgery
from surgery.calibration.inputs import calibration_inputs
from surgery.losses import token_nats
from surgery.models import loading
from surgery.runtime.vocabulary import current
from surgery.saving.report import read_report

POSITIONS = (1, 8, 32, 128, 512)
COUNTS = (0, 1, 10, 100, 10**9)


def main(twin: str, model: str, text: str | None = None) -> None:
    report = read_report(twin)
    recipe = current(report["recipe"])
    loaded = loading.loaded(model)
    much = {name: recipe[name] for name in ("tokens", "batch", "seed", "short", "random_tokens")}
    much |= {"length": recipe["window"], "unseen": recipe["measure"]}
    data = calibration_inputs(text or recipe["text"], loaded.model, loaded.text_tokenizer, **much)
    lost = token_nats(surgery.load(twin), data.unseen) - token_nats(loaded.model, data.unseen)
    seen, unseen = (
        torch.cat([batch["input_ids"].flatten() for batch in data.batches]),
        torch.cat([batch["input_ids"] for batch in data.unseen]),
    )
    counts = torch.bincount(seen, minlength=int(unseen.max()) + 1)[unseen[:, 1:]]
    table = Table(
        "tokens", "share", "nats lost each", "share of the loss", title=f"{twin}: {lost.mean():+.4f} nats a token"
    )

    def row(name: str, chosen: torch.Tensor) -> None:
        share, each = chosen.double().mean(), lost[chosen].mean() if chosen.any() else torch.zeros(())
        table.add_row(name, f"{share:.1%}", f"{each:+.3f}", f"{share * each / lost.mean():.1%}")

    place = torch.arange(1, unseen.shape[1]).expand_as(lost)
    for low, high in pairwise(POSITIONS):
        row(f"position {low} to {high - 1}", (place >= low) & (place < high))
    for low, high in pairwise(COUNTS):
        name = "never" if high == 1 else f"{low} to {high - 1} times" if high < 10**9 else f"{low} times or more"
        row(f"seen {name} in calibration", (counts >= low) & (counts < high))
    Console().print(table)
    worst = sorted(report["blocks"], key=lambda block: block["r2_held"])[:5]
    print("worst blocks (R² held out):", ", ".join(f"{b['path']} {b['r2_held']:.3f}" for b in worst))


if __name__ == "__main__":
    main(*sys.argv[1:])
