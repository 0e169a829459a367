"""A bilinear twin as an ordinary SwiGLU network of twice the width, exactly, since silu(y) − silu(−y) = y:

g ⊙ u = silu(g) ⊙ u + silu(−g) ⊙ (−u),    gate = [g; −g], up = [u; −u], down = [D, D]
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.blocks.find import survey
from surgery.errors import ModelError
from surgery.models import loading
from surgery.saving.checkpoint import save
from surgery.saving.folder import check_target
from surgery.saving.forms import ACTIVATION_KEYS
from surgery.saving.reload import TOLERANCE, main_output, probe_ids
from surgery.saving.report import read_verified_report


def as_silu(model: Any) -> Any:
    """The same function as an ordinary SwiGLU network of the stock class.

    Raises:
        ModelError: not a native bilinear twin.
    """
    keys = [key for key in ACTIVATION_KEYS if getattr(model.config, key, None) == "linear"]
    if not keys or not getattr(model.config, "mlp_bias", False):
        raise ModelError(
            "only a native twin of degree 2 has a SiLU form",
            where=type(model).__name__,
            cause="its blocks are not bilinear, or the architecture has no mlp_bias",
            fix="convert a Llama-like model with --degree 2",
        )
    config = copy.deepcopy(model.config)
    for key in keys:
        setattr(config, key, "silu")
    config.intermediate_size *= 2
    with torch.device("meta"):
        wide = type(model)._from_config(config)
    wide = wide.to_empty(device=model.device).to(model.dtype)
    state = dict(model.state_dict())
    for block in survey(wide).blocks:
        for part, join in (("gate_proj", _opposed), ("up_proj", _opposed), ("down_proj", _twice)):
            name = f"{block.path}.{part}"
            state[f"{name}.weight"] = join(state[f"{name}.weight"])
            if part != "down_proj":
                state[f"{name}.bias"] = join(state[f"{name}.bias"])
    wide.load_state_dict(state)
    for name, buffer in model.named_buffers():  # rotary frequencies and the like are in no state dict
        holder, _, leaf = name.rpartition(".")
        setattr(wide.get_submodule(holder), leaf, buffer)
    if getattr(model, "generation_config", None) is not None:
        wide.generation_config = copy.deepcopy(model.generation_config)
    wide.tie_weights()
    wide.train(False)
    return wide


def _opposed(rows: Tensor) -> Tensor:
    return torch.cat([rows, -rows])


def _twice(columns: Tensor) -> Tensor:
    return torch.cat([columns, columns], dim=1)


def export_silu(folder: Path, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Saves the SiLU form of a twin, verified in a fresh process; what the verification saw."""
    report = read_verified_report(folder)
    out = check_target(out, overwrite)
    loaded = loading.loaded(str(folder))
    model: Any = loaded.model
    wide = as_silu(model)
    probe = probe_ids(model)
    with torch.no_grad():
        before, after = (main_output(network(**probe)) for network in (model, wide))
    if not float((after - before).norm() / before.norm()) < TOLERANCE["float32"]:
        raise ModelError("the exported network computes something else than the twin", where=str(folder))
    described = {**report, "form": "silu", "exported_from": folder.name}
    how: dict[str, Any] = {"dtype": loaded.source.dtype, "form": "native", "companions": loaded.companions}
    return save(wide, loaded.tokenizer, out, described, probe, **how)
