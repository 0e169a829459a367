"""Calibration inputs: a text source, the model's own samples or tensors → batches of model inputs.

Sources (never a silent fallback: what was used is returned, printed and recorded):

    samples             the model's own samples, drawn at temperature 1 (data-free)
    python, FILE.txt, FILE.jsonl, hub:NAME      texts, see :mod:`surgery.texts`
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
from typing import Any

import torch
from torch import Tensor

from surgery.errors import CalibrationError
from surgery.stream import fitted_sequences
from surgery.texts import frame, label, tokens_of

SHORT = 64  # tokens of a short window
SAMPLED_TOGETHER = 64  # sequences


@dataclass(frozen=True)
class Calibration:
    """Batches for the model's forward, and what they are.

    Attributes:
        batches: keyword arguments of `model(**batch)`, tensors with the same first dimension.
        source, tokens, length: what was used, tokens in all (padding excluded), sequence length.
        fingerprint: SHA-256 of the tensors.
        unseen: further batches that no fit may see, to measure on.
    """

    batches: tuple[dict[str, Tensor], ...]
    source: str
    tokens: int
    length: int
    fingerprint: str
    unseen: tuple[dict[str, Tensor], ...] = ()

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
        return Calibration(batches, unseen=unseen, **described)


def start_tokens(tokenizer: Any) -> list[int]:
    """What a text begins with: what the tokenizer puts there, else its start token, else its end-of-text token."""
    before, _ = frame(tokenizer)
    if before:
        return before
    known = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return [token for token in known if token is not None][:1]


def sample(model: Any, tokenizer: Any, rows: int, length: int, batch: int = SAMPLED_TOGETHER) -> Tensor:
    """The model's own texts from their start tokens on, (rows, length) ids, at temperature 1; global random state."""
    start = [] if tokenizer is None else start_tokens(tokenizer)
    if not start or not hasattr(model, "generate") or not model.can_generate():
        raise CalibrationError("this model cannot generate text of its own", fix="give a text file with --calibration")
    from tqdm import tqdm

    drawn: list[Tensor] = []
    with tqdm(total=rows, desc=f"sampling {length} tokens", unit="seq", leave=False) as bar:
        while len(drawn) < rows:
            prompt = torch.tensor(start, device=model.device).expand(min(batch, rows - len(drawn)), -1)
            new = length - len(start)
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=new, max_new_tokens=new, pad_token_id=start[0],
            )  # fmt: skip
            drawn += list(out[:, :length].cpu())
            bar.update(len(out))
    return torch.stack(drawn)


@dataclass(frozen=True)
class _Windows:
    """How much of a text, in what pieces."""

    tokens: int
    length: int
    short: float
    unseen: int

    @property
    def mixed(self) -> bool:
        return self.short > 0 and self.length > SHORT

    def of_text(self, source: str, tokenizer: Any) -> tuple[list[Tensor], Tensor | None]:
        """Sets of windows to calibrate on, and unseen ones: of the tokens after those; of a short text a quarter."""
        ids = tokens_of(source, tokenizer, self.tokens + self.unseen)
        framed, start = frame(tokenizer), start_tokens(tokenizer)
        room = self.length - len(framed[0]) - len(framed[1])
        spare = min(self.unseen, max(len(ids) - self.tokens, len(ids) // 4, room)) if len(ids) >= 3 * room else 0
        ids, rest = ids[: len(ids) - spare], ids[len(ids) - spare :]
        unseen = sequences(rest, self.length, framed, source, 1) if len(rest) >= room else None
        share = round(len(ids) * (1 - self.short))
        if not self.mixed or share < 2 * room or len(ids) - share < SHORT:
            return [sequences(ids, self.length, framed, source)], unseen
        long = sequences(ids[:share], self.length, framed, source)
        if start and not framed[0]:
            long[::2, 0] = start[0]
        return [long, sequences(ids[len(long) * room :], SHORT, (start, framed[1]), source, 1)], unseen

    def of_samples(self, model: Any, tokenizer: Any, seed: int, limit: int) -> tuple[list[Tensor], Tensor | None]:
        """The same of the model's own texts, of up to `limit` tokens."""
        torch.manual_seed(seed)
        short = int(self.tokens * self.short) // SHORT if self.mixed else 0
        rows, extra = -(-(self.tokens - short * SHORT) // self.length), -(-self.unseen // self.length)
        midst = short > 0 and self.length < limit and not (tokenizer is not None and frame(tokenizer)[0])
        drawn = sample(model, tokenizer, rows + extra, self.length + midst)
        if midst:
            drawn = torch.stack([row[number % 2 :][: self.length] for number, row in enumerate(drawn)])
        sets = [drawn[:rows]] + ([sample(model, tokenizer, short, SHORT)] if short else [])
        return sets, drawn[rows:] if extra else None


def prepare(
    source: str | Tensor | Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor],
    model: Any,
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    batch: int,
    seed: int = 0,
    short: float = 0.0,
    random_tokens: float = 0.0,
    unseen: int = 0,
) -> Calibration:
    """Batches from any source.

    Args:
        source: a source name (see the module), token ids of shape (tokens,) or (sequences, length), or model inputs.
        tokens: how many to use at most.
        length: tokens a sequence; lowered to the model's own limit.
        batch: sequences a forward pass; of short ones as many as have the same number of tokens.
        short: share of the tokens in short windows; 0 where `length` is short itself.
        random_tokens: share of the tokens of text or samples replaced; see :func:`with_random_tokens`.
        unseen: further tokens to measure on, from sources that have any.
    Raises:
        CalibrationError: nothing to read, or less than two sequences.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = known if isinstance(known, int) and known > 0 else 1 << 30
    length = min(length, limit)
    name = label(source) if isinstance(source, str) else "given"
    rest: Tensor | None = None
    if isinstance(source, str) and source.endswith(".safetensors"):
        inputs = _tensor_file(Path(source).expanduser())
    elif isinstance(source, str):
        plan = _Windows(tokens, length, short, unseen)
        if source == "samples":
            sets, rest = plan.of_samples(model, tokenizer, seed, limit)
        else:
            sets, rest = plan.of_text(source, tokenizer)
        if random_tokens > 0:
            words = _vocabulary(tokenizer, model)
            sets = [with_random_tokens(ids, random_tokens, *words, seed) for ids in sets]
        inputs = [_text_inputs(ids, model) for ids in sets]
    elif isinstance(source, Tensor):
        inputs = [_text_inputs(source if source.dim() == 2 else sequences(source.flatten(), length), model)]
    elif isinstance(source, Mapping):
        inputs = [dict(source)]
    elif all(isinstance(item, Mapping) for item in source):
        inputs = [dict(item) for item in source]
    else:
        raise CalibrationError(
            f"a sequence of {type(source[0]).__name__} is no calibration input",
            fix="give token ids as one tensor, or inputs by name: {'input_ids': …}, one such dict or several",
        )
    batches = tuple(part for item in inputs for part in _split(item, max(1, batch * length // _length(item, length))))
    _check_ids(batches, model)
    further = () if rest is None else tuple(_split(_text_inputs(rest, model), batch))
    return replace(_described(batches, name, model), unseen=further)


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


def sequences(
    ids: Tensor, length: int, framed: tuple[list[int], list[int]] = ([], []), where: str = "given", least: int = 2
) -> Tensor:
    """Sequences of `length` tokens, frame included, from a stream of ids; (sequences, length). A rest is left out.

    Raises:
        CalibrationError: fewer than `least` sequences.
    """
    before, after = (torch.tensor(part, dtype=ids.dtype) for part in framed)
    room = length - len(before) - len(after)
    rows = len(ids) // room if room > 0 else 0
    if rows < least:
        raise CalibrationError(
            f"{len(ids)} tokens are fewer than {'one sequence' if least == 1 else 'two sequences'} of {length}",
            where=where,
            cause="the file is empty or too short",
            fix="give more text, or lower --length",
        )
    bodies = ids[: rows * room].view(rows, room)
    return torch.cat([before.expand(rows, -1), bodies, after.expand(rows, -1)], dim=1)


def with_random_tokens(ids: Tensor, share: float, words: Tensor, special: Tensor, seed: int = 0) -> Tensor:
    """Tokens replaced by random ones of the vocabulary, each with probability `share`; special ones stay.

    The sequences that no block is fitted on stay as they are: what is measured on them is measured on text.

    Args:
        ids: (sequences, length).
        words, special: the vocabulary's ids, which are drawn alike, and those that are kept, (numbers,).
    """
    draw = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(ids.shape, generator=draw) < share) & ~torch.isin(ids, special)
    (fitted,) = fitted_sequences([{"input_ids": ids}])
    chosen[fitted:] = False
    return torch.where(chosen, words[torch.randint(len(words), ids.shape, generator=draw)], ids)


def _vocabulary(tokenizer: Any, model: Any) -> tuple[Tensor, Tensor]:
    """Ids of words that the model has embeddings for, and of special tokens."""
    special = set(tokenizer.all_special_ids)
    rows = getattr(model.config.get_text_config(), "vocab_size", None)
    words = [number for number in tokenizer.get_vocab().values() if rows is None or number < rows]
    return torch.tensor(sorted(set(words) - special)), torch.tensor(sorted(special), dtype=torch.long)


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
