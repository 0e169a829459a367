"""A model's own texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.openings import openings
from surgery.calibration.texts import special_tokens
from surgery.errors import CalibrationError
from surgery.runtime.attention import packed_heads
from surgery.runtime.precision import autocast, usable_dtype
from surgery.runtime.weights_on_disk import device_of

SAMPLED_TOGETHER = 64  # sequences
DRAWN_AS = 1  # how texts are drawn, by number: another where the same wish gives other texts
MOST_UNKNOWN = 0.1  # of the tokens of English that are the tokenizer's unknown one
ENGLISH = "The quick brown fox jumps over the lazy dog, and the dog says: what a day! It was in 1923, on page 45."


def start_tokens(tokenizer: Any) -> list[int]:
    """What a text begins with: what the tokenizer puts there, else its start token, else its end-of-text token."""
    before, _ = special_tokens(tokenizer)
    if before:
        return before
    known = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return [token for token in known if token is not None][:1]


def sample(
    model: Any,
    tokenizer: Any,
    rows: int,
    length: int,
    batch: int = SAMPLED_TOGETHER,
    *,
    seed: int,
    after: int = 0,
    products: str | None = None,
    quiet: bool = False,
) -> Tensor:
    """The model's own texts from their start tokens on, (rows, length) ids, at temperature 1.

    Every other one goes on from an opening (:mod:`surgery.calibration.openings`), where the tokenizer knows English.
    `after` so many that were drawn already, it begins with the openings that follow. The global random state stays as
    it is. `products` is what matrices are multiplied in, by default what :func:`drawing_dtype` says.

    Raises:
        CalibrationError: the model cannot generate text.
    """
    from tqdm import tqdm

    products, device = products or drawing_dtype(model, tokenizer), device_of(model)
    begun = prompts(tokenizer, rows, length, after)
    plain: list[Tensor] = []
    others: list[Tensor] = []
    bar = tqdm(total=rows, desc=f"sampling {length} tokens", unit="seq", leave=False, disable=quiet)
    with bar, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for drawn, wanted in zip((plain, others), begun, strict=True):
            for first in range(0, len(wanted), batch):
                part = torch.tensor(wanted[first : first + batch], device=device)
                drawn.extend(_continued(model, part, length, products))
                bar.update(len(part))
    later = others[::-1]  # two of each in turn, so that both begin in every way windows begin
    return torch.stack([later.pop() if later and (n % 4 >= 2 or not plain) else plain.pop(0) for n in range(rows)])


def drawing_dtype(model: Any, tokenizer: Any) -> str:
    """What this model's texts are drawn in: bfloat16 where that is faster and it runs so.

    Raises:
        CalibrationError: it cannot generate text.
    """
    start = [] if tokenizer is None else start_tokens(tokenizer)
    if not start or not hasattr(model, "generate") or not model.can_generate():
        raise CalibrationError("this model cannot generate text of its own", fix="give a text file with --text")
    alone = torch.tensor([start], device=device_of(model))
    return usable_dtype("auto", alone.device, lambda: model(input_ids=alone))


def seed_of(seed: int, purpose: str) -> int:
    """A seed for texts of one purpose: the same one would begin texts of all purposes alike."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:6], "big")


def prompts(tokenizer: Any, rows: int, length: int, after: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """What so many texts begin with: the start tokens alone, and an opening behind them; empty without a start."""
    start = [] if tokenizer is None else start_tokens(tokenizer)
    begun = openings(tokenizer) if start and knows_english(tokenizer) else []
    begun = begun if begun and len(begun[0]) < length - len(start) - 1 else []
    opened = rows // 2 if begun else 0
    numbers = range(after // 2, after // 2 + opened)
    return [start] * (rows - opened), [[*start, *begun[number % len(begun)]] for number in numbers]


def _continued(model: Any, prompt: Tensor, length: int, products: str) -> Tensor:
    """Texts of `length` ids that go on from equally long prompts, (rows, ids)."""
    new = length - prompt.shape[1]
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": int(prompt[0, 0])}
    mask = torch.ones_like(prompt)
    rounded = autocast(products, prompt.device, cached=model.device.type != "meta")  # else copies of all that is read
    with rounded, _cast_once(model, products), packed_heads(prompt.device), _no_saved_settings(model):
        out: Tensor = model.generate(prompt, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, **how)
    return out[:, :length].cpu()


@contextmanager
def _cast_once(model: Any, products: str) -> Iterator[None]:
    """autocast keeps the rounded copy of a weight that wants a gradient, and rounds others anew for every token."""
    stay = not any(value.is_meta or hasattr(value, "to_local") for value in model.parameters())
    frozen = [value for value in model.parameters() if value.is_floating_point() and not value.requires_grad]
    frozen = frozen if products == "bfloat16" and stay else []
    for value in frozen:
        value.requires_grad_(True)
    try:
        yield
    finally:
        for value in frozen:
            value.requires_grad_(False)


@contextmanager
def _no_saved_settings(model: Any) -> Iterator[None]:
    """`generate` starts from its own defaults: the penalties, filters and beams saved with a model would bend what is
    drawn (and it fills whatever a call leaves open from them). The end-of-text token, which is never drawn, is kept."""
    from transformers import GenerationConfig

    saved = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=saved.bos_token_id, eos_token_id=saved.eos_token_id, pad_token_id=saved.pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = saved


def knows_english(tokenizer: Any) -> bool:
    """Whether next to nothing of an English sentence is unknown to the tokenizer."""
    ids = tokenizer(ENGLISH, add_special_tokens=False)["input_ids"]
    unknown = getattr(tokenizer, "unk_token_id", None)
    return unknown is None or ids.count(unknown) <= MOST_UNKNOWN * len(ids)
