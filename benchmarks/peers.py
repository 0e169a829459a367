"""The closed form against simpler routes to polynomial blocks, on the same tokens: time, memory, nats lost.

    python benchmarks/peers.py MODEL [--text python] [--tokens 16384]

The simpler routes store the inputs and outputs of all blocks in one forward pass over the calibration tokens, and fit
every block on them by itself with `torch.linalg.lstsq`, which is what a page of code does:

    linear map       of the block's output on its input (of whole layers: ReplaceMe, Shopkhoev et al., arXiv 2505.02819)
    one polynomial   in the place of the activation, of least squares on the block's preactivations, the maps kept: how
                     networks are made ready for encrypted inference; 1 + its degree is the degree of a gated block
    … and readout    the last map solved again for the units so changed

Every route runs in a process of its own, on the same windows, in float32 (`--matmul auto`: ours as it is by default);
memory is the peak above that of the model. The dense route over all monomials is in benchmarks/coefficients.py: at
these widths it has no answer.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time

import torch
from torch import nn

import surgery
from surgery.blocks.find import survey
from surgery.calibration.texts import tokens_of
from surgery.losses import perplexity
from surgery.models import loading
from surgery.models.modeling_polynomial import install
from surgery.runtime.settings import whole_number

WINDOW, BATCH = 512, 8
ROUTES = {
    "original": ("nothing", None),
    "linear map, lstsq": ("linear", 1),
    "degree 1, closed form": ("surgery", {"degree": 1}),
    "one polynomial, degree 2": ("polynomial", 1),
    "… and readout, lstsq": ("readout", 1),
    "degree 2, closed form": ("surgery", {"degree": 2, "epochs": 0}),
    "degree 2, with descent": ("surgery", {"degree": 2}),
    "one polynomial, degree 3": ("polynomial", 2),
    "… and readout, lstsq ": ("readout", 2),
    "degree 3, closed form": ("surgery", {"degree": 3}),
}
KIB = 1 if sys.platform != "darwin" else 1 / 1024  # of ru_maxrss


class Linear(nn.Module):
    def __init__(self, solution):
        super().__init__()
        self.solution = nn.Parameter(solution)

    def forward(self, x):
        return x @ self.solution[:-1] + self.solution[-1]


class OnePolynomial(nn.Module):
    """σ replaced by a polynomial, and the readout by another where one is given."""

    def __init__(self, weights, coefficients, readout=None):
        super().__init__()
        self.weights, self.coefficients, self.readout = weights, coefficients, readout

    def hidden(self, x):
        y, z = self.weights.preactivations(x)
        value = torch.zeros_like(y)
        for coefficient in self.coefficients.flip(0):
            value = torch.addcmul(coefficient, value, y)
        return value if z is None else value * z

    def forward(self, x):
        hidden = self.hidden(x)
        if self.readout is None:
            return nn.functional.linear(hidden, *self.weights.down)
        return hidden @ self.readout[:-1] + self.readout[-1]


def powers(y, degree: int):
    return torch.stack([y**k for k in range(degree + 1)], dim=-1)


def with_one(x):
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


def replaced_simply(model, ids, kind: str, degree: int) -> None:
    blocks = survey(model).blocks
    assert blocks and all(block.whole for block in blocks), "only models whose blocks are modules of their own"
    inputs, outputs = ({block.path: [] for block in blocks} for _ in range(2))

    def store(path):
        def hook(_, args, output):
            inputs[path].append(args[0].flatten(0, -2))
            outputs[path].append(output.flatten(0, -2))

        return hook

    hooks = [model.get_submodule(block.path).register_forward_hook(store(block.path)) for block in blocks]
    for part in ids.split(BATCH):
        model.base_model(input_ids=part, use_cache=False)
    for hook in hooks:
        hook.remove()
    for block in blocks:
        x, wanted = torch.cat(inputs.pop(block.path)), torch.cat(outputs.pop(block.path))
        if kind == "linear":
            module = Linear(torch.linalg.lstsq(with_one(x), wanted).solution)
        else:
            weights = block.weights(block.modules(model))
            y, _ = weights.preactivations(x)
            some = y[:: max(1, len(y) // 512)].flatten()  # 3 numbers need no more than some hundred thousand values
            fitted = torch.linalg.lstsq(powers(some, degree), weights.activation.function(some)[:, None]).solution[:, 0]
            module = OnePolynomial(weights, fitted)
            if kind == "readout":
                module.readout = torch.linalg.lstsq(with_one(module.hidden(x)), wanted).solution
        install(model, block.path, module)


def measure(name: str, text: str, tokens: int, unseen_tokens: int, matmul: str, route: str) -> dict:
    """One route; run in a fresh process, since a process's peak memory never falls."""
    loaded = loading.loaded(name)
    model, (kind, how) = loaded.model, ROUTES[route]
    ids = tokens_of(text, loaded.text_tokenizer, tokens + unseen_tokens)
    ids, unseen = (part.view(-1, WINDOW) for part in (ids[:tokens], ids[tokens:]))
    batches = [{"input_ids": part} for part in unseen.split(BATCH)]
    memory, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with torch.no_grad():
        if kind == "surgery":
            model = surgery.convert(model, text=ids, window=WINDOW, batch=BATCH, measure=0, matmul=matmul, **how)[0]
        elif kind != "nothing":
            replaced_simply(model, ids, kind, how)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    nats = perplexity(model, batches).nats
    return {"route": route, "seconds": seconds, "gib": peak * KIB / 2**20, "nats": nats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", default="python")
    parser.add_argument("--tokens", type=whole_number, default=16384)
    parser.add_argument("--measure", type=whole_number, default=8192)
    parser.add_argument("--matmul", default="float32", help="of ours, as for `surgery convert`")
    options = parser.parse_args()
    rows = []
    print(f"{'':28}{'seconds':>9}{'GiB':>7}{'nats lost':>11}")
    for route in ROUTES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            given = options.model, options.text, options.tokens, options.measure, options.matmul, route
            rows.append(row := pool.apply(measure, given))
        row["nats_lost"] = row["nats"] - rows[0]["nats"]
        print(f"{route:28}{row['seconds']:9.1f}{row['gib']:7.2f}{row['nats_lost']:+11.3f}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
