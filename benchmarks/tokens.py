"""How many calibration tokens are enough? Nats lost on the same unseen end of a text, by degree and tokens.

    python benchmarks/tokens.py MODEL [--text python] [--sizes 8192,32768,98304] [--degrees 2,3] [--plot FILE]

The calibration tokens are the beginning of the text, so the larger sets hold the smaller ones.
"""

import argparse
import json
import tempfile
import time

import torch

import surgery
from surgery.calibration.texts import tokens_of
from surgery.losses import perplexity
from surgery.models import loading
from surgery.runtime.settings import whole_number

WINDOW = 512


def draw(rows: list[dict], file: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for degree, marker in zip(sorted({row["degree"] for row in rows}), "osD^", strict=False):
        points = [(row["tokens"], row["nats_lost"]) for row in rows if row["degree"] == degree]
        axes.loglog(*zip(*points, strict=True), marker=marker, label=f"degree {degree}")
    axes.set(xlabel="calibration tokens", ylabel="nats lost on unseen text")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", default="python")
    parser.add_argument("--sizes", default="8192,32768,98304")
    parser.add_argument("--degrees", default="2,3")
    parser.add_argument("--measure", type=whole_number, default=8192)
    parser.add_argument("--plot")
    parser.add_argument("--epochs", type=int, help="as for `surgery convert`; 0: the closed form alone")
    options = parser.parse_args()
    sizes, degrees = ([int(part) for part in given.split(",")] for given in (options.sizes, options.degrees))
    original = loading.loaded(options.model)
    ids = tokens_of(options.text, original.tokenizer, max(sizes) + options.measure)
    assert len(ids) == max(sizes) + options.measure, f"the text has {len(ids)} tokens only"
    unseen = [{"input_ids": part} for part in ids[max(sizes) :].view(-1, WINDOW).split(4)]
    before = perplexity(original.model, unseen)
    print(f"original: {before.nats:.4f} nats on {before.tokens} tokens")
    rows = []
    for degree in degrees:
        for tokens in sizes:
            started = time.monotonic()
            with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
                file.write(original.tokenizer.decode(ids[:tokens]))
                file.flush()
                settings = {"tokens": tokens, "degree": degree, "epochs": options.epochs}
                twin, _ = surgery.convert(options.model, text=file.name, window=WINDOW, measure=0, **settings)
            seconds = time.monotonic() - started
            lost = perplexity(twin, unseen).nats - before.nats
            rows.append({"degree": degree, "tokens": tokens, "nats_lost": lost, "seconds": seconds})
            print(f"degree {degree}, {tokens:7d} tokens: {lost:+.4f} nats, {seconds:.0f} s", flush=True)
            if options.plot:
                draw(rows, options.plot)
    print(json.dumps(rows))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
