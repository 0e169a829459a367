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
from surgery.calibration.mixtures import Given, Mixture
from surgery.calibration.texts import SAMPLES, label
from surgery.calibration.windows import TextPieces, joined, sequences, vocabulary, with_random_tokens
from surgery.errors import CalibrationError


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
    source: Given | Tensor | Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor],
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
        source: a source name (see the module), several or shares by name, token ids of shape (tokens,) or (sequences,
            length), or model inputs.
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
    mixture, missing = available(Mixture.of(source)) if is_named(source) else (None, "")
    if mixture is None or mixture.is_inputs:
        inputs = _given(mixture.parts[0].source if mixture else source, model, length)
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
    data = _batched([_text_inputs(ids, model) for ids in sets], mixture.name, model, length, batch)
    measured = () if rest is None else tuple(_split(_text_inputs(rest, model), batch))
    return replace(data, unseen=measured, parts=tuple(rows), note="; ".join(filter(None, (missing, small))))


def _batched(inputs: Sequence[dict[str, Tensor]], name: str, model: Any, length: int, batch: int) -> Calibration:
    """Inputs of one length each in batches of as many tokens as `batch` sequences of `length` have, described."""
    batches = tuple(part for item in inputs for part in _split(item, max(1, batch * length // _length(item, length))))
    _check_ids(batches, model)
    return _described(batches, name, model)


def is_named(source: Any) -> TypeGuard[Given]:
    """Whether what is given are sources by name, instead of tensors."""
    if isinstance(source, Mapping):
        return all(isinstance(share, int | float) for share in source.values())
    return isinstance(source, str) or (
        isinstance(source, Sequence) and len(source) > 0 and all(isinstance(item, str) for item in source)
    )


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
                fix="more --tokens, a shorter --length, or fewer sources",
            )
    if not small:
        return mixture, ""
    if len(small) == len(mixture.parts):
        raise CalibrationError(f"{tokens} tokens are too few for any part of {mixture.name}", fix="more --tokens")
    return mixture.without(small), f"{len(small)} of {len(mixture.parts)} sources left out, as {tokens} tokens are few"


def _given(source: Any, model: Any, length: int) -> list[dict[str, Tensor]]:
    """Model inputs that are not made here: a file's, or a caller's token ids or tensors by name."""
    if isinstance(source, str):
        return _tensor_file(Path(source).expanduser())
    if isinstance(source, Tensor):
        return [_text_inputs(source if source.dim() == 2 else sequences(source.flatten(), length), model)]
    if isinstance(source, Mapping):
        return [dict(source)]
    if all(isinstance(item, Mapping) for item in source):
        return [dict(item) for item in source]
    raise CalibrationError(
        f"a sequence of {type(source[0]).__name__} is no calibration input",
        fix="give token ids as one tensor, or inputs by name: {'input_ids': …}, one such dict or several",
    )


def _check_ids(batches: Sequence[Mapping[str, Tensor]], model: Any) -> None:
    """Raises CalibrationError for token ids that the model has no embeddings for."""
    try:
        table = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return
    for name in ("input_ids", "decoder_input_ids"):
        largest = max((int(batch[name].max()) for batch in batches if name in batch and batch[name].numel()), default=0)
        if isinstance(table, int) and largest >= table:
            raise CalibrationError(
                f"token {largest} is not in the model's vocabulary of {table}",
                where=name,
                cause="the ids come from another model's tokenizer",
                fix="tokenize with the model's own",
            )


def _length(inputs: Mapping[str, Tensor], otherwise: int) -> int:
    ids = inputs.get("input_ids")
    return otherwise if ids is None else ids.shape[1]


def _text_inputs(ids: Tensor, model: Any) -> dict[str, Tensor]:
    inputs = {"input_ids": ids.long()}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.long()
    return inputs


def _tensor_file(path: Path) -> list[dict[str, Tensor]]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise CalibrationError("there is no such calibration file", where=str(path))
    try:
        return [load_file(path)]
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
            fix="give more text, or lower --length",
        )
    return Calibration(batches, name, tokens, length, digest.hexdigest())
