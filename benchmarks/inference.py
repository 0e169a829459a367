"""Twin against original: prefill and cached decoding, by form, eager and with compiled feed-forward blocks.

    python benchmarks/inference.py MODEL [--rounds 7] [--no-compile]

First one block by itself, on 512 tokens and on one; then the whole model. Speed does not depend on what the weights
are, so the twins are the closed form under N(0, I), which needs no calibration. Rounds alternate between the models;
ratios are taken within rounds and printed with their quartiles (blocks) or range (models).
"""

import argparse
import json
from statistics import quantiles

import torch
from torch.utils.benchmark import Timer

import surgery
from evals.speed import compare_speed
from surgery.errors import RecipeError

FORMS = (
    ("native, degree 2", {"degree": 2, "form": "native"}),
    ("custom, degree 2", {"degree": 2, "form": "custom"}),
    ("custom, degree 3", {"degree": 3}),
)


def pairs(name: str, dtype: str):
    """(form, original, twin, paths of the blocks) of every form that the architecture has."""
    ids = torch.randint(100, 1000, (4, 128), generator=torch.Generator().manual_seed(0))
    for form, settings in FORMS:
        original, model = (surgery.load(name, dtype=dtype) for _ in range(2))
        try:
            twin, report = surgery.convert(model, text=ids, assume="standard", window=128, **settings)
        except RecipeError:
            continue  # no native form
        yield form, original, twin, [row["path"] for row in report.blocks]


def block_alone(original, twin, path: str, tokens: int, rounds: int) -> tuple[float, float, float]:
    """Quartiles of the twin's block's speed ÷ the original's, over `rounds` alternating rounds."""
    x = torch.randn(1, tokens, original.config.hidden_size, dtype=original.dtype)
    modules = [model.get_submodule(path) for model in (original, twin)]
    with torch.no_grad():
        timers = [
            Timer("module(x)", globals={"module": module, "x": x}, num_threads=torch.get_num_threads())
            for module in modules
        ]
        calls = max(5, round(0.1 / timers[0].timeit(5).mean))
        seen = [[timer.timeit(calls).mean for timer in timers] for _ in range(rounds)]
    low, middle, high = quantiles([before / after for before, after in seen], n=4)
    return low, middle, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--block-rounds", type=int, default=41)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    rows = []
    print(f"{'one block':28}{'512 tokens, twin ÷ original':>34}{'1 token, twin ÷ original':>34}")
    for name, original, twin, paths in pairs(options.model, options.dtype):
        found = {tokens: block_alone(original, twin, paths[0], tokens, options.block_rounds) for tokens in (512, 1)}
        rows.append({"form": name, "block": found})
        text = "".join(f"{middle:>14.3f} ({low:.3f} to {high:.3f})" for low, middle, high in found.values())
        print(f"{name:28}{text}")
    print(f"{'whole model':28}{'prefill, twin ÷ original':>34}{'decode, twin ÷ original':>34}")
    for compiled in (False,) if options.no_compile else (False, True):
        for name, original, twin, paths in pairs(options.model, options.dtype):
            if compiled:
                for model in (original, twin):
                    for path in paths:
                        model.get_submodule(path).compile(dynamic=True)
            seen = compare_speed(original, twin, rounds=options.rounds)
            rows.append({"form": name, "compiled": compiled, **seen})
            cells = [seen[f"{kind}_tokens_per_second"] for kind in ("prefill", "decode")]
            text = "".join(f"{c['ratio']:>14.3f} ({c['ratio_low']:.3f} to {c['ratio_high']:.3f})" for c in cells)
            print(f"{name + (', compiled' if compiled else ''):28}{text}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
