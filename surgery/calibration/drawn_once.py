"""A model's own texts that are drawn once, and found again by whoever asks for the same of the same model."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery.calibration.samples import SAMPLED_TOGETHER, prompts, sample
from surgery.models import fingerprint
from surgery.runtime.files import cache_folder, replacing
from surgery.runtime.precision import chosen_dtype
from surgery.runtime.weights_on_disk import device_of

NAME = "ids"


def drawn_once(model: Any, tokenizer: Any, rows: int, length: int, seed: int, quiet: bool = False) -> Tensor:
    """What :func:`surgery.calibration.samples.sample` gives, (rows, length) ids, kept in the user's cache.

    The file is named by all that the texts hang on: weights, beginnings, seed, precision. Of a model whose weights are
    on disk nothing is kept, nor where the cache cannot be written.
    """
    file = _file(model, tokenizer, rows, length, seed)
    if file is not None and file.is_file():
        with suppress(SafetensorError, KeyError, OSError):
            found: Tensor = load_file(file)[NAME]
            return found
    drawn = sample(model, tokenizer, rows, length, seed=seed, quiet=quiet)
    if file is not None:
        with suppress(OSError, SafetensorError), replacing(file, several=True) as temporary:
            save_file({NAME: drawn}, temporary)
    return drawn


def _file(model: Any, tokenizer: Any, rows: int, length: int, seed: int) -> Path | None:
    """Where these texts are kept; None where nothing tells the model from another."""
    tensors = model.state_dict()
    if any(value.is_meta for value in tensors.values()):
        return None
    saved = getattr(model, "generation_config", None)
    ends = [getattr(saved, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    products = chosen_dtype("auto", device_of(model))
    hangs_on = [type(model).__name__, model.config.to_dict(), prompts(tokenizer, rows, length), ends, products]
    hangs_on += [length, seed, SAMPLED_TOGETHER, torch.__version__]
    name = fingerprint.of_tensors(tensors, json.dumps(hangs_on, sort_keys=True, default=str))
    return cache_folder("samples") / f"{name}.safetensors"
