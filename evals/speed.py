"""Speed and size: twin against original, alternating in one run, as a ratio with its spread."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.runtime.weights_on_disk import device_of

PREFILL_TOKENS, DECODE_TOKENS, ROUNDS = 256, 16, 5
WEIGHT_FILES = (".safetensors", ".bin", ".gguf")


def compare_speed(original: Any, twin: Any, seed: int = 0, rounds: int = ROUNDS) -> dict[str, Any]:
    """Tokens per second of prefill and of cached decoding, FLOPs per token, parameters, peak memory on an accelerator.

    Rounds alternate between the models, so that what else the machine does hits both; ratios are taken within rounds.
    """
    generator = torch.Generator().manual_seed(seed)
    text = original.config.get_text_config()
    length = min(PREFILL_TOKENS, (getattr(text, "max_position_embeddings", None) or PREFILL_TOKENS) - DECODE_TOKENS)
    prompt = torch.randint(text.vocab_size, (1, length), generator=generator)
    models = {"original": original, "twin": twin}
    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in models} for kind in ("prefill", "decode")}
    peaks = dict.fromkeys(models, 0)
    with torch.no_grad():
        for round_number in range(-1, rounds):  # the first is for warming up
            for name, model in models.items():
                _reset_peak(model)
                prefill, decode = _one_round(model, prompt.to(device_of(model)))
                if round_number >= 0:
                    times["prefill"][name].append(length / prefill)
                    times["decode"][name].append(DECODE_TOKENS / decode)
                peaks[name] = max(peaks[name], _peak(model))
        flops = {name: _flops(model, prompt.to(device_of(model))) / length for name, model in models.items()}
    return {
        **{f"{kind}_tokens_per_second": _ratios(**values) for kind, values in times.items()},
        "rounds": rounds,
        "flops_per_token": {**flops, "ratio": flops["twin"] / flops["original"]},
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "peak_accelerator_bytes": peaks if any(peaks.values()) else None,
        "device": str(device_of(twin)),
        "dtype": str(next(twin.parameters()).dtype),
    }


def _one_round(model: Any, prompt: Tensor) -> tuple[float, float]:
    begun = _now(model)
    state = model(input_ids=prompt, use_cache=True)
    prefilled = _now(model)
    for _ in range(DECODE_TOKENS):
        token = state.logits[:, -1:].argmax(-1)
        state = model(input_ids=token, past_key_values=state.past_key_values, use_cache=True)
    return prefilled - begun, _now(model) - prefilled


def _now(model: Any) -> float:
    if device_of(model).type == "cuda":
        torch.cuda.synchronize(device_of(model))
    return time.perf_counter()


def _reset_peak(model: Any) -> None:
    if device_of(model).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device_of(model))


def _peak(model: Any) -> int:
    return torch.cuda.max_memory_allocated(device_of(model)) if device_of(model).type == "cuda" else 0


def _ratios(original: list[float], twin: list[float]) -> dict[str, float]:
    """Both rates and their ratio in the round whose ratio is the median, and the range of the ratio over the rounds."""
    ratios = [after / before for before, after in zip(original, twin, strict=True)]
    middle = sorted(range(len(ratios)), key=ratios.__getitem__)[(len(ratios) - 1) // 2]
    return {
        "original": original[middle],
        "twin": twin[middle],
        "ratio": ratios[middle],
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def _flops(model: Any, prompt: Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(input_ids=prompt, use_cache=False)
    return float(counter.get_total_flops())


def weight_bytes(name: str) -> int | None:
    """Size of the weight files of a local model; None for one on the Hub."""
    path = Path(name).expanduser()
    files = [path] if path.is_file() else [file for file in path.glob("*") if file.suffix in WEIGHT_FILES]
    return sum(file.stat().st_size for file in files) or None
