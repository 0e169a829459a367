"""Sparse dictionaries (SAEs and transcoders) as bases: read from their files, applied, never trained here.

A dictionary of n features says x̂ = Σ_i a_i(x) d_i + shift, few a_i other than 0:

    relu       a = relu(z),  z = x Wₑ + bₑ              jumprelu   a = z where z > max(θ, 0), else 0
    topk       a = relu(z) of the k largest             abstopk    a = z of the k largest in magnitude
    gated      a = relu(x (Wₑ ⊙ e^r) + b_m) where x Wₑ + b_g > 0

with x less b_d first where the dictionary says so. A transcoder reads a block's input and says its output.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.errors import RecipeError, first_line
from surgery.reading.activations import Activations

CHUNK = 1024  # tokens that are encoded at once
CONFIG = "cfg.json"
WEIGHTS = ("sae_weights.safetensors", "sae.safetensors")  # SAELens's, sparsify's
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
KINDS = {"standard": "relu", "topk": "topk", "abstopk": "abstopk", "jumprelu": "jumprelu", "gated": "gated"}
KINDS |= {name: "jumprelu" if "jumprelu" in name else "relu" for name in TRANSCODERS}
FOLDED = ("none", "expected_average_only_in", "covariance_whitening")  # what SAELens applies nothing for at run time
SCALED = ("constant_norm_rescale", "layer_norm")


@dataclass(frozen=True)
class Encoded:
    """A text in a dictionary: x̂ = activations · decoder + shift.

    Attributes:
        activations: a, (tokens, n); in units of the vectors that were encoded.
        shift: what does not depend on the features: b_d, scaled back where the dictionary scales, (tokens, out).
    """

    activations: Activations
    shift: Tensor


@dataclass(frozen=True)
class Dictionary:
    """A dictionary of n features for vectors of width d, float32.

    Attributes:
        name: its file or folder.
        kind: how a follows from z: relu, topk, abstopk, jumprelu or gated.
        encoder, bias: Wₑ, (d, n), and bₑ, (n,); of the gate, where it is gated.
        decoder, offset: the features' directions d_i, (n, out), and b_d, (out,).
        kept: k of topk and abstopk.
        threshold: θ of jumprelu, (n,).
        magnitude: e^r and b_m of gated, (n,) each.
        centred: whether b_d is taken from x first.
        scaling: how x is scaled before, one of `SCALED`, or none.
        transcodes: reads a block's input and says its output.
        skip: linear map from that input to that output beside the features, (out, d), or None.
    """

    name: str
    kind: str
    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    offset: Tensor
    kept: int = 0
    threshold: Tensor | None = None
    magnitude: tuple[Tensor, Tensor] | None = None
    centred: bool = True
    scaling: str = "none"
    transcodes: bool = False
    skip: Tensor | None = None

    @property
    def size(self) -> int:
        """n."""
        return self.encoder.shape[1]

    @property
    def width(self) -> int:
        """d."""
        return self.encoder.shape[0]

    def encode(self, x: Tensor) -> Encoded:
        """Vectors (tokens, d) in features, `CHUNK` tokens at a time."""
        shifts: list[Tensor] = []

        def parts() -> Iterator[Tensor]:
            for rows in x.split(CHUNK):
                a, shift = self._encoded(rows.to(self.encoder))
                shifts.append(shift)
                yield a

        activations = Activations.of(parts())
        return Encoded(activations, torch.cat(shifts))

    def reconstructed(self, x: Tensor) -> Tensor:
        """x̂ for vectors (tokens, d), their activations not kept, (tokens, out)."""
        return torch.cat([self.decode(self.encode(rows), rows) for rows in x.split(CHUNK)])

    def decode(self, encoded: Encoded, x: Tensor) -> Tensor:
        """x̂ for the vectors that were encoded, (tokens, out)."""
        found = encoded.activations.times(self.decoder) + encoded.shift
        return found if self.skip is None else found + x.to(self.skip) @ self.skip.T

    def _encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(activations, shift) of some tokens."""
        scale, mean = x.new_ones(len(x), 1), x.new_zeros(len(x), 1)
        if self.scaling == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / x.shape[1] ** 0.5
        elif self.scaling == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            scale = (x - mean).std(-1, keepdim=True) + 1e-5  # as SAELens has it
        inner = (x - mean) / scale - (self.offset if self.centred else 0)
        activations = self._active(inner)
        if self.transcodes:
            return activations, self.offset.expand(len(x), -1)
        return activations * scale, self.offset * scale + mean

    def _active(self, inner: Tensor) -> Tensor:
        z = inner @ self.encoder + self.bias
        if self.kind == "gated":
            assert self.magnitude is not None
            size, bias = self.magnitude
            return (inner @ (self.encoder * size) + bias).relu() * (z > 0)
        if self.kind == "jumprelu":
            assert self.threshold is not None
            return z.relu() * (z > self.threshold)
        if self.kind == "relu":
            return z.relu()
        order = (z.abs() if self.kind == "abstopk" else z).topk(min(self.kept, z.shape[1])).indices
        found = torch.zeros_like(z).scatter(-1, order, z.gather(-1, order))
        return found if self.kind == "abstopk" else found.relu()


def explained_share(wanted: Tensor, found: Tensor) -> float:
    """R² = 1 − Σ‖v − v̂‖² ÷ Σ‖v − v̄‖² over rows."""
    away = wanted - wanted.mean(0)
    return float(1 - (wanted - found).square().sum() / away.square().sum().clamp_min(1e-300))


def read_dictionary(path: str | Path) -> Dictionary:
    """A dictionary from its files.

    Args:
        path: a folder of SAELens (cfg.json, sae_weights.safetensors) or sparsify (cfg.json, sae.safetensors); or one
            .safetensors or .npz file with W_enc, b_enc, W_dec, b_dec, and threshold where it is a JumpReLU (then, as in
            Gemma Scope's params.npz, b_dec is not taken from x first; in one without it is).

    Raises:
        RecipeError: nothing there, an unknown kind, tensors missing, of other shapes or not finite.
    """
    place = Path(path).expanduser()
    config, weights = _files(place)
    settings = _settings(config)
    tensors = {name: tensor.float() for name, tensor in _tensors(weights).items()}
    if "encoder.weight" in tensors:  # sparsify keeps torch's linear map
        tensors |= {"W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"]}
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors["log_threshold"].exp()
    kind = _kind(settings, tensors, place)
    needed = ["W_enc", "W_dec", "b_dec", *(["b_gate", "r_mag", "b_mag"] if kind == "gated" else ["b_enc"])]
    needed += ["threshold"] if kind == "jumprelu" else []
    if missing := [name for name in needed if name not in tensors]:
        raise RecipeError(
            f"a dictionary without {', '.join(missing)}",
            where=str(weights),
            cause=f"it holds {', '.join(sorted(tensors)) or 'nothing'}",
            fix="give a folder of SAELens or sparsify, or a file with W_enc, b_enc, W_dec and b_dec",
        )
    transcodes = bool(settings.get("transcode")) or settings.get("architecture") in TRANSCODERS
    encoder, decoder, bias = tensors["W_enc"], tensors["W_dec"], tensors["b_gate" if kind == "gated" else "b_enc"]
    if settings.get("rescale_acts_by_decoder_norm"):  # features in units of their directions' lengths: the same vectors
        length = decoder.norm(dim=-1)
        encoder, bias, decoder = encoder * length, bias * length, decoder / length[:, None]
    found = Dictionary(
        name=place.name,
        kind=kind,
        encoder=encoder.contiguous(),
        bias=bias,
        decoder=decoder.contiguous(),
        offset=tensors["b_dec"],
        kept=int(settings.get("k") or 0),
        threshold=tensors.get("threshold") if kind == "jumprelu" else None,
        magnitude=(tensors["r_mag"].exp(), tensors["b_mag"]) if kind == "gated" else None,
        centred=not transcodes and bool(settings.get("apply_b_dec_to_input", bool(settings) or kind != "jumprelu")),
        scaling=_scaling(settings, place),
        transcodes=transcodes,
        skip=tensors.get("W_skip"),
    )
    _check(found, weights)
    return found


def _files(place: Path) -> tuple[Path | None, Path]:
    """(its configuration, if there is one; its tensors)."""
    if place.is_file() and place.suffix in (".safetensors", ".npz"):
        config = place.with_name(CONFIG)
        return (config if config.is_file() else None), place
    if place.is_dir() and (place / CONFIG).is_file():
        for name in WEIGHTS:
            if (place / name).is_file():
                return place / CONFIG, place / name
    inside = sorted(path.parent for path in place.glob(f"*/{CONFIG}")) if place.is_dir() else []
    raise RecipeError(
        "no dictionary here",
        where=str(place),
        cause=f"it holds several, {', '.join(path.name for path in inside[:4])}" if inside else "",
        fix=f"name one of them, as {inside[0]}"
        if inside
        else f"give a folder with {CONFIG} and {' or '.join(WEIGHTS)}, or a .safetensors or .npz file",
    )


def _settings(config: Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        assert isinstance(found, dict)
    except (ValueError, AssertionError, OSError) as error:
        raise RecipeError(f"cannot be read: {first_line(error)}", where=str(config)) from error
    # Before its version 6 SAELens named the activation by itself.
    activation = found.get("activation_fn", found.get("activation_fn_str"))
    if activation == "topk":
        found |= {"architecture": "topk", "k": (found.get("activation_fn_kwargs") or {}).get("k", found.get("k"))}
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".npz":
            import numpy as np

            return {name: torch.from_numpy(value) for name, value in np.load(path).items() if value.dtype.kind == "f"}
        from safetensors.torch import load_file

        found: dict[str, Tensor] = load_file(path)
        return found
    except Exception as error:
        raise RecipeError(f"the dictionary cannot be read: {first_line(error)}", where=str(path)) from error


def _kind(settings: dict[str, Any], tensors: dict[str, Tensor], place: Path) -> str:
    """How activations follow, by what the configuration says, or by the tensors where there is none."""
    named = settings.get("architecture")
    if named is None and "activation" in settings:  # sparsify
        named = settings["activation"]
    if named is None:
        named = "jumprelu" if "threshold" in tensors else "topk" if settings.get("k") else "standard"
    if named not in KINDS:
        raise RecipeError(
            f"a dictionary of an unknown kind, {named!r}", where=str(place), fix=f"known are {', '.join(KINDS)}"
        )
    if KINDS[named] in ("topk", "abstopk") and not settings.get("k"):
        raise RecipeError("a TopK dictionary that does not say its k", where=str(place / CONFIG))
    return KINDS[named]


def _scaling(settings: dict[str, Any], place: Path) -> str:
    named = settings.get("normalize_activations") or "none"
    if isinstance(named, bool):
        named = "expected_average_only_in"
    if named not in FOLDED + SCALED:
        raise RecipeError(f"normalize_activations: {named!r} is unknown", where=str(place / CONFIG))
    return named if named in SCALED else "none"


def _check(found: Dictionary, where: Path) -> None:
    n, out = found.decoder.shape
    vectors = {"bias": found.bias, "threshold": found.threshold}
    vectors |= dict(zip(("r_mag", "b_mag"), found.magnitude or (), strict=False))
    shapes = f"W_enc {tuple(found.encoder.shape)}, W_dec {tuple(found.decoder.shape)}"
    wrong = [name for name, value in vectors.items() if value is not None and value.shape != (n,)]
    if found.size != n or found.offset.shape != (out,) or wrong or (found.width != out and not found.transcodes):
        raise RecipeError(
            f"tensors that do not fit together: {shapes}" + (f", {', '.join(wrong)}" if wrong else ""),
            where=str(where),
            fix="W_enc is (d, n), W_dec (n, d), biases are vectors",
        )
    if not all(bool(value.isfinite().all()) for value in (found.encoder, found.bias, found.decoder, found.offset)):
        raise RecipeError("the dictionary holds values that are not finite", where=str(where))
