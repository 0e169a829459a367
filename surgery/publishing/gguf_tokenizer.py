"""A tokenizer as GGUF's fields: those of the original's own GGUF as they are, or of a tokenizer of transformers.

GGUF knows byte-level BPE, whose rule for cutting text into words llama.cpp has to know by name, and SentencePiece's
BPE. What is neither is refused: a model that reads other tokens is silently wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from surgery.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _ENGLISH + r"\p{N}{1,3}" + _REST), ("ByteLevel", False)): "llama-bpe",
    (("Split", _ENGLISH + r"\p{N}" + _REST), ("ByteLevel", False)): "qwen2",
}
"""llama.cpp's name for a way to cut text into words, by the steps of `tokenizer.json`."""


class Field(NamedTuple):
    """A field of a GGUF file: `kind`, and of an array `inner`, are names of gguf's value types."""

    name: str
    value: Any
    kind: str
    inner: str | None = None


def fields_of_file(file: Path, vocabulary: int) -> list[Field]:
    """The tokenizer of a GGUF file, field by field. Raises ModelError where it has another number of tokens."""
    import gguf

    reader = gguf.GGUFReader(file)
    found = []
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            kinds = [kind.name for kind in field.types]
            found.append(Field(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None))
    tokens: list[str] = next((field.value for field in found if field.name == "tokenizer.ggml.tokens"), [])
    if len(tokens) != vocabulary:
        raise ModelError(
            f"the file's tokenizer has {len(tokens):,} tokens, the twin {vocabulary:,}",
            where=str(file),
            fix="name the GGUF that the twin was converted from",
        )
    return found


def fields_of(tokenizer: Any, vocabulary: int) -> list[Field]:
    """A tokenizer of transformers as GGUF's fields.

    Args:
        vocabulary: rows of the embeddings; tokens that the tokenizer lacks are written as unused.
    Raises:
        ModelError: no tokenizer, one without `tokenizer.json`, or of a kind that llama.cpp has no name for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            "the twin has no tokenizer of which GGUF's fields can be made",
            fix="name the original's GGUF file with --original",
        )
    described = json.loads(backend.to_str())
    model = described["model"]
    words = WORDS.get(_steps(described.get("pre_tokenizer")))
    pieces = bool(model.get("byte_fallback"))
    if model["type"] != "BPE" or not (words or pieces):
        raise ModelError(
            f"llama.cpp has no name for this {model['type']} tokenizer's way to cut text into words",
            where=type(tokenizer).__name__,
            cause=f"it is none of {', '.join(WORDS.values())}, nor SentencePiece's BPE",
            fix="name the original's GGUF file with --original: its tokenizer is taken as it is",
        )
    tokens, kinds = _tokens(tokenizer, model, vocabulary)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    found = [
        Field("tokenizer.ggml.model", "llama" if pieces else "gpt2", "STRING"),
        Field("tokenizer.ggml.tokens", tokens, "ARRAY", "STRING"),
        Field("tokenizer.ggml.token_type", kinds, "ARRAY", "INT32"),
    ]
    if pieces:
        rank = {pair.replace(" ", ""): number for number, pair in reversed(list(enumerate(merges)))}
        scores = [float(-rank[token]) if token in rank else float(-len(merges)) for token in tokens]
        before = bool(tokenizer.tokenize("a")[0].startswith("▁"))
        found += [
            Field("tokenizer.ggml.scores", scores, "ARRAY", "FLOAT32"),
            Field("tokenizer.ggml.add_space_prefix", before, "BOOL"),
        ]
    else:
        found += [
            Field("tokenizer.ggml.pre", words, "STRING"),
            Field("tokenizer.ggml.merges", merges, "ARRAY", "STRING"),
        ]
    return found + _specials(tokenizer)


def _steps(step: dict[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    """What of a `pre_tokenizer` decides on the words."""
    if step is None:
        return ()
    if step["type"] == "Sequence":
        return tuple(part for inner in step["pretokenizers"] for part in _steps(inner))
    decisive = {"ByteLevel": "use_regex", "Digits": "individual_digits"}
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return (("Split", step["pattern"].get("Regex")),)
    if step["type"] in decisive and not step.get("add_prefix_space"):
        return ((step["type"], step[decisive[step["type"]]]),)
    return ((step["type"], None),)


def _tokens(tokenizer: Any, model: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Every token and its type, by number."""
    tokens = [f"[unused {number}]" for number in range(vocabulary)]
    kinds = [UNUSED] * vocabulary
    added = dict(tokenizer.added_tokens_decoder)
    if max(len(model["vocab"]), *(number + 1 for number in added), 0) > vocabulary:
        raise ModelError(
            f"the tokenizer has more tokens than the twin's embeddings have rows ({vocabulary:,})",
            where=type(tokenizer).__name__,
        )
    for token, number in model["vocab"].items():
        is_byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        tokens[number], kinds[number] = token, BYTE if is_byte else NORMAL
    for number, token in added.items():
        tokens[number] = token.content
        kinds[number] = CONTROL if token.special else USER_DEFINED
    if tokenizer.unk_token_id is not None and kinds[tokenizer.unk_token_id] == NORMAL:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    return tokens, kinds


def _specials(tokenizer: Any) -> list[Field]:
    """Which tokens begin and end texts, whether they are added, and the chat template."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    numbers = {name: getattr(tokenizer, f"{short}_token_id") for name, short in names.items()}
    found = [
        Field(f"tokenizer.ggml.{name}_token_id", number, "UINT32")
        for name, number in numbers.items()
        if number is not None
    ]
    ids = tokenizer("a").input_ids
    begins, ends = (
        number is not None and ids[at] == number for number, at in ((numbers["bos"], 0), (numbers["eos"], -1))
    )
    found += [
        Field("tokenizer.ggml.add_bos_token", begins, "BOOL"),
        Field("tokenizer.ggml.add_eos_token", ends, "BOOL"),
    ]
    if isinstance(tokenizer.chat_template, str):
        found.append(Field("tokenizer.chat_template", tokenizer.chat_template, "STRING"))
    return found
