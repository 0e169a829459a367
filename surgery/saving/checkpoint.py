"""Writes a twin as an ordinary transformers checkpoint, and believes it only after a fresh process has read it.

The folder is written under a temporary name beside the target, verified there, and renamed: what stands under the
target's name is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.models.companions import Companions
from surgery.runtime.files import as_os_error, write_json
from surgery.saving.folder import whole_folder
from surgery.saving.reload import verify_saved
from surgery.saving.report import write_report

NONE = Companions()


def save(
    model: Any,
    tokenizer: Any | None,
    out: Path,
    report: Mapping[str, Any],
    probe: Mapping[str, Tensor],
    dtype: str = "float32",
    form: str = "custom",
    verify: bool = True,
    companions: Companions = NONE,
) -> dict[str, Any]:
    """Saves, reloads in a fresh process, compares, renames.

    Args:
        probe: inputs of one small forward pass, for the comparison.
        dtype: precision of the stored weights.
        form: custom reloads with `trust_remote_code=True`, any other form without trusting code; all of them
            without this package.
        companions: further files that belong beside the weights.
    Returns:
        what the verification saw (also written into the report).
    Raises:
        CheckpointError: not writable, disk full, keys missing or left over, other logits. Nothing is left behind.
    """
    with whole_folder(out) as temporary:
        _write(model, tokenizer, temporary, dtype)
        companions.write(temporary)
        seen = verify_saved(model, temporary, probe, dtype, form) if verify else {"verified": False}
        write_report(temporary, report, seen)
    return seen


def _write(model: Any, tokenizer: Any | None, folder: Path, dtype: str) -> None:
    wanted = getattr(torch, dtype)
    cast: dict[int, Tensor] = {}
    state = {}
    for name, value in model.state_dict().items():
        key = value.data_ptr() if value.numel() else id(value)
        if value.is_floating_point():
            cast.setdefault(key, value.to(wanted))  # one tensor for tied weights, so that they stay tied
            state[name] = cast[key].view(value.shape)
        else:
            state[name] = value
    before = model.config.dtype
    model.config.dtype = wanted
    try:
        model.save_pretrained(folder, state_dict=state)
    except Exception as error:
        raise as_os_error(error) from error
    finally:
        model.config.dtype = before
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = dtype
    write_json(folder / "config.json", config)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
