"""Writes a twin as an ordinary transformers checkpoint, and believes it only after a fresh process has read it.

The folder is written under a temporary name beside the target, verified there, and renamed: what stands under the
target's name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from surgery.errors import CheckpointError

REPORT = "surgery.json"
SHARD = "500MB"  # of a checkpoint put together from files: what is in memory at once
PROBE_ROWS, PROBE_LENGTH = 2, 32


def check_target(out: Path, overwrite: bool) -> Path:
    """`out` from the root. Raises CheckpointError unless it may be written: absent, empty, or an earlier twin to be
    overwritten."""
    out = Path(os.path.abspath(out))  # "." has no name to put others beside
    blocking = next((parent for parent in out.parents if parent.exists() and not parent.is_dir()), None)
    if blocking is not None:
        raise CheckpointError(
            "a file stands in the way of the output folder", where=str(blocking), fix="choose another -o"
        )
    if not out.exists():
        return out
    if not out.is_dir():
        raise CheckpointError("the output exists and is not a folder", where=str(out), fix="choose another -o")
    if not any(out.iterdir()):
        return out
    if not (out / REPORT).is_file():
        raise CheckpointError(
            "the output folder exists and was not made by this tool",
            where=str(out),
            cause=f"it holds files but no {REPORT}",
            fix="choose another -o; nothing in it was touched",
        )
    if not overwrite:
        raise CheckpointError(
            "the output folder already holds a twin", where=str(out), fix="choose another -o, or give --overwrite"
        )
    return out


def write_json(path: Path, value: Any) -> None:
    """Atomically: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def save(
    model: Any,
    tokenizer: Any | None,
    out: Path,
    report: Mapping[str, Any],
    probe: Mapping[str, Tensor],
    dtype: str = "float32",
    native: bool = False,
    verify: bool = True,
) -> dict[str, Any]:
    """Saves, reloads in a fresh process, compares, renames.

    Args:
        probe: inputs of one small forward pass, for the comparison.
        dtype: precision of the stored weights.
        native: reload without this package and without trusting code; else with `trust_remote_code=True`.
    Returns:
        what the verification saw (also written into the report).
    Raises:
        CheckpointError: not writable, disk full, keys missing or left over, other logits. Nothing is left behind.
    """
    with whole_folder(out) as temporary:
        _write(model, tokenizer, temporary, dtype)
        seen = _verify(model, temporary, probe, dtype, native) if verify else {"verified": False}
        write_report(temporary, report, seen)
    return seen


def write_report(folder: Path, report: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
    """`surgery.json`, with what the verification saw and the weights it saw it of."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.onnx*")]
    weights = {file.name: sha256(file) for file in sorted(files)}
    write_json(folder / REPORT, {**report, "verification": {**seen, "weights": weights}})


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the body ends well, and is removed when it does not.

    Raises:
        CheckpointError: not writable, or the disk is full.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors keeps its files to their owner
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint could not be written: {error.strerror or error}",
            where=str(out),
            cause="the disk is full, or the folder is not writable",
            fix="free some space or choose another -o, then run the same command: finished blocks are kept",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    except Exception as error:  # safetensors reports a full disk by an exception of its own
        raise OSError(str(error)) from error
    finally:
        model.config.dtype = before
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = dtype
    write_json(folder / "config.json", config)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def sha256(file: Path) -> str:
    """Of a file's bytes, as the Hub records large files."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


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


def _verify(model: Any, folder: Path, probe: Mapping[str, Tensor], dtype: str, native: bool) -> dict[str, Any]:
    with torch.no_grad():
        expected = main_output(model(**{name: value.to(model.device) for name, value in probe.items()}))
    return verified(folder, probe, expected, dtype, native)


def verified(
    folder: Path, probe: Mapping[str, Tensor], expected: Tensor, dtype: str, native: bool, on_disk: bool = False
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
        (seen,) = reload_elsewhere([(folder, file, native)], on_disk)
    if "error" in seen:
        raise CheckpointError(f"the saved twin does not load in a fresh process:\n{seen['error']}", where=str(folder))
    if seen["missing"] or seen["unexpected"] or not seen["difference"] <= TOLERANCE[dtype]:
        raise CheckpointError(
            f"the saved twin differs from the one in memory: {seen}",
            where=str(folder),
            cause="the architecture keeps something that its checkpoint does not",
        )
    return {"verified": True, "form": "native" if native else "custom", **seen}


def write_probe(file: Path, probe: Mapping[str, Tensor], expected: Tensor, **more: Tensor) -> None:
    """What :mod:`surgery.reload_check` compares a folder with."""
    # Cloned: inputs that share memory, as a decoder's and an encoder's may, cannot be stored as they are.
    tensors = {f"input.{name}": value.clone() for name, value in probe.items()}
    save_file({**tensors, **more, "expected": expected.contiguous()}, file)


def reload_elsewhere(checks: Sequence[tuple[Path, Path, bool]], on_disk: bool = False) -> list[dict[str, Any]]:
    """Loads (folder, probe file, native) in one fresh process without this package; what was seen of each."""
    script = Path(__file__).with_name("reload_check.py")
    arguments = ["--on-disk"] if on_disk else []
    arguments += [
        part
        for folder, file, native in checks
        for part in (str(folder.resolve()), str(file.resolve()), "native" if native else "custom")
    ]
    with tempfile.TemporaryDirectory() as place:
        environment = {**os.environ, "HF_MODULES_CACHE": place, "HF_HUB_OFFLINE": "1"}
        if on_disk:  # glibc, too, should give freed matrices back, as `loading` has it do here
            environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            check=False, capture_output=True, text=True, env=environment, cwd=place,
        )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    seen: list[dict[str, Any]] = [json.loads(line) for line in lines]
    if len(seen) < len(checks):
        tail = "\n".join(done.stderr.strip().splitlines()[-3:])
        if done.returncode < 0:
            tail = f"the process was killed (signal {-done.returncode}), for memory most likely"
        seen += [{"error": tail or "the process ended early"}] * (len(checks) - len(seen))
    return seen
