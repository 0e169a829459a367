"""What a refinement reads: training windows, and held-out ones that neither the conversion nor it has seen.

Texts are read as a stream and windows kept in files, so that memory does not grow with the tokens. (A JSON array is
read whole.)
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from surgery.calibration.automatic import automatic, available
from surgery.calibration.mixtures import Mixture, seen_of
from surgery.calibration.texts import AUTO, BROAD, SAMPLES, label, tokenised
from surgery.errors import CalibrationError
from surgery.refining.own_texts import OwnTexts
from surgery.refining.packing import PackedWindows, cut, pack, packable
from surgery.refining.sequence import TrainingWindows
from surgery.refining.settings import RefineSettings
from surgery.refining.window_file import WindowFile, packed
from surgery.runtime import processes

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
    settings: RefineSettings, tokenizer: Any, report: dict[str, Any], teacher: Any, folder: Path, quiet: bool = True
) -> tuple[dict[str, PackedWindows], TrainingWindows, dict[str, dict[str, int]]]:
    """Held-out windows by text, training windows, and which tokens of each text were held out of how many read.

    Held out is, of every text, what follows the tokens that the conversion saw: unseen by both. All else is trained on,
    in windows from all over it; of several texts each gives its share, a short one by coming again. Of every text the
    share `short` of the windows holds sentences by themselves, where positions keep them apart. The original's own
    texts are drawn as they are trained on.
    What an earlier refinement held out of a text stays so.

    Args:
        folder: on the disk that the windows are kept on.
    """
    positions = packable(teacher)
    short = settings.short if positions else 0.0
    own = None
    held: dict[str, PackedWindows] = {}
    ranges = dict((report.get("refinement") or {}).get("held_out", {}))
    mixture, _ = available(Mixture.of(settings.text))
    train = WindowFile(folder, settings.window, positions)

    def in_windows(texts: Iterable[Sequence[int]]) -> tuple[PackedWindows, ...]:
        return packed(((text, False) for text in texts), settings.window, short, tokenizer, train)[1:]

    for part in mixture.parts:
        source, name = part.source, label(part.source)
        seen = seen_of(report["calibration"], source)
        held_each = max(settings.window, round(settings.validate_tokens * part.share))
        if name in ranges:
            seen, held_each = ranges[name]["begin"], ranges[name]["end"] - ranges[name]["begin"]
        wanted = round(settings.tokens * part.share)
        rows = -(-wanted // settings.window)
        if source == SAMPLES:
            own = OwnTexts(settings, teacher, tokenizer, rows, in_windows, quiet)
            held[name] = pack(own.held_out(held_each), settings.window, tokenizer, positions)
            ranges[name] = {"begin": 0, "end": held_each, "read": held_each + wanted}
            continue
        read = max(wanted, min(SPREAD * wanted, SPREAD_MOST))
        counted = _Counted(tokenised(source, tokenizer, seen + held_each + read))
        kept, long, alone = packed(cut(counted, seen, seen + held_each), settings.window, short, tokenizer, train)
        if counted.tokens < seen + held_each:
            raise CalibrationError(
                f"of its {counted.tokens:,} tokens the conversion saw {seen:,}; "
                f"{held_each:,} unseen ones are to be held out",
                where=source,
                fix="give more text, another text, or a lower --validate-tokens",
            )
        ranges[name] = {"begin": seen, "end": seen + held_each, "read": counted.tokens}
        held[name] = pack(kept, settings.window, tokenizer, positions)
        of_sentences = round(rows * short) if len(alone) else 0
        for windows, number in ((long, rows - of_sentences), (alone, of_sentences)):
            train.choose(windows, _as_many(len(windows), number, again=not mixture.one))
    found = TrainingWindows(train.windows(), own, settings.seed)
    a_step = settings.batch * settings.accumulate * processes.count()
    if any(len(part) == 0 for part in held.values()) or len(found) < a_step:
        raise CalibrationError(
            f"{len(found) * found.length:,} tokens are too few: a step takes {a_step} windows of {settings.window}",
            where=", ".join(settings.text),
            fix="give more text, or lower --window, --batch, --accumulate or --validate-tokens",
        )
    return held, found, ranges


class _Counted:
    """Documents, and how many tokens of them were read so far."""

    def __init__(self, texts: Iterable[array[int]]) -> None:
        self.texts, self.tokens = texts, 0

    def __iter__(self) -> Iterator[array[int]]:
        for text in self.texts:
            self.tokens += len(text)
            yield text


def _as_many(there: int, wanted: int, again: bool) -> torch.Tensor:
    """Which of the windows to take: `wanted`, from all over them; of fewer all, over and `again` or once."""
    if there > wanted:
        return torch.arange(wanted) * there // wanted
    return torch.arange(wanted) % there if again and there else torch.arange(there)
