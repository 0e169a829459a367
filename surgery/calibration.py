"""Calibration inputs: text, samples or tensors → batches of model inputs.

Sources (never a silent fallback: what was used is returned, printed and recorded):

    python              English that ships with Python: its language reference and the docstrings of its library
    samples             the model's own samples, drawn at temperature 1 (data-free)
    FILE.txt            plain text
    FILE.jsonl          one JSON object a line with a "text" field
    FILE.safetensors    model inputs by name (pixel_values, input_ids, attention_mask, …), first dimension examples
    hub:NAME[:CONFIG[:SPLIT]]   a Hub dataset with a "text" column (needs `datasets`)
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.errors import CalibrationError, RecipeError

BUILT_IN = ("python", "samples")
MODULES_PER_TOPIC = 4  # there are about four modules with long docstrings to a topic of the language reference
CHARACTERS_PER_TOKEN = 6  # an overestimate of English, so that enough text is read and no more


@dataclass(frozen=True)
class Calibration:
    """Batches for the model's forward, and what they are.

    Attributes:
        batches: keyword arguments of `model(**batch)`, tensors with the same first dimension.
        source, tokens, length: what was used, tokens in all (padding excluded), sequence length.
        fingerprint: SHA-256 of the tensors.
    """

    batches: tuple[dict[str, Tensor], ...]
    source: str
    tokens: int
    length: int
    fingerprint: str

    def as_dict(self) -> dict[str, Any]:
        described = asdict(self)
        del described["batches"]
        return described


def documents(source: str) -> Iterator[str]:
    """The texts of a text source, in order."""
    if source == "python":
        yield from _python_english()
    elif source.startswith("hub:"):
        yield from _hub_texts(source)
    else:
        yield from _file_texts(Path(source).expanduser())


def _python_english() -> Iterator[str]:
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise CalibrationError(
            "this Python was installed without pydoc_data",
            fix="give a text file with --calibration FILE.txt",
        ) from error
    library = _docstrings(Path(sysconfig.get_paths()["stdlib"]))  # read as far as needed: parsing it all takes seconds
    for _, text in sorted(topics.topics.items()):  # interleaved, so that any prefix holds both kinds
        yield text
        yield from islice(library, MODULES_PER_TOPIC)
    yield from library


def _docstrings(root: Path) -> Iterator[str]:
    """Docstrings of at least a paragraph, a text per module, from the standard library's sources."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts) or parts[0].startswith("_"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        long = [text for text in texts if len(text) > 200]
        if long:
            yield "\n\n".join(long)


def _file_texts(path: Path) -> Iterator[str]:
    if not path.is_file():
        known = ", ".join(BUILT_IN)
        raise CalibrationError(
            "there is no such calibration file",
            where=str(path),
            fix=f"give a .txt, .jsonl or .safetensors file, hub:NAME, or one of: {known}",
        )
    try:
        if path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                    raise CalibrationError('a line without a "text" string', where=f"{path}:{number}")
                yield record["text"]
        else:
            yield path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CalibrationError(
            f"the file cannot be read as UTF-8 {'JSON lines' if path.suffix == '.jsonl' else 'text'}: {error}",
            where=str(path),
        ) from error


def _hub_texts(source: str) -> Iterator[str]:
    _, name, *rest = source.split(":")
    config, split = [*rest, None, None][:2]
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            "reading a Hub dataset needs the datasets package", fix="pip install 'polysurgery[eval]'"
        ) from error
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in stream:
            if not isinstance(row.get("text"), str):
                raise CalibrationError(f"the dataset has no text column, only {sorted(row)}", where=source)
            if row["text"].strip():
                yield row["text"]
    except CalibrationError:
        raise
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(
            f"the dataset could not be read: {first}", where=source, fix="check name and network"
        ) from error


def tokens_of(source: str, tokenizer: Any, count: int, skip: int = 0) -> Tensor:
    """Token ids skip … skip + count of a text source, documents joined by the end-of-text token; shape (≤ count,)."""
    if tokenizer is None:
        raise CalibrationError(
            "the model comes with no tokenizer, so text cannot be used",
            fix="give model inputs as a .safetensors file (pixel_values or input_ids)",
        )
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in documents(source):
        budget = (skip + count - len(ids)) * CHARACTERS_PER_TOKEN * 4
        ids += tokenizer(text[:budget], add_special_tokens=False, verbose=False)["input_ids"] + separator
        if len(ids) >= skip + count:
            break
    return torch.tensor(ids[skip : skip + count], dtype=torch.long)


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text, as ids: a start token (Llama, Gemma), [CLS] and [SEP] (BERT).

    A model trained with a start token is another model without it, so every window gets the frame it knows.
    """
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start]), list(whole[start + len(bare) :])
    return [], []


def sample(model: Any, tokenizer: Any, count: int, length: int, seed: int, batch: int = 32) -> Tensor:
    """The model's own text: (count ÷ length, length) ids, drawn at temperature 1 from the start token."""
    start = next(
        (
            i
            for i in (getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None))
            if i is not None
        ),
        None,
    )
    if start is None or not hasattr(model, "generate") or not model.can_generate():
        raise CalibrationError("this model cannot generate text of its own", fix="give a text file with --calibration")
    from tqdm import tqdm

    torch.manual_seed(seed)
    rows: list[Tensor] = []
    needed = -(-count // length)
    with tqdm(total=needed, desc="sampling", unit="seq", leave=False) as bar:
        while len(rows) < needed:
            prompt = torch.full((min(batch, needed - len(rows)), 1), start, device=model.device)
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=start,
            )  # fmt: skip
            rows += list(out[:, :length].cpu())
            bar.update(len(out))
    return torch.stack(rows[:needed])


def prepare(
    source: str | Tensor | Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor],
    model: Any,
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    batch: int,
    seed: int = 0,
) -> Calibration:
    """Batches from any source.

    Args:
        source: a source name (see the module), token ids of shape (tokens,) or (sequences, length), or model inputs.
        tokens: how many to use at most.
        length: tokens a sequence; lowered to the model's own limit.
        batch: sequences a forward pass.
    Raises:
        CalibrationError: nothing to read, or less than two sequences.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = min(length, limit) if isinstance(limit, int) and limit > 0 else length
    label = source if isinstance(source, str) else "given"
    if isinstance(source, str) and source.endswith(".safetensors"):
        inputs = _tensor_file(Path(source).expanduser())
    elif isinstance(source, str):
        if source == "samples":
            ids = sample(model, tokenizer, tokens, length, seed)
        else:
            ids = sequences(tokens_of(source, tokenizer, tokens), length, frame(tokenizer), label)
        inputs = [_text_inputs(ids, model)]
    elif isinstance(source, Tensor):
        inputs = [
            _text_inputs(source if source.dim() == 2 else sequences(source.flatten(), length, label=label), model)
        ]
    elif isinstance(source, Mapping):
        inputs = [dict(source)]
    else:
        inputs = [dict(item) for item in source]
    batches = tuple(part for item in inputs for part in _split(item, batch))
    return _described(batches, label, model)


def sequences(ids: Tensor, length: int, framed: tuple[list[int], list[int]] = ([], []), label: str = "given") -> Tensor:
    """Sequences of `length` tokens, frame included, from a stream of ids; (sequences, length). A rest is left out.

    Raises:
        CalibrationError: fewer than two sequences.
    """
    before, after = (torch.tensor(part, dtype=ids.dtype) for part in framed)
    room = length - len(before) - len(after)
    rows = len(ids) // room if room > 0 else 0
    if rows < 2:
        raise CalibrationError(
            f"{len(ids)} tokens are fewer than two sequences of {length}",
            where=label,
            cause="the file is empty or too short",
            fix="give more text, or lower --length",
        )
    bodies = ids[: rows * room].view(rows, room)
    return torch.cat([before.expand(rows, -1), bodies, after.expand(rows, -1)], dim=1)


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


def _described(batches: tuple[dict[str, Tensor], ...], label: str, model: Any) -> Calibration:
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
        for name in sorted(item):
            digest.update(name.encode())
            digest.update(item[name].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    if sequences < 2:
        raise CalibrationError(
            f"{sequences} sequences: one part fits, another is held out, so at least two are needed",
            where=label,
            fix="give more text, or lower --length",
        )
    return Calibration(batches, label, tokens, length, digest.hexdigest())


def check_source(source: str) -> None:
    """Raises RecipeError for a source that cannot be what was meant, before a model is loaded."""
    if source in BUILT_IN or source.startswith("hub:") or Path(source).expanduser().is_file():
        return
    from surgery.errors import did_you_mean

    raise RecipeError(
        f"no calibration source {source!r}{did_you_mean(source, BUILT_IN)}",
        cause="neither an existing file nor a built-in source",
        fix=f"one of {', '.join(BUILT_IN)}, hub:NAME, or a .txt, .jsonl or .safetensors file",
    )
