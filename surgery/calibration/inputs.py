"""Calibration inputs: text sources, the model's own samples or tensors → batches of model inputs.

Sources (never a silent fallback: what was used is returned, printed and recorded):

    samples             the model's own samples, drawn at temperature 1 (data-free)
    python, code, FILE.txt, FILE.jsonl, hub:NAME    texts, see :mod:`surgery.calibration.texts`
    broad, or several sources with shares           see :mod:`surgery.calibration.mixtures`
    FILE.safetensors    model inputs by name (pixel_values, input_ids, attention_mask, …), first dimension examples

Windows of text are long or short: part of the tokens comes in short windows that begin as a text begins, and half of
the long ones do too, unless the tokenizer gives every text a start token anyway. A model is used on short texts as well
as in the midst of long ones; calibrated on long windows alone, its twin is lost in the first tokens (docs/log.md).

Some tokens are replaced by random ones of the vocabulary: most of it is rare, and what a twin never met costs it most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from surgery.calibration.automatic import available
from surgery.calibration.common_pile import PARTS
from surgery.calibration.given import check_ids, given_inputs
from surgery.calibration.mixtures import Given, Mixture
from surgery.calibration.texts import SAMPLES, label
from surgery.calibration.windows import TextPieces, joined, vocabulary, with_random_tokens
from surgery.errors import CalibrationError

LONGEST_NAME = 255  # characters, of a file on most systems


@dataclass(frozen=True)
class Calibration:
    """Batches for the model's forward, and what they are.

    Attributes:
        batches: keyword arguments of `model(**batch)`, tensors with the same first dimension.
        source, tokens, length: what was used, tokens in all (padding excluded), sequence length.
        fingerprint: SHA-256 of the tensors.
        parts: of text, a row per source: its share, the tokens used, the share of them in short windows, and `end`:
            up to which token of the source they are.
        unseen: further batches that no fit may see, to measure on.
        note: a plain word on what could not be had; empty where nothing is missing.
    """

    batches: tuple[dict[str, Tensor], ...]
    source: str
    tokens: int
    length: int
    fingerprint: str
    parts: tuple[dict[str, Any], ...] = ()
    unseen: tuple[dict[str, Tensor], ...] = ()
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        described = asdict(self)
        del described["batches"], described["unseen"]
        return described

    def as_tensors(self) -> dict[str, Tensor]:
        """All batches by name, to be stored; see :meth:`of_tensors`."""
        return {
            f"{part}/{number}/{name}": value.contiguous()
            for part in ("batches", "unseen")
            for number, batch in enumerate(getattr(self, part))
            for name, value in batch.items()
        }

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> Calibration:
        """What :meth:`as_tensors` and :meth:`as_dict` were made from."""
        parts: dict[str, dict[int, dict[str, Tensor]]] = {"batches": {}, "unseen": {}}
        for key, value in tensors.items():
            part, number, name = key.split("/")
            parts[part].setdefault(int(number), {})[name] = value
        batches, unseen = (tuple(batch for _, batch in sorted(parts[part].items())) for part in ("batches", "unseen"))
        return Calibration(batches, unseen=unseen, **{**described, "parts": tuple(described["parts"])})


def calibration_inputs(
    source: Any,
    model: Any,
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    batch: int,
    seed: int = 0,
    short: float | None = 0.0,
    random_tokens: float = 0.0,
    unseen: int = 0,
) -> Calibration:
    """Batches from any source.

    Args:
        source: a source name (see the module), several or shares by name; or token ids, texts, model inputs or a
            dataset, see :mod:`surgery.calibration.given`.
        tokens: how many to use at most.
        length: tokens a sequence; lowered to the model's own limit.
        batch: sequences a forward pass; of short ones as many as have the same number of tokens.
        short: share of the tokens in short windows, None: of every source its kind's own; 0 where `length` is short.
        random_tokens: share of the tokens of text or samples replaced; see :func:`with_random_tokens`.
        unseen: further tokens to measure on, from sources that have any.
    Raises:
        CalibrationError: nothing to read, or less than two sequences.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = known if isinstance(known, int) and known > 0 else 1 << 30
    length = min(length, limit)
    mixture, missing = available(Mixture.of(spelled(source))) if is_named(source) else (None, "")
    if mixture is None or mixture.is_inputs:
        given = _tensor_file(mixture.parts[0].source) if mixture else source
        inputs = [_with_decoder(part, model) for part in given_inputs(given, tokenizer, tokens, length)]
        return _batched(inputs, mixture.name if mixture else "given", model, length, batch)
    mixture, small = _large_enough(mixture, tokens, length)
    found, rows = [], []
    for part in mixture.parts:
        least = 2 if mixture.one else 1
        own, further = round(tokens * part.share), round(unseen * part.share)
        pieces = TextPieces(own, length, part.short(short), further, least)
        if part.source == SAMPLES:
            windows = pieces.of_samples(model, tokenizer, seed, limit)
        else:
            windows = pieces.of_text(part.source, tokenizer)
        found.append(windows)
        about = {"source": label(part.source), "share": part.share, "short": pieces.short}
        rows.append({**about, "tokens": windows.tokens, "end": windows.end})
    sets, rest = joined(found)
    if random_tokens > 0:
        words = vocabulary(tokenizer, model)
        sets = [with_random_tokens(ids, random_tokens, *words, seed) for ids in sets]
    data = _batched([_with_decoder({"input_ids": ids}, model) for ids in sets], mixture.name, model, length, batch)
    measured = () if rest is None else tuple(_split(_with_decoder({"input_ids": rest}, model), batch))
    return replace(data, unseen=measured, parts=tuple(rows), note="; ".join(filter(None, (missing, small))))


def _batched(inputs: Sequence[dict[str, Tensor]], name: str, model: Any, length: int, batch: int) -> Calibration:
    """Inputs of one length each in batches of as many tokens as `batch` sequences of `length` have, described."""
    batches = tuple(part for item in inputs for part in _split(item, max(1, batch * length // _length(item, length))))
    check_ids(batches, _embeddings(model))
    return _described(batches, name, model)


def is_named(source: Any) -> TypeGuard[Given]:
    """Whether what is given are sources by name, instead of tensors."""
    if isinstance(source, Mapping):
        return len(source) > 0 and all(isinstance(share, int | float) for share in source.values())
    if isinstance(source, str | Path):
        return True
    several = isinstance(source, Sequence) and len(source) > 0 and all(isinstance(item, str | Path) for item in source)
    return several and not all(_is_text(item) for item in source)


def _is_text(item: str | Path) -> bool:
    """Whether a string is itself a text: no name of a source has lines or is as long as this."""
    return isinstance(item, str) and ("\n" in item or len(item) > LONGEST_NAME)


def spelled(named: Any) -> str | list[str] | dict[str, float]:
    """Sources by name as a recipe holds them, paths as strings."""
    if isinstance(named, Mapping):
        return {str(source): float(share) for source, share in named.items()}
    return str(named) if isinstance(named, str | Path) else [str(source) for source in named]


def _large_enough(mixture: Mixture, tokens: int, length: int) -> tuple[Mixture, str]:
    """The mixture without those files of `broad` whose share is less than a sequence, and a plain word on them.

    Raises:
        CalibrationError: of another source it is.
    """
    small = () if mixture.one else tuple(part for part in mixture.parts if round(tokens * part.share) < length)
    for part in small:
        if part.source not in PARTS:
            raise CalibrationError(
                f"its share of {tokens} tokens is {tokens * part.share:.0f}: less than one sequence of {length}",
                where=part.source,
                fix="more --tokens, a shorter --window, or fewer sources",
            )
    if not small:
        return mixture, ""
    if len(small) == len(mixture.parts):
        raise CalibrationError(f"{tokens} tokens are too few for any part of {mixture.name}", fix="more --tokens")
    return mixture.without(small), f"{len(small)} of {len(mixture.parts)} sources left out, as {tokens} tokens are few"


def _length(inputs: Mapping[str, Tensor], otherwise: int) -> int:
    ids = inputs.get("input_ids")
    return otherwise if ids is None else ids.shape[1]


def _with_decoder(inputs: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """An encoder-decoder's decoder reads the same ids where nothing else is said."""
    if set(inputs) == {"input_ids"} and getattr(model.config, "is_encoder_decoder", False):
        return inputs | {"decoder_input_ids": inputs["input_ids"]}
    return inputs


def _embeddings(model: Any) -> int | None:
    """How many tokens the model has embeddings for, where it has any."""
    try:
        table = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return None
    return table if isinstance(table, int) else None


def _tensor_file(source: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = Path(source).expanduser()
    if not path.is_file():
        raise CalibrationError("there is no such file", where=str(path))
    try:
        return dict(load_file(path))
    except Exception as error:
        raise CalibrationError(f"not a readable safetensors file: {error}", where=str(path)) from error


def _split(inputs: dict[str, Tensor], batch: int) -> Iterator[dict[str, Tensor]]:
    sizes = {name: len(value) for name, value in inputs.items()}
    if not sizes or len(set(sizes.values())) != 1:
        raise CalibrationError(f"inputs disagree about the number of examples: {sizes}")
    total = next(iter(sizes.values()))
    for start in range(0, total, batch):
        yield {name: value[start : start + batch] for name, value in inputs.items()}


def _described(batches: tuple[dict[str, Tensor], ...], name: str, model: Any) -> Calibration:
    digest = hashlib.sha256()
    sequences = tokens = length = 0
    for item in batches:
        first = next(iter(item.values()))
        sequences += len(first)
        mask, ids = item.get("attention_mask"), item.get("input_ids")
        counted = (
            mask.sum() if mask is not None else (ids if ids is not None else first[:, :1].flatten(1)[:, :1]).numel()
        )
        tokens += int(counted)
        length = max(length, ids.shape[1] if ids is not None else 0)
        for key in sorted(item):
            digest.update(key.encode())
            digest.update(item[key].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    if sequences < 2:
        raise CalibrationError(
            f"{sequences} sequences: one part fits, another is held out, so at least two are needed",
            where=name,
            fix="give more text, or lower --window",
        )
    return Calibration(batches, name, tokens, length, digest.hexdigest())
