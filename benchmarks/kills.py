"""Kills convert, refine, eval and export at random moments, repeats the same command, and compares the results.

    python benchmarks/kills.py MODEL [--kills 5] [--seed 0] [--text python]

MODEL is a small model with a tokenizer. Each command is run once undisturbed; then, `--kills` times, begun anew, killed
(SIGKILL) at a random moment of that time, and run to its end. Weights must be equal byte for byte, losses to the last
digit, and nothing but the output may be left beside it. What a conversion's finished blocks write is computed anew when
it goes on, so that its twin may differ by rounding: what it predicts must be the same to a ten-thousandth, with float32
products. A row per command; exit code 1 where something differs.
"""

from __future__ import annotations

import argparse
import json
import operator
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from surgery.models import loading
from surgery.runtime.files import sha256

ROUNDING = 1e-4  # of a conversion's logits
CHANGING = ("seconds", "reused", "speed", "versions")  # of a report, from run to run


def started(arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "surgery", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finished(arguments: list[str]) -> float:
    """Seconds that a command took to its end. Raises SystemExit where it failed."""
    begun = time.monotonic()
    process = started(arguments)
    _, said = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"surgery {' '.join(arguments)} ended with {process.returncode}:\n{said.decode()[-2000:]}")
    return time.monotonic() - begun


def killed(arguments: list[str], after: float) -> bool:
    """Begins a command and kills it; False where it was done before."""
    process = started(arguments)
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True


def weights(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in folder.glob("*.safetensors")}


def logits(folder: Path) -> torch.Tensor:
    """Of a twin, on ids one after another."""
    model: Any = loading.loaded(str(folder)).model
    with torch.no_grad():
        found: torch.Tensor = model(
            input_ids=torch.arange(128)[None] % model.config.get_text_config().vocab_size
        ).logits
    return found


def same_but_for_rounding(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(torch.dist(one, other) <= ROUNDING * one.norm())


def losses(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "evaluation.json").read_text())
    return {key: value for key, value in found.items() if key not in CHANGING}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", default="python")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    text = ["--text", options.text]
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        twin = root / "twin"
        convert = ["convert", options.model, "--text", options.text, "--tokens", "4096", "--window", "32"]
        convert += ["--matmul", "float32"]
        finished([*convert, "-o", str(twin)])
        refine = ["refine", str(twin), "--original", options.model, *text, "--tokens", "8192", "--window", "32"]
        refine += ["--batch", "2", "--validate-tokens", "256", "--validate-every", "20"]
        evaluate = ["eval", str(twin), "--original", options.model, *text, "--tokens", "2048", "--window", "32"]
        evaluate += ["--no-speed", "--cache", str(root / "cache")]
        commands: dict[str, tuple[list[str], Callable[[Path], Any], Callable[[Any, Any], bool]]] = {
            "convert": (convert, logits, same_but_for_rounding),
            "refine": (refine, weights, operator.eq),
            "eval": (evaluate, losses, operator.eq),
            "export": (["export", str(twin), "--form", "silu"], weights, operator.eq),
        }
        good = True
        print(f"{'command':10}{'undisturbed, s':>16}{'killed':>8}{'same':>6}{'left over':>11}")
        for name, (arguments, result, alike) in commands.items():
            out = root / "work" / name
            run = [*arguments, "-o", str(out)]
            usual = finished(run)
            expected, same, hits, left = result(out), 0, 0, 0
            for _ in range(options.kills):
                shutil.rmtree(out.parent)
                shutil.rmtree(root / "cache", ignore_errors=True)
                out.parent.mkdir()
                hits += killed(run, moments.uniform(0, usual))
                finished([*run, "--overwrite"] if out.exists() and name != "eval" else run)
                same += alike(expected, result(out))
                left += sum(file != out for file in out.parent.iterdir())
            print(f"{name:10}{usual:>16.1f}{hits:>8}{same:>6}{left:>11}", flush=True)
            good = good and same == options.kills and not left
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
