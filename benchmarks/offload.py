"""Peak memory of a conversion whose weights stay on disk: a random Llama, or a Mixtral, written a shard at a time, then
converted.

    python benchmarks/offload.py [--width 1024] [--hidden 2816] [--depth 48] [--tokens 1024]
    python benchmarks/offload.py --width 4096 --hidden 11008 --depth 32      # the shape of Llama 2 7B
    python benchmarks/offload.py --experts 8 --depth 12                      # a mixture, two experts a token

Counts the anonymous memory of the converting process (Linux): files that it maps are the system's to drop. To see
that this is all it needs, let the system enforce a limit: `systemd-run --scope -p MemoryMax=6G python benchmarks/…`.
--folder keeps the model, and a killed conversion goes on in it.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH, BATCH, WORDS = 128, 4, 32000


def write_model(folder: Path, width: int, hidden: int, depth: int, experts: int) -> None:
    """A random checkpoint in bfloat16."""
    import torch
    import transformers
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    given = {
        "vocab_size": WORDS, "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": depth,
        "num_attention_heads": max(1, width // 128), "dtype": "bfloat16",
    }  # fmt: skip
    if experts:
        config = transformers.MixtralConfig(
            **given,
            num_local_experts=experts,
            num_key_value_heads=given["num_attention_heads"],
            architectures=["MixtralForCausalLM"],
        )
        model_class = transformers.MixtralForCausalLM
    else:
        config = transformers.LlamaConfig(**given, architectures=["LlamaForCausalLM"])
        model_class = transformers.LlamaForCausalLM
    with torch.device("meta"):
        state = {
            stored: part
            for name, value in model_class(config).to(torch.bfloat16).state_dict().items()
            for stored, part in as_published(name, value)
        }
    plan = split_torch_state_dict_into_shards(state, max_shard_size="500MB")
    for file, names in plan.filename_to_tensors.items():
        shard = {}
        for name in names:
            shape = state[name].shape
            values = torch.randn(shape) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)
            shard[name] = values.bfloat16()
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def as_published(name: str, value: Any) -> list[tuple[str, Any]]:
    """Mixtral's checkpoints hold every expert by itself."""
    if ".experts." not in name:
        return [(name.replace(".mlp.gate.", ".block_sparse_moe.gate."), value)]
    layer = name.split(".mlp.", maxsplit=1)[0]
    parts = {"w2": value} if name.endswith("down_proj") else dict(zip(("w1", "w3"), value.chunk(2, dim=1), strict=True))
    return [
        (f"{layer}.block_sparse_moe.experts.{number}.{part}.weight", weight)
        for part, stack in parts.items()
        for number, weight in enumerate(stack)
    ]


def convert(source: str, output: str, tokens: int, epochs: int | None) -> None:
    import torch

    import surgery

    ids = torch.randint(4, WORDS, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    surgery.convert(source, output=output, offload=True, text=ids, window=LENGTH, batch=BATCH, epochs=epochs)


def anonymous_mib(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return max((int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon")), default=0)


def started(target: Any, *args: Any) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 1024), ("hidden", 2816), ("depth", 48), ("experts", 0), ("tokens", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--epochs", type=int, help="as for `surgery convert`; 0: the closed form alone")
    parser.add_argument("--folder", type=Path, help="where to work and to leave the model and the twin")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        source = folder / "model"
        if not (source / "config.json").is_file():
            source.mkdir(parents=True, exist_ok=True)
            shape = (options.width, options.hidden, options.depth, options.experts)
            writer = started(write_model, source, *shape)  # in a process of its own: this one stays small
            writer.join()
            if writer.exitcode:
                raise SystemExit(writer.exitcode)
        stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        begun, peak = time.monotonic(), 0
        work = started(convert, str(source), str(folder / "twin"), options.tokens, options.epochs)
        while work.is_alive():
            peak = max(peak, anonymous_mib(work.pid or 0))
            time.sleep(0.1)
    seconds = time.monotonic() - begun
    print(f"{stored / 2**30:.1f} GiB in bfloat16, {stored / 2**29:.1f} in float32; peak {peak:,} MiB, {seconds:.0f} s")
    raise SystemExit(work.exitcode)


if __name__ == "__main__":
    main()
