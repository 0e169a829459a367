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
from surgery.calibration.sentences import Sentences
from surgery.calibration.texts import AUTO, BROAD, SAMPLES, label, tokenised
from surgery.errors import CalibrationError
from surgery.refining.own_texts import own_texts
from surgery.refining.packing import PackedWindows, Packer, cut, pack, packable
from surgery.refining.settings import RefineSettings
from surgery.refining.window_file import WindowFile

SPREAD, SPREAD_MOST = 4, 500_000  # times the tokens of a text that are read to train on, and where that ends
STRETCH = 256  # tokens of a text that become sentences together
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
    ranges = dict((report.get("refinement") or {}).get("held_out", {}))
    mixture, _ = available(Mixture.of(settings.text))
    train = WindowFile(place.parent, settings.window, positions)
    for part in mixture.parts:
        source, name = part.source, label(part.source)
        seen = seen_of(report["calibration"], source)
        held_each = max(settings.window, round(settings.validate_tokens * part.share))
        if name in ranges:
            seen, held_each = ranges[name]["begin"], ranges[name]["end"] - ranges[name]["begin"]
        wanted = round(settings.tokens * part.share)
        if source == SAMPLES:
            texts: Iterable[array[int]] = own_texts(
                settings, teacher, tokenizer, wanted + held_each, accelerator, place
            )
        else:
            read = max(wanted, min(SPREAD * wanted, SPREAD_MOST))
            texts = tokenised(source, tokenizer, seen + held_each + read)
        counted = _Counted(texts)
        short = settings.short if positions else 0.0
        kept, long, alone = _packed(cut(counted, seen, seen + held_each), settings.window, short, tokenizer, train)
        if counted.tokens < seen + held_each:
            raise CalibrationError(
                f"of its {counted.tokens:,} tokens the conversion saw {seen:,}; "
                f"{held_each:,} unseen ones are to be held out",
                where=source,
                fix="give more text, another text, or a lower --validate-tokens",
            )
        ranges[name] = {"begin": seen, "end": seen + held_each, "read": counted.tokens}
        held[name] = pack(kept, settings.window, tokenizer, positions)
        rows = -(-wanted // settings.window)
        of_sentences = round(rows * short) if len(alone) else 0
        for windows, number in ((long, rows - of_sentences), (alone, of_sentences)):
            train.choose(windows, _as_many(len(windows), number, again=not mixture.one))
    found = train.windows()
    a_step = settings.batch * settings.accumulate * accelerator.num_processes
    if any(len(part) == 0 for part in held.values()) or len(found) < a_step:
        raise CalibrationError(
            f"{found.ids.numel():,} tokens are too few: a step takes {a_step} windows of {settings.window}",
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


def _packed(
    pieces: Iterable[tuple[Sequence[int], bool]], length: int, short: float, tokenizer: Any, beside: WindowFile
) -> tuple[list[Sequence[int]], PackedWindows, PackedWindows]:
    """Of pieces, each held out or not: those held out, windows of the others, and windows of sentences out of them.

    A share `short` of every text's stretches becomes sentences.
    """
    kept: list[Sequence[int]] = []
    sentences = Sentences(tokenizer)
    packers = [Packer(length, tokenizer) for _ in range(2)]
    long, alone = files = [beside.another() for _ in range(2)]
    total = taken = 0
    for piece, inside in pieces:
        if inside:
            kept.append(piece)
            continue
        for stretch in [piece[at : at + STRETCH] for at in range(0, len(piece), STRETCH)] if short else [piece]:
            total += len(stretch)
            which = taken + len(stretch) <= short * total
            taken += which * len(stretch)
            for text in sentences.of(stretch) if which else [stretch]:
                files[which].extend(packers[which].add(text))
    return kept, long.windows(), alone.windows()


def _as_many(there: int, wanted: int, again: bool) -> torch.Tensor:
    """Which of the windows to take: `wanted`, from all over them; of fewer all, over and `again` or once."""
    if there > wanted:
        return torch.arange(wanted) * there // wanted
    return torch.arange(wanted) % there if again and there else torch.arange(there)
