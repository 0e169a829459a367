"""Twin against original: prefill and cached decoding, by form, eager and with compiled feed-forward blocks.

    python benchmarks/inference.py MODEL [--rounds 7] [--no-compile]

Speed does not depend on what the weights are, so the twins are the closed form under N(0, I), which needs no
calibration. Rounds alternate between the models; ratios are taken within rounds and printed with their range.
"""

import argparse
import json

import torch

import surgery
from evals.speed import compare_speed
from surgery.errors import RecipeError
from surgery.loading import load

FORMS = (
    ("native, degree 2", {"degree": 2, "form": "native"}),
    ("custom, degree 2", {"degree": 2, "form": "custom"}),
    ("custom, degree 3", {"degree": 3}),
)


def twin_of(name: str, dtype: str, settings: dict):
    model = load(name, dtype=dtype).model
    ids = torch.randint(100, 1000, (4, 128), generator=torch.Generator().manual_seed(0))
    twin, report = surgery.convert(model, calibration=ids, assume="standard", length=128, **settings)
    return twin.eval(), [row["path"] for row in report.blocks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    rows = []
    print(f"{'':28}{'prefill, twin ÷ original':>34}{'decode, twin ÷ original':>34}")
    for compiled in (False,) if options.no_compile else (False, True):
        for name, settings in FORMS:
            original = load(options.model, dtype=options.dtype).model
            try:
                twin, paths = twin_of(options.model, options.dtype, settings)
            except RecipeError:
                continue  # an architecture without a native form
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
