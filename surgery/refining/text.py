"""What a refinement reads: training windows, and held-out ones that neither the conversion nor it has seen."""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path
from typing import Any

import torch

from surgery.calibration.automatic import automatic, available
from surgery.calibration.mixtures import Mixture, seen_of
from surgery.calibration.samples import sample
from surgery.calibration.texts import AUTO, BROAD, SAMPLES, label, special_tokens, tokenised
from surgery.errors import CalibrationError
from surgery.refining.packing import PackedWindows, cut_out, pack, packable
from surgery.refining.sentences import sentences
from surgery.refining.settings import RefineSettings
from surgery.runtime.files import replacing

SPREAD, SPREAD_MOST = 4, 500_000  # times the tokens of a text that are read to train on, and where that ends
OFFLINE = ("python=2", "code=2", SAMPLES)  # without a network; samples take longer to draw than to train on


def training_sources(settings: RefineSettings, tokenizer: Any) -> tuple[tuple[str, ...], str]:
    """`auto` spelled out, and a plain word on what could not be had."""
    text, note = settings.text, ""
    if text == (AUTO,):
        source, note = automatic(tokenizer, generates=True)
        text = (source,) if source == BROAD or not note else OFFLINE
    _, missing = available(Mixture.of(text))
    return text, "; ".join(filter(None, (note, missing)))


def training_windows(
    settings: RefineSettings, tokenizer: Any, report: dict[str, Any], teacher: Any, accelerator: Any, place: Path
) -> tuple[dict[str, PackedWindows], PackedWindows, dict[str, dict[str, int]]]:
    """Held-out windows by text, training windows, and which tokens of each text were held out of how many read.

    Held out is, of every text, what follows the tokens that the conversion saw: unseen by both. All else is trained on,
    in windows from all over it; of several texts each gives its share, a short one by coming again. Of every text the
    share `short` of the windows holds sentences by themselves, where positions keep them apart.
    What an earlier refinement held out of a text stays so.
    """
    positions = packable(teacher)
    held: dict[str, PackedWindows] = {}
    train: list[PackedWindows] = []
    ranges = dict((report.get("refinement") or {}).get("held_out", {}))
    mixture, _ = available(Mixture.of(settings.text))
    for part in mixture.parts:
        source, name = part.source, label(part.source)
        seen = seen_of(report["calibration"], source)
        held_each = max(settings.window, round(settings.validate_tokens * part.share))
        if name in ranges:
            seen, held_each = ranges[name]["begin"], ranges[name]["end"] - ranges[name]["begin"]
        wanted = round(settings.tokens * part.share)
        if source == SAMPLES:
            texts = _samples(settings, teacher, tokenizer, wanted + held_each, accelerator, place)
        else:
            read = max(wanted, min(SPREAD * wanted, SPREAD_MOST))
            texts = tokenised(source, tokenizer, seen + held_each + read)
        total = sum(len(text) for text in texts)
        if total < seen + held_each:
            raise CalibrationError(
                f"of its {total:,} tokens the conversion saw {seen:,}; {held_each:,} unseen ones are to be held out",
                where=source,
                fix="give more text, another text, or a lower --validate-tokens",
            )
        rest, kept = cut_out(texts, seen, seen + held_each)
        ranges[name] = {"begin": seen, "end": seen + held_each, "read": total}
        held[name] = pack(kept, settings.window, tokenizer, positions)
        rows = -(-wanted // settings.window)
        alone = round(rows * settings.short) if positions else 0
        for pieces, count in ((rest, rows - alone), (sentences(rest, tokenizer) if alone else [], alone)):
            packed = pack(pieces, settings.window, tokenizer, positions)
            train.append(_as_many(packed, count, again=not mixture.one))
    windows = PackedWindows.join(train)
    a_step = settings.batch * settings.accumulate * accelerator.num_processes
    if any(len(part) == 0 for part in held.values()) or len(windows) < a_step:
        raise CalibrationError(
            f"{windows.ids.numel():,} tokens are too few: a step takes {a_step} windows of {settings.window}",
            where=", ".join(settings.text),
            fix="give more text, or lower --window, --batch, --accumulate or --validate-tokens",
        )
    return held, windows, ranges


def _as_many(windows: PackedWindows, wanted: int, again: bool) -> PackedWindows:
    """`wanted` of the windows, from all over them; where there are fewer all of them, over and `again` or once."""
    there = len(windows)
    if there > wanted:
        return windows[torch.arange(wanted) * there // wanted]
    return windows[torch.arange(wanted) % there] if again and there else windows


def _samples(
    settings: RefineSettings, teacher: Any, tokenizer: Any, count: int, accelerator: Any, place: Path
) -> list[array[int]]:
    """The original's own texts, drawn once and kept beside the run's state."""
    made_of = f"{settings.original} {settings.original_revision} {settings.seed} {settings.window} {count}"
    file = place / f"samples-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.pt"
    if accelerator.is_main_process and not file.is_file():
        torch.manual_seed(settings.seed)
        drawn = sample(teacher, tokenizer, -(-count // settings.window), settings.window)
        with replacing(file) as temporary:
            torch.save(drawn, temporary)
    accelerator.wait_for_everyone()
    before, _ = special_tokens(tokenizer)  # it is put before every piece again when windows are packed
    rows = [array("i", row) for row in torch.load(file, weights_only=True).tolist()]
    return [row[len(before) :] if list(row[: len(before)]) == before else row for row in rows]
