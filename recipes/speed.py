"""What converting costs: its time over one plain forward pass on the same tokens, and its memory above the model's.

Usage: python recipes/speed.py MODEL [TOKENS] [DEGREE] [EPOCHS]. Forward pass, conversion, forward pass, in one run; the
ratio is to the mean of the two passes, which are printed to show the machine's own spread.
"""

import os
import resource
import sys
import time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

import surgery
from surgery.calibration.inputs import calibration_inputs
from surgery.models import loading

GIB = 2**20 if sys.platform != "darwin" else 2**30  # ru_maxrss counts kilobytes on Linux


def forward_seconds(model, batches) -> float:
    begun = time.monotonic()
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    return time.monotonic() - begun


def main(name: str, tokens: int = 32768, degree: int = 2, epochs: int | None = None) -> None:
    loaded = loading.loaded(name)
    data = calibration_inputs("python", loaded.model, loaded.tokenizer, tokens=tokens, length=512, batch=8)
    first = forward_seconds(loaded.model, data.batches)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ids = torch.cat([batch["input_ids"] for batch in data.batches])
    twin, report = surgery.convert(loaded.model, text=ids, degree=degree, epochs=epochs, measure=0, quiet=False)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    second = forward_seconds(twin, data.batches)
    seconds = report.seconds["convert"]
    print(f"forward {first:.1f} s (original), {second:.1f} s (twin); conversion {seconds:.1f} s, degree {degree}")
    print(
        f"ratio {seconds / ((first + second) / 2):.2f} on {data.tokens:,} tokens; peak memory +{memory / GIB:.2f} GiB"
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
