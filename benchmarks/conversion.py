"""What converting costs, and how that grows: time over one plain forward pass on the same tokens, and peak memory.

Random Llama models; one of tokens, width, depth and degree is varied at a time. Every point is a process of its own, in
which a forward pass, the conversion and a second forward pass follow each other; the ratio is to the passes' mean.

    python benchmarks/conversion.py [--plot docs/conversion.png]
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time

BASE = {"tokens": 16384, "width": 256, "depth": 4, "degree": 2}
VARIED = {
    "tokens": (4096, 8192, 16384, 32768),
    "width": (128, 256, 512),
    "depth": (2, 4, 8),
    "degree": (1, 2, 3, 4),
}
LENGTH, BATCH = 256, 8
KIB = 1 if sys.platform != "darwin" else 1 / 1024  # of ru_maxrss


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / 1024


def measure(tokens: int, width: int, depth: int, degree: int, epochs: int | None = None) -> dict:
    """One point; run in a fresh process, since a process's peak memory never falls."""
    import torch
    import transformers

    import surgery

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=depth,
        num_attention_heads=width // 64, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(4, 1024, (tokens // LENGTH, LENGTH))

    def forward() -> float:
        begun = time.perf_counter()
        with torch.no_grad():
            for batch in ids.split(BATCH):
                model.model(batch, use_cache=False)  # the head is not needed to calibrate
        return time.perf_counter() - begun

    forward()
    first, before = forward(), peak_mib()
    _, report = surgery.convert(
        model, text=ids, degree=degree, window=LENGTH, batch=BATCH, epochs=epochs if degree > 1 else None
    )
    seconds, peak = report.seconds["convert"], peak_mib()
    second = forward()
    return {
        "ratio": seconds / ((first + second) / 2),
        "seconds": seconds,
        "forward": (first, second),
        "peak_mib_above_forward": peak - before,
        "model_mib": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20,
    }


def plot(rows: list[dict], file: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(2, len(VARIED), sharey="row")
    for column, (name, values) in enumerate(VARIED.items()):
        mine = [row for row in rows if row["varied"] == name]
        axes[0][column].plot(values, [row["ratio"] for row in mine], "o-")
        axes[1][column].plot(values, [row["peak_mib_above_forward"] for row in mine], "o-")
        axes[1][column].set_xlabel(name)
        for row in (0, 1):
            axes[row][column].spines[["top", "right"]].set_visible(False)
    for row in (0, 1):
        axes[row][0].set_ylim(bottom=0)  # at the end: it fixes the range of all that share the axis
    axes[0][0].set_ylabel("conversion ÷ forward pass")
    axes[1][0].set_ylabel("MiB above a forward pass")
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", help="PNG to write")
    parser.add_argument("--epochs", type=int, help="as for `surgery convert`; 0: the closed form alone")
    options = parser.parse_args()
    rows = []
    print(f"{'varied':>8}{'value':>8}{'÷ forward':>11}{'seconds':>9}{'above a forward pass':>22}{'model':>10}")
    for name, values in VARIED.items():
        for value in values:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = {
                    "varied": name,
                    "value": value,
                    **pool.apply(measure, kwds={**BASE, name: value, "epochs": options.epochs}),
                }
            rows.append(row)
            print(
                f"{name:>8}{value:>8}{row['ratio']:>11.2f}{row['seconds']:>9.1f}"
                f"{row['peak_mib_above_forward']:>18.0f} MiB{row['model_mib']:>6.0f} MiB",
                flush=True,
            )
    if options.plot:
        plot(rows, options.plot)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
