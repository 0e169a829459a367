"""Whether llama.cpp computes with a GGUF file what the twin computes; it runs in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.errors import ModelError

PROMPT, STEPS, TOP = 16, 12, 5
TEXTS = (
    "The capital of France is Paris, isn't it? In 1789 there were 28,000,000 people.\n\n  Two spaces;\ttabs.",
    "def f(x): return x**2 + 1  # naïve café, 東京, Ωμέγα 🙂\r\n",
)
TOLERANCE = {"f32": 0.02, "bf16": 0.3, "f16": 0.05, "q8_0": 0.5, "q5_1": 4.0, "q5_0": 4.0, "q4_1": 5.0, "q4_0": 5.0}
"""Largest difference of a log-probability. By weights of 16 bits the engine multiplies in 16 bits; with five and four
bits unlikely tokens move by some nats, so the weights of such a file are read back as well."""


@dataclass(frozen=True)
class Seen:
    """What the engine made of a file.

    Attributes:
        difference: largest, of the log-probabilities of the likeliest tokens at some places of a text.
        same_text: whether the twin, by itself, writes the same tokens.
        same_tokens: whether both tokenizers agree on `TEXTS`.
    """

    engine: str
    difference: float
    same_text: bool
    same_tokens: bool


def installed() -> bool:
    """Whether there is an engine here."""
    return importlib.util.find_spec("xllamacpp") is not None


def seen_in_engine(file: Path, model: Any, tokenizer: Any) -> Seen:
    """Log-probabilities, a greedy text and token ids in llama.cpp, beside the twin's.

    Raises:
        ModelError: the engine does not load the file, or dies.
    """
    texts = TEXTS if tokenizer is not None else ()
    ids = _ids(model, tokenizer)
    found = _asked(file, {"ids": ids, "prompt": PROMPT, "top": TOP, "texts": texts})
    ours = _log_probabilities(model, ids)
    difference = max(
        (abs(float(ours[int(at) - 1, number]) - value) for at, top in found["top"].items() for number, value in top),
        default=0.0,
    )
    greedy = _log_probabilities(model, ids[:PROMPT] + found["greedy"])[PROMPT - 1 : -1]
    greedy[:, _special(model, tokenizer)] = -torch.inf  # the engine was told not to end
    same_tokens = all(
        tokenizer(text, add_special_tokens=False).input_ids == tokens
        for text, tokens in zip(texts, found["tokens"], strict=True)
    )
    return Seen(found["engine"], difference, greedy.argmax(-1).tolist() == found["greedy"], same_tokens)


def _asked(file: Path, what: dict[str, Any]) -> Any:
    """What :mod:`surgery.publishing.llama_cpp_check` answers."""
    command = [sys.executable, str(Path(__file__).with_name("llama_cpp_check.py")), str(file)]
    done = subprocess.run(command, input=json.dumps(what), capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        said = done.stderr.strip().splitlines()
        problems = [line for line in said if "error" in line.lower()] or said or ["it ended without a word"]
        raise ModelError("llama.cpp does not run the exported file", where=file.name, cause=problems[-1].strip())
    return json.loads(lines[-1])


def _ids(model: Any, tokenizer: Any) -> list[int]:
    """The beginning of a text, or of the vocabulary where there is no tokenizer."""
    size = PROMPT + STEPS
    ids: list[int] = [] if tokenizer is None else tokenizer(" ".join(TEXTS)).input_ids
    return ids[:size] if len(ids) >= size else [number % model.config.vocab_size for number in range(size)]


def _special(model: Any, tokenizer: Any) -> list[int]:
    return [] if tokenizer is None else [number for number in tokenizer.all_special_ids if number is not None]


def _log_probabilities(model: Any, ids: list[int]) -> Tensor:
    """Of what follows each position, (tokens, vocabulary)."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
    return logits.float().log_softmax(-1).cpu()
