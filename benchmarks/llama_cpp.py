"""A twin's GGUF file in llama.cpp: its perplexity beside transformers', and its speed beside the original's file.

    python benchmarks/llama_cpp.py TWIN FILE.gguf --original MODEL.gguf [--text python] [--tokens 4096]

The engine gives the last hidden state of every token; logits and perplexity follow from those by the file's own head.
Speed is tokens a second of a prompt of 256 tokens and of 64 new ones, each file in turn, the median of five.
"""

import argparse
import json
import statistics
import urllib.request

import gguf
import torch
import xllamacpp

import surgery
from surgery.calibration.texts import tokens_of
from surgery.calibration.windows import sequences
from surgery.losses import perplexity
from surgery.models import loading
from surgery.runtime.settings import whole_number

WINDOW, PROMPT, NEW, TIMES = 256, 256, 64, 5


class Engine:
    """llama.cpp with a file; `states`: for hidden states instead of text."""

    def __init__(self, file: str, states: bool = False) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = file
        params.n_ctx = params.n_batch = params.n_ubatch = 2 * WINDOW
        params.warmup = False
        params.cache_prompt = False
        if states:
            params.embedding = True
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **body):
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self.server.listening_address + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
            return json.load(response)

    def hidden(self, ids: list[int]) -> torch.Tensor:
        """After the last norm, (tokens, d)."""
        found = self.post("/embedding", content=ids, embd_normalize=-1)
        return torch.tensor(found[0]["embedding"])

    def speed(self, ids: list[int]) -> tuple[float, float]:
        """Tokens a second, of the prompt and of new ones."""
        done = self.post("/completion", prompt=ids, n_predict=NEW, temperature=0.0, ignore_eos=True, cache_prompt=False)
        return done["timings"]["prompt_per_second"], done["timings"]["predicted_per_second"]


def head_of(file: str) -> torch.Tensor:
    """The unembedding as the file stores it, (vocabulary, d); the embedding's where they are one."""
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    stored = held.get("output.weight", held["token_embd.weight"])
    return torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("twin")
    parser.add_argument("file")
    parser.add_argument("--original", required=True, metavar="FILE.gguf")
    parser.add_argument("--text", default="python")
    parser.add_argument("--tokens", type=whole_number, default=4096)
    options = parser.parse_args()
    twin = surgery.load(options.twin)
    ids = tokens_of(options.text, loading.loaded(options.twin).tokenizer, options.tokens)
    windows = sequences(ids, WINDOW)
    there = perplexity(twin, [{"input_ids": rows} for rows in windows.split(4)]).nats
    engine, head, nats = Engine(options.file, states=True), head_of(options.file), 0.0
    for row in windows:
        logits = engine.hidden(row.tolist()) @ head.T
        nats += float(torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum"))
    here = nats / (len(windows) * (WINDOW - 1))
    del engine
    both = f"transformers {there:.4f}, llama.cpp {here:.4f} ({here - there:+.4f})"
    print(f"nats a token on {windows.numel():,} tokens: {both}")
    engines = {"twin": Engine(options.file), "original": Engine(options.original)}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for _ in range(TIMES):
        for name, engine in engines.items():
            seen[name].append(engine.speed(windows[0].tolist()))
    for name, pairs in seen.items():
        prompt, new = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name}: {prompt:.0f} tokens a second of a prompt, {new:.1f} new ones")


if __name__ == "__main__":
    main()
