"""A step of refinement against a plain fine-tuning step of the original, on the same batches: tokens a second.

    python benchmarks/refining.py TWIN --original MODEL [--rounds 7]

Rounds alternate; ratios are taken within rounds. The plain step trains all of the original's weights on the text's next
token, with the same optimiser, precision and bound on the gradient; the steps of a refinement keep the mean of the
weights too, as it does by default.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator

from surgery.models import loading
from surgery.refining.kept_predictions import KeptPredictions
from surgery.refining.objectives import EndToEnd, NextToken
from surgery.refining.packing import PackedWindows
from surgery.refining.parameters import named_trainable, twin_block_paths
from surgery.refining.run import refine_settings
from surgery.refining.student import load_teacher, ready_student
from surgery.runtime.freed_memory import keep_freed_memory
from surgery.runtime.precision import autocast

TOP_K = 64
WARM = 2  # rounds that are not counted


def distillation(settings, accelerator, train: str, kept=None):
    """One batch forward and backward, and the optimiser, of a twin whose parameters `train` are trained."""
    twin = loading.loaded(settings.twin).model
    teacher = load_teacher(settings, twin).to(accelerator.device)
    blocks = twin_block_paths(twin)
    trainee = ready_student(settings, accelerator, (twin, twin, teacher), set(named_trainable(twin, train)), blocks)
    precision = partial(autocast, settings.dtype, accelerator.device, cached=True)
    paths = [path for path, _ in blocks]
    mean = {name: value.detach().clone() for name, value in trainee.trainable.items()}
    return EndToEnd(accelerator, trainee.network, teacher, precision, twin, paths, kept=kept), trainee, mean


def fine_tuning(settings, accelerator):
    """The same of the original, all of whose weights are trained."""
    original = loading.loaded(settings.original).model
    still = loading.loaded(settings.original).model.to(accelerator.device)
    trainee = ready_student(
        settings, accelerator, (original, original, still), set(named_trainable(original, "all")), ()
    )
    precision = partial(autocast, settings.dtype, accelerator.device, cached=True)
    return NextToken(accelerator, trainee.network, precision), trainee, {}


def step_of(objective, trainee, part: PackedWindows, mean: dict[str, torch.Tensor]) -> None:
    objective(part)
    objective.accelerator.clip_grad_norm_(list(trainee.trainable.values()), 1.0)
    trainee.optimizer.step()
    for name, value in mean.items():
        value.lerp_(trainee.trainable[name].detach(), 0.02)
    trainee.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("twin")
    parser.add_argument("--original", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    settings = refine_settings(options.twin, options.original, "nothing is written")
    accelerator = Accelerator()
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    words = loading.load_config(settings.original).get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, settings.window)
    part = PackedWindows(torch.randint(0, words, shape, generator=generator), None)
    folder = tempfile.TemporaryDirectory()
    kept = KeptPredictions(Path(folder.name), "benchmark", part, TOP_K)
    steps = {
        "fine-tuning, all weights of the original": fine_tuning(settings, accelerator),
        "refinement, blocks (the default)": distillation(settings, accelerator, "block"),
        f"… of windows that come again, top {TOP_K}": distillation(settings, accelerator, "block", kept),
        "refinement, readouts": distillation(settings, accelerator, "readout"),
    }

    def seconds(objective, trainee, mean) -> float:
        begun = time.perf_counter()
        step_of(objective, trainee, part.numbered(torch.arange(len(part))), mean)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    rounds = [{name: seconds(*one) for name, one in steps.items()} for _ in range(WARM + options.rounds)]
    seen, plain = rounds[WARM:], next(iter(steps))
    rows = []
    print(f"{settings.batch} windows of {settings.window} tokens a step, {options.rounds} rounds")
    for name in steps:
        ratios = sorted(row[name] / row[plain] for row in seen)
        rate = settings.batch * settings.window / median(row[name] for row in seen)
        rows.append({"step": name, "tokens_per_second": rate, "time_over_fine_tuning": ratios})
        print(f"{name:42}{rate:8.0f} tokens/s   {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) × the time")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
