"""Fewer units: nats against parameters and speed, beside magnitude pruning of the original at the same size.

    python benchmarks/units.py MODEL --text FILE [--tokens 32768] [--shares 1 0.75 0.5]

Calibrated on the text's first tokens, measured on 4,096 tokens after them. Magnitude pruning keeps the units of largest
‖gate row‖·‖up row‖·‖down column‖ and solves nothing again. Both are stock checkpoints of the same widths.
"""

import argparse
import json

import torch

import surgery
from evals.speed import compare_speed
from surgery.blocks.find import survey
from surgery.calibration.texts import tokens_of
from surgery.calibration.windows import sequences
from surgery.losses import perplexity
from surgery.models import loading
from surgery.runtime.settings import whole_number

MEASURED, LENGTH = 4096, 512


def pruned(name: str, share: float):
    """The original with its largest units."""
    model = surgery.load(name)
    with torch.no_grad():
        for block in survey(model).blocks:
            gate, up = (model.get_submodule(path) for path in block.first)
            down = model.get_submodule(block.last)
            size = gate.weight.norm(dim=1) * up.weight.norm(dim=1) * down.weight.norm(dim=0)
            kept = size.topk(round(share * block.hidden)).indices.sort().values
            for part in (gate, up):
                part.weight = torch.nn.Parameter(part.weight[kept])
            down.weight = torch.nn.Parameter(down.weight[:, kept])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=whole_number, default=32768)
    parser.add_argument("--shares", type=float, nargs="*", default=[1.0, 0.75, 0.5])
    parser.add_argument("--epochs", type=int, help="as for `surgery convert`; 0: the closed form alone")
    options = parser.parse_args()
    loaded = loading.loaded(options.model)
    ids = tokens_of(options.text, loaded.tokenizer, options.tokens + MEASURED)
    fit, fresh = sequences(ids[: options.tokens], LENGTH), sequences(ids[options.tokens :], LENGTH)
    batches = [{"input_ids": rows} for rows in fresh.split(4)]
    base = perplexity(loaded.model, batches).nats
    rows = []
    print(f"{'units':>6}{'parameters':>14}{'twin, nats':>12}{'magnitude, nats':>17}{'prefill':>9}{'decode':>8}")
    for share in options.shares:
        settings = {"units": share, "epochs": options.epochs}
        twin, _ = surgery.convert(surgery.load(options.model), text=fit, quiet=False, **settings)
        speed = compare_speed(loaded.model, twin)
        row = {
            "share": share,
            "parameters": sum(p.numel() for p in twin.parameters()),
            "twin": perplexity(twin, batches).nats - base,
            "magnitude": perplexity(pruned(options.model, share), batches).nats - base,
            **{kind: speed[f"{kind}_tokens_per_second"] for kind in ("prefill", "decode")},
        }
        rows.append(row)
        print(
            f"{share:>6.2f}{row['parameters']:>14,}{row['twin']:>+12.4f}{row['magnitude']:>+17.4f}"
            f"{row['prefill']['ratio']:>9.2f}{row['decode']['ratio']:>8.2f}",
            flush=True,
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
