"""How faithful the twin's outputs are: token by token, against the original on the same windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.text import MeasuredText
from evals.uncertainty import bootstrap_ratio
from surgery.errors import EvaluationError
from surgery.runtime.weights_on_disk import device_of

POSITIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
WORST_TOKENS = 20
LOGITS = 1 << 22  # numbers of one model that are turned to log-probabilities at once


@dataclass(frozen=True)
class TokenFidelity:
    """Per predicted token, shape (windows, length − 1) each.

    Attributes:
        original, twin: −log p(token | its window so far), nats.
        divergence: KL(original ‖ twin) of the next-token distributions, nats.
        agree: whether both rank the same token first.
    """

    original: Tensor
    twin: Tensor
    divergence: Tensor
    agree: Tensor

    @staticmethod
    def join(parts: list[TokenFidelity]) -> TokenFidelity:
        return TokenFidelity(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TokenFidelity)))


def compare_tokens(original: Any, twin: Any, windows: Tensor) -> TokenFidelity:
    """Runs both models over `windows`, (rows, length)."""
    rows: dict[str, list[Tensor]] = {"original": [], "twin": [], "divergence": [], "agree": []}
    with torch.no_grad():
        ids = windows.to(device_of(original))
        first = original(input_ids=ids, use_cache=False).logits
        second = twin(input_ids=windows.to(device_of(twin)), use_cache=False).logits.to(first.device)
        # Some tokens at a time, since logits are the largest tensors here.
        some = max(1, LOGITS // first.shape[-1])
        for window in zip(first[:, :-1], second[:, :-1], ids[:, 1:], strict=True):
            for one, two, target in zip(*(part.split(some) for part in window), strict=True):
                p, q = one.float().log_softmax(-1), two.float().log_softmax(-1)
                rows["original"].append(-p.gather(-1, target[:, None])[:, 0])
                rows["twin"].append(-q.gather(-1, target[:, None])[:, 0])
                rows["divergence"].append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
                rows["agree"].append(p.argmax(-1) == q.argmax(-1))
    shape = ids[:, 1:].shape
    result = TokenFidelity(**{name: torch.cat(values).view(shape).cpu() for name, values in rows.items()})
    if not bool(result.twin.isfinite().all()):
        raise EvaluationError(
            "the twin's predictions hold NaN or infinite values",
            cause="a polynomial left the range it was fitted on, or the precision is too low",
            fix="evaluate with --dtype float32; if that does not help, convert again with --tail-weight 0.01",
        )
    return result


def summary(found: TokenFidelity, text: MeasuredText, tokenizer: Any | None = None, seed: int = 0) -> dict[str, Any]:
    """The `text` part of a report: perplexities, nats lost with its interval, divergence, where the loss sits."""
    fresh = text.fresh
    counts = fresh.sum(1)

    def over_windows(values: Tensor) -> dict[str, Any]:
        return bootstrap_ratio((values.double() * fresh).sum(1), counts, seed).as_dict()

    lost = found.twin.double() - found.original.double()
    nats = {"original": over_windows(found.original), "twin": over_windows(found.twin)}
    result: dict[str, Any] = {
        **text.as_dict(),
        "nats": nats,
        "perplexity": {name: float(torch.tensor(value["value"]).double().exp()) for name, value in nats.items()},
        "nats_lost": over_windows(lost),
        "divergence": over_windows(found.divergence),
        "top1_agreement": over_windows(found.agree.double()),
        "by_position": _by_position(lost, found.divergence, fresh),
    }
    if text.text_bytes:
        per_byte = text.tokens / text.text_bytes / torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
        result["bits_per_byte"] = {name: value["value"] * per_byte for name, value in nats.items()}
    if tokenizer is not None:
        result["worst_tokens"] = _worst_tokens(lost, text, tokenizer)
    return result


def _by_position(lost: Tensor, divergence: Tensor, fresh: Tensor) -> list[dict[str, Any]]:
    place = torch.arange(1, lost.shape[1] + 1).expand_as(lost)
    rows = []
    for low, high in zip(POSITIONS, (*POSITIONS[1:], 10**9), strict=True):
        chosen = fresh & (place >= low) & (place < high)
        if chosen.any():
            last = min(high - 1, lost.shape[1])
            rows.append(
                {
                    "from": low,
                    "to": last,
                    "tokens": int(chosen.sum()),
                    "nats_lost": float(lost[chosen].mean()),
                    "divergence": float(divergence[chosen].double().mean()),
                }
            )
    return rows


def _worst_tokens(lost: Tensor, text: MeasuredText, tokenizer: Any) -> list[dict[str, Any]]:
    """Which tokens carry the loss: those with the largest share of the summed nats lost."""
    ids, values = text.windows[:, 1:][text.fresh], lost[text.fresh]
    size = int(ids.max()) + 1
    totals = torch.bincount(ids, weights=values, minlength=size)
    counts = torch.bincount(ids, minlength=size)
    whole = float(values.sum())
    return [
        {
            "token": tokenizer.decode([index]),
            "id": index,
            "count": int(counts[index]),
            "nats_lost_each": float(totals[index] / counts[index]),
            "share": float(totals[index]) / whole if whole else 0.0,
        }
        for index in totals.topk(min(WORST_TOKENS, size)).indices.tolist()
        if counts[index]
    ]


def compare_outputs(original: Any, twin: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For models that predict no next token: cosine and relative error of the first output, per vector, float64."""
    with torch.no_grad():
        before, after = (_first(model, inputs) for model in (original, twin))
    mask = inputs.get("attention_mask")
    before, after = before.flatten(0, -2).double().cpu(), after.flatten(0, -2).double().cpu()
    if mask is not None and mask.numel() == len(before):
        before, after = before[mask.flatten().bool()], after[mask.flatten().bool()]
    return {
        "cosine": F.cosine_similarity(before, after, dim=-1),
        "relative_error": (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-300),
    }


def _first(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    output: Tensor = model(**{name: value.to(device_of(model)) for name, value in inputs.items()})[0]
    return output


def outputs_summary(parts: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Mean and quantiles over all vectors of :func:`compare_outputs`."""
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    points: Callable[[Tensor], list[float]] = lambda v: v.quantile(v.new_tensor([0.05, 0.5, 0.95])).tolist()  # noqa: E731
    return {
        "vectors": len(joined["cosine"]),
        **{name: {"mean": float(v.mean()), "quantiles_5_50_95": points(v)} for name, v in joined.items()},
    }
