"""What a caller gives in Python instead of a source's name → model inputs.

Token ids as a tensor, an array or lists; texts; model inputs by name, one set or several; or anything that yields such
rows: a Hugging Face dataset (of texts, of chat messages or tokenised), a data loader, a generator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.text_files import text_of
from surgery.calibration.texts import chat_of, ids_of
from surgery.calibration.windows import sequences
from surgery.errors import CalibrationError, first_line

ACCEPTED = (
    "give token ids as one tensor of integers, texts as a list of {'text': …}, a dataset of either, "
    "or model inputs by name: {'input_ids': …}, one such dict or several"
)
IDS = ("input_ids", "decoder_input_ids")


def given_inputs(source: Any, tokenizer: Any, tokens: int, length: int) -> list[dict[str, Tensor]]:
    """Model inputs by name, one dict or several.

    Args:
        tokens: how many to take of rows of text or of ids, or of what a loader yields; tensors are taken whole.
        length: of the sequences that a stream of ids is cut into.
    Raises:
        CalibrationError: it is nothing of the above, or holds what are no token ids.
    """
    if isinstance(source, Mapping):
        return [_by_name(source)]
    if _is_array(source):
        return [{"input_ids": _rows_of(_ids(source), length)}]
    if isinstance(source, str | bytes) or not isinstance(source, Iterable):
        raise _unknown(source)
    batches: list[dict[str, Tensor]] = []
    stream: list[Tensor] = []
    have, rows, taken_whole = 0, iter(source), isinstance(source, list | tuple)
    for number, row in enumerate(rows, 1):
        if number == 1 and isinstance(row, Integral):
            return [{"input_ids": _rows_of(_ids([row, *rows]), length)}]
        if isinstance(row, Mapping) and _is_batch(row):
            batches.append(_by_name(row))
            ids, other = batches[-1].get("input_ids"), next(iter(batches[-1].values()))
            have += 0 if taken_whole else len(other) if ids is None else ids.numel()  # a loader may have no end
        else:
            stream.append(_one_row(row, tokenizer, tokens - have, f"row {number} of what is given"))
            have += len(stream[-1])
        if have >= tokens:
            break
    if batches and stream:
        raise CalibrationError("model inputs and single rows are given in one", fix=ACCEPTED)
    if batches:
        return batches
    if not stream:
        raise CalibrationError("nothing is given to calibrate on", fix=ACCEPTED)
    return [{"input_ids": _rows_of(torch.cat(stream)[:tokens], length)}]


def check_ids(batches: Iterable[Mapping[str, Tensor]], embeddings: Any) -> None:
    """Raises CalibrationError for what is no token id, or none that the model has an embedding for.

    Args:
        embeddings: how many there are; anything but an int where that is not known.
    """
    for name, ids in ((name, batch[name]) for batch in batches for name in IDS if name in batch):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise CalibrationError(
                f"token ids are integers, not {str(ids.dtype).removeprefix('torch.')}", where=name, fix=ACCEPTED
            )
        least, largest = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
        if least < 0:
            raise CalibrationError(
                f"token {least} is below 0",
                where=name,
                cause="these are labels, or padding marked by a negative number",
                fix="give the ids that the tokenizer made",
            )
        if isinstance(embeddings, int) and largest >= embeddings:
            raise CalibrationError(
                f"token {largest} is not in the model's vocabulary of {embeddings}",
                where=name,
                cause="the ids come from another model's tokenizer",
                fix="tokenize with the model's own",
            )


def _one_row(row: Any, tokenizer: Any, most: int, where: str) -> Tensor:
    """Ids of a row that is a text, a record with one, or ids."""
    if isinstance(row, Mapping) and "input_ids" in row:
        ids = _ids(row["input_ids"]).flatten()
        mask = row.get("attention_mask")
        return ids if mask is None else ids[_tensor(mask, where).flatten().bool()]
    if isinstance(row, str | Mapping):
        text = text_of(row if isinstance(row, str) else dict(row), where, chat_of(tokenizer))
        return torch.tensor([token for part in ids_of([text], tokenizer, most) for token in part]).long()
    if _is_array(row) or isinstance(row, list | tuple):
        return _ids(row).flatten()
    raise _unknown(row)


def _is_array(value: Any) -> bool:
    """A tensor of torch, or what converts itself to one (NumPy and its like)."""
    return isinstance(value, Tensor) or hasattr(value, "__array__")


def _is_batch(row: Mapping[str, Any]) -> bool:
    """Whether a row is a batch of model inputs, and not a dataset's one example: a first dimension beside the ids'."""
    ids = next((row[name] for name in IDS if name in row), None)
    if ids is None:
        return bool(row) and all(_is_array(value) for value in row.values())
    if _is_array(ids):
        return len(ids.shape) > 1
    return isinstance(ids, list | tuple) and len(ids) > 0 and not isinstance(ids[0], Integral)


def _by_name(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {str(name): _tensor(value, str(name)) for name, value in inputs.items()}
    for name, value in found.items():
        if value.dim() == 0:
            raise CalibrationError("a single number, where the first dimension is examples", where=name, fix=ACCEPTED)
    return {name: value.long() if name in IDS and _whole(value) else value for name, value in found.items()}


def _rows_of(ids: Tensor, length: int) -> Tensor:
    """Sequences: rows as they are given, a stream cut at `length`."""
    if ids.dim() not in (1, 2):
        raise CalibrationError(
            f"token ids have one dimension or two, not shape {tuple(ids.shape)}", where="input_ids", fix=ACCEPTED
        )
    return ids if ids.dim() == 2 else sequences(ids, length)


def _ids(values: Any) -> Tensor:
    found = _tensor(values, "input_ids")
    return found.long() if _whole(found) else found


def _whole(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _tensor(values: Any, where: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        first = first_line(error)
        raise CalibrationError(f"it cannot be made a tensor: {first}", where=where, fix=ACCEPTED) from error


def _unknown(value: Any) -> CalibrationError:
    return CalibrationError(f"{type(value).__name__} cannot be used as calibration input", fix=ACCEPTED)
