"""What a twin loses when torchao stores its linear maps in eight bits or fewer, beside what its original loses so.

    python benchmarks/quantised.py TWIN --original MODEL [--text python] [--tokens 4096]     # pip install torchao

Nats a token on text that a conversion from the same source has not read, before and after.
"""

import argparse
import copy

import torch
import torchao.quantization as ao

from surgery.calibration.texts import tokens_of
from surgery.calibration.windows import sequences
from surgery.losses import perplexity
from surgery.models import loading
from surgery.runtime.settings import whole_number

WINDOW = 256
CONFIGS = {
    "int8 weights": ao.Int8WeightOnlyConfig,
    "int8 weights and activations": ao.Int8DynamicActivationInt8WeightConfig,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("twin")
    parser.add_argument("--original", required=True)
    parser.add_argument("--text", default="python")
    parser.add_argument("--tokens", type=whole_number, default=4096)
    options = parser.parse_args()
    for name in (options.original, options.twin):
        loaded = loading.loaded(name)
        ids = tokens_of(options.text, loaded.text_tokenizer, 4 * options.tokens)[-options.tokens :]
        batches = [{"input_ids": batch} for batch in sequences(ids, WINDOW).split(4)]
        before = perplexity(loaded.model, batches).nats
        print(f"{name}: {before:.4f} nats a token", flush=True)
        for how, config in CONFIGS.items():
            model = copy.deepcopy(loaded.model)
            with torch.no_grad():
                ao.quantize_(model, config())
                print(f"  {how}: {perplexity(model, batches).nats - before:+.4f}", flush=True)


if __name__ == "__main__":
    main()
