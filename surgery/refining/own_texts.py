"""The original's own texts to train on: drawn once, kept beside the run's state, gone on with after a kill."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgery.calibration.samples import SAMPLED_TOGETHER, sample
from surgery.calibration.texts import special_tokens
from surgery.refining.settings import RefineSettings
from surgery.runtime.progress import progress

DRAWN_TOGETHER = 2 * SAMPLED_TOGETHER  # half of them from an opening
BYTES = 4  # of an id


def own_texts(
    settings: RefineSettings, teacher: Any, tokenizer: Any, count: int, accelerator: Any, place: Path
) -> Iterator[array[int]]:
    """At least `count` ids, a window's length a text, without what a tokenizer puts before texts."""
    made_of = f"{settings.original} {settings.original_revision} {settings.seed} {settings.window} {count}"
    file = place / f"samples-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    rows = -(-count // settings.window)
    if accelerator.is_main_process:
        _draw(teacher, tokenizer, file, rows, settings.window, settings.seed)
    accelerator.wait_for_everyone()
    before, _ = special_tokens(tokenizer)  # it is put before every piece again when windows are packed
    for row in np.memmap(file, np.int32, "r", shape=(rows, settings.window)):
        ids = array("i", row.tobytes())
        yield ids[len(before) :] if list(ids[: len(before)]) == before else ids


def _draw(teacher: Any, tokenizer: Any, file: Path, rows: int, length: int, seed: int) -> None:
    """Appends what is missing of `rows` texts. Each draw has a seed of its own, so that a killed run draws the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as out, progress(rows, f"drawing texts of {length} tokens") as bar:
        done = out.tell() // (BYTES * length)
        if done < rows:  # a draw that was cut off is made again
            done -= done % DRAWN_TOGETHER
            out.truncate(BYTES * length * done)
        bar.update(done)
        for first in range(done, rows, DRAWN_TOGETHER):
            torch.manual_seed(seed + first)
            drawn = sample(teacher, tokenizer, min(DRAWN_TOGETHER, rows - first), length, after=first, quiet=True)
            out.write(drawn.int().numpy().tobytes())
            out.flush()
            bar.update(len(drawn))
