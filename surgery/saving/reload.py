"""A saved twin is believed once a fresh process has read it and computed the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from surgery.errors import CheckpointError

PROBE_ROWS, PROBE_LENGTH = 2, 32


def probe_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A small piece of a calibration batch: few examples, and of texts their beginnings."""
    ids = {name: batch[name].shape for name in ("input_ids", "decoder_input_ids") if name in batch}
    return {
        name: value[:PROBE_ROWS, :PROBE_LENGTH].contiguous()
        if value.shape[:2] in ids.values()
        else value[:PROBE_ROWS].contiguous()
        for name, value in batch.items()
    }


def main_output(outputs: Any) -> Tensor:
    """Logits, else the last hidden state, else the first tensor."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(outputs, name, None)
        if isinstance(value, Tensor):
            return value
    return next(value for value in outputs.values() if isinstance(value, Tensor))


TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Relative norm of the difference in outputs: rounding of the stored weights, carried through the depth of a model.
A block left at random initial values gives 1 or more."""


def verify_saved(model: Any, folder: Path, probe: Mapping[str, Tensor], dtype: str, form: str) -> dict[str, Any]:
    """:func:`verified`, by what the model in memory computes on the probe."""
    with torch.no_grad():
        expected = main_output(model(**{name: value.to(model.device) for name, value in probe.items()}))
    return verified(folder, probe, expected, dtype, form)


def verified(
    folder: Path, probe: Mapping[str, Tensor], expected: Tensor, dtype: str, form: str, on_disk: bool = False
) -> dict[str, Any]:
    """What a fresh process sees of a saved twin.

    Args:
        on_disk: leave the weights on disk there.
    Raises:
        CheckpointError: keys missing or left over, or other outputs than `expected`.
    """
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "probe.safetensors"
        write_probe(file, probe, expected.float().cpu())
        (seen,) = reload_elsewhere([(folder, file, form)], on_disk)
    if "error" in seen:
        raise CheckpointError(f"the saved twin does not load in a fresh process:\n{seen['error']}", where=str(folder))
    if seen["missing"] or seen["unexpected"] or not seen["difference"] <= TOLERANCE[dtype]:
        raise CheckpointError(
            f"the saved twin differs from the one in memory: {seen}",
            where=str(folder),
            cause="the architecture keeps something that its checkpoint does not",
        )
    return {"verified": True, "form": form, **seen}


def write_probe(file: Path, probe: Mapping[str, Tensor], expected: Tensor, **more: Tensor) -> None:
    """What :mod:`surgery.saving.reload_check` compares a folder with."""
    # Cloned: inputs that share memory, as a decoder's and an encoder's may, cannot be stored as they are.
    tensors = {f"input.{name}": value.clone() for name, value in probe.items()}
    save_file({**tensors, **more, "expected": expected.contiguous()}, file)


def reload_elsewhere(checks: Sequence[tuple[Path, Path, str]], on_disk: bool = False) -> list[dict[str, Any]]:
    """Loads (folder, probe file, form) in one fresh process without this package; what was seen of each."""
    script = Path(__file__).with_name("reload_check.py")
    arguments = ["--on-disk"] if on_disk else []
    arguments += [part for folder, file, form in checks for part in (str(folder.resolve()), str(file.resolve()), form)]
    with tempfile.TemporaryDirectory() as place:
        environment = {**os.environ, "HF_MODULES_CACHE": place, "HF_HUB_OFFLINE": "1"}
        if on_disk:  # glibc, too, should give freed matrices back, as `loading` has it do here
            environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=place)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    seen: list[dict[str, Any]] = [json.loads(line) for line in lines]
    if len(seen) < len(checks):
        tail = "\n".join(done.stderr.strip().splitlines()[-3:])
        if done.returncode < 0:
            tail = f"the process was killed (signal {-done.returncode}), for memory most likely"
        seen += [{"error": tail or "the process ended early"}] * (len(checks) - len(seen))
    return seen


def probe_ids(model: Any) -> dict[str, Tensor]:
    """Tokens enough for a probe, the same for every model of this vocabulary; shape (2, 16)."""
    return {"input_ids": torch.arange(2 * 16, device=model.device).view(2, 16) % model.config.vocab_size}
