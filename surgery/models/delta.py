"""A twin as what it adds to its original: a few numbers per unit, where the readout was kept.

`delta.safetensors` holds, for every tensor of the twin that the original does not have as it is,

    scale:NAME      float64, one number s per row, where the twin's rows are the original's divided by s
    rows:NAME       rows below the original's, as sink units have
    columns:NAME    columns to the right of the original's
    full:NAME       the whole tensor, where it is none of these

and `config.json` the twin's configuration with `polynomial_delta`: which original (with a fingerprint of its weights),
and which of its tensors each of the twin's comes from. Applying a delta gives the twin bit by bit: a division and a
rounding are the same on every machine.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.blocks.find import survey
from surgery.blocks.parts import layer_of
from surgery.errors import ModelError
from surgery.models import modeling_polynomial
from surgery.models.saved_blocks import saved_block, saved_blocks

KEY, WEIGHTS, FORMAT = "polynomial_delta", "delta.safetensors", 1


@dataclass(frozen=True)
class Delta:
    """What has to be stored.

    Attributes:
        tensors: by the names above.
        derived: the twin's tensor → the original's: name, rows (start, stop) of it, and whether it is transposed.
    """

    tensors: dict[str, Tensor]
    derived: dict[str, dict[str, Any]]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(value.numel() * value.element_size() for value in self.tensors.values())


def weights_sha256(model: Any) -> str:
    """SHA-256 of a model's weights, by name, in the precision they are loaded in."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def difference(twin: Any, original: Any) -> Delta:
    """What the twin adds to the original; both in the precision the twin is stored in.

    Raises:
        ModelError: a native twin, whose coefficients are folded into its weights, or no twin at all.
    """
    if not saved_blocks(twin):
        raise ModelError(
            "only a custom-code twin has a delta form",
            where=type(twin).__name__,
            cause="a native twin folds its coefficients into new weights, so nothing of the original's blocks is left",
            fix="convert with --readout keep --form custom",
        )
    theirs = original.state_dict()
    blocks = {block.path: block for block in survey(original).blocks}
    block_of = {name: saved.path for saved in saved_blocks(twin) for name in saved.matrices}
    tensors: dict[str, Tensor] = {}
    derived: dict[str, dict[str, Any]] = {}
    stored: set[int] = set()  # of tied weights one is enough: what is written to it is written to all
    for name, value in twin.state_dict().items():
        if value.data_ptr() in stored:
            continue
        if name in theirs and theirs[name].shape == value.shape and torch.equal(theirs[name], value):
            continue
        matrices = blocks[block_of[name]].matrices() if name in block_of else []
        places = [{"name": matrix, "rows": rows} for matrix, rows in matrices]
        for source in ({**place, "transposed": turned} for place in places for turned in (False, True)):
            found = _relation(value, _view(theirs, source))
            if found is not None:
                derived[name] = source
                tensors |= {f"{part}:{name}": kept for part, kept in found.items()}
                break
        else:
            tensors[f"full:{name}"] = value.contiguous()
            stored.add(value.data_ptr())
    return Delta(tensors, derived)


def _view(state: Mapping[str, Tensor], source: Mapping[str, Any]) -> Tensor:
    value = state[source["name"]]
    value = value if source["rows"] is None else value[slice(*source["rows"])]
    return value.T if source["transposed"] else value


def _relation(ours: Tensor, theirs: Tensor) -> dict[str, Tensor] | None:
    """How `ours` grew out of `theirs`: scale, rows and columns, as far as needed; None where it did not."""
    height, width = theirs.shape
    if ours.dim() != 2 or ours.shape[0] < height or ours.shape[1] < width:
        return None
    core = ours[:height, :width]
    found: dict[str, Tensor] = {}
    if not torch.equal(core, theirs):
        scale = _row_scale(core, theirs)
        if scale is None:
            return None
        found["scale"] = scale
    if ours.shape[0] > height:
        found["rows"] = ours[height:].contiguous()
    if ours.shape[1] > width:
        found["columns"] = ours[:height, width:].contiguous()
    return found


def _row_scale(ours: Tensor, theirs: Tensor) -> Tensor | None:
    """s with ours = theirs ÷ s after rounding, row by row, float64; None where there is none.

    Every element bounds s to the interval whose quotients round to it; the middle of what all allow is taken, and
    believed only if it gives every bit.
    """
    w, t = theirs.double().abs(), ours.double().abs()
    infinity = torch.full_like(ours, torch.inf)
    above = torch.nextafter(ours.abs(), infinity).double()
    below = torch.nextafter(ours.abs(), -infinity).double()
    used = (w > 0) & (t > 0)
    least = torch.where(used, w / ((t + above) / 2), 0.0).amax(1)
    most = torch.where(used, w / ((t + below) / 2), torch.inf).amin(1)
    scale = torch.where(used.any(1), (least + most) / 2, 1.0)
    if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
        return None
    return scale if torch.equal(_divided(theirs, scale), ours) else None


def _divided(theirs: Tensor, scale: Tensor) -> Tensor:
    """As conversion rounds: to the precision it computes in, then to the stored one."""
    exact = theirs.double() / scale[:, None]
    return exact if theirs.dtype == torch.float64 else exact.float().to(theirs.dtype)


def apply_delta(original: Any, config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Turns the original, loaded in the twin's stored precision, into the twin; it is changed in place.

    Raises:
        ModelError: these are not the weights the delta was taken from, or its format is newer than this package.
    """
    described = getattr(config, KEY)
    if described["format"] > FORMAT:
        raise ModelError(f"this delta has format {described['format']}; this version reads up to {FORMAT}")
    if weights_sha256(original) != described["sha256"]:
        raise ModelError(
            "the original's weights are not those this delta was taken from",
            where=str(getattr(original.config, "_name_or_path", "")),
            cause="another model, or another revision of it",
            fix=f"the original is {described['base']} at revision {described['revision'] or 'unknown'}",
        )
    theirs = original.state_dict()
    for block in map(saved_block, config.polynomial_blocks):
        device = next(original.get_submodule(layer_of(block.path)).parameters()).device
        for path, module in block.empty().items():
            for name, empty in module.state_dict().items():
                value = _restored(f"{path}.{name}", theirs, tensors, described["derived"])
                *inner, leaf = name.split(".")
                holder = module.get_submodule(".".join(inner))
                setattr(holder, leaf, torch.nn.Parameter(value.reshape(empty.shape).to(device)))
            modeling_polynomial.install(original, path, module.train(False))
    ours = original.state_dict()
    with torch.no_grad():
        for key, value in tensors.items():
            part, _, name = key.partition(":")
            if part == "full":
                ours[name].copy_(value)
    final = copy.deepcopy(config)
    delattr(final, KEY)
    final._attn_implementation = original.config._attn_implementation
    final.dtype = original.config.dtype
    original.__class__ = modeling_polynomial.model_class_for(final)
    original.config = final
    return original


def _restored(
    name: str, theirs: Mapping[str, Tensor], tensors: Mapping[str, Tensor], derived: Mapping[str, Any]
) -> Tensor:
    """One tensor of the twin."""
    if f"full:{name}" in tensors:
        return tensors[f"full:{name}"].clone()
    value = _view(theirs, derived[name]) if name in derived else theirs[name]
    scale, rows, columns = (tensors.get(f"{part}:{name}") for part in ("scale", "rows", "columns"))
    if scale is not None:
        value = _divided(value, scale.to(value.device))
    if columns is not None:
        value = torch.cat([value, columns.to(value)], dim=1)
    if rows is not None:
        value = torch.cat([value, rows.to(value)])
    return value.contiguous()
