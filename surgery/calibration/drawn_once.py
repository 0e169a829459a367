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

from surgery.calibration.samples import DRAWN_AS, SAMPLED_TOGETHER, drawing_dtype, prompts, sample
from surgery.models import fingerprint
from surgery.runtime.files import cache_folder, replacing
from surgery.runtime.weights_on_disk import device_of

NAME = "ids"


def drawn_once(
    model: Any, tokenizer: Any, rows: int, length: int, seed: int, *, products: str | None = None, quiet: bool = False
) -> Tensor:
    """What :func:`surgery.calibration.samples.sample` gives, (rows, length) ids, kept in the user's cache.

    The file is named by all that the texts hang on: weights, beginnings, seed, precision. Of a model whose weights are
    on disk nothing is kept, nor where the cache cannot be written.

    Raises:
        CalibrationError: the model cannot generate text.
    """
    products = products or drawing_dtype(model, tokenizer)
    file = _file(model, [rows, length, seed, products, *prompts(tokenizer, rows, length)])
    if file is not None and file.is_file():
        with suppress(SafetensorError, KeyError, OSError):
            found: Tensor = load_file(file)[NAME]
            return found
    drawn = sample(model, tokenizer, rows, length, seed=seed, products=products, quiet=quiet)
    if file is not None:
        with suppress(OSError, SafetensorError), replacing(file, several=True) as temporary:
            save_file({NAME: drawn}, temporary)
    return drawn


def _file(model: Any, wish: list[Any]) -> Path | None:
    """Where such texts are kept; None where nothing tells the model from another."""
    tensors = model.state_dict()
    if any(value.is_meta for value in tensors.values()):
        return None
    saved = getattr(model, "generation_config", None)
    ends = [getattr(saved, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    how = [DRAWN_AS, SAMPLED_TOGETHER, torch.__version__, device_of(model).type]
    hangs_on = [wish, how, ends, type(model).__name__, _without_place(model.config.to_dict())]
    about = json.dumps(hangs_on, default=str, sort_keys=True)
    return cache_folder("samples") / f"{fingerprint.of_tensors(tensors, about)}.safetensors"


def _without_place(config: Any) -> Any:
    """A configuration without where it was read from."""
    if not isinstance(config, dict):
        return config
    return {str(key): _without_place(value) for key, value in config.items() if key != "_name_or_path"}
