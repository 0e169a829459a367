"""A model's own texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.calibration.texts import frame
from surgery.errors import CalibrationError

SAMPLED_TOGETHER = 64  # sequences


def start_tokens(tokenizer: Any) -> list[int]:
    """What a text begins with: what the tokenizer puts there, else its start token, else its end-of-text token."""
    before, _ = frame(tokenizer)
    if before:
        return before
    known = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return [token for token in known if token is not None][:1]


def sample(model: Any, tokenizer: Any, rows: int, length: int, batch: int = SAMPLED_TOGETHER) -> Tensor:
    """The model's own texts from their start tokens on, (rows, length) ids, at temperature 1; global random state."""
    start = [] if tokenizer is None else start_tokens(tokenizer)
    if not start or not hasattr(model, "generate") or not model.can_generate():
        raise CalibrationError("this model cannot generate text of its own", fix="give a text file with --calibration")
    from tqdm import tqdm

    drawn: list[Tensor] = []
    with tqdm(total=rows, desc=f"sampling {length} tokens", unit="seq", leave=False) as bar:
        while len(drawn) < rows:
            prompt = torch.tensor(start, device=model.device).expand(min(batch, rows - len(drawn)), -1)
            new = length - len(start)
            how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": start[0]}
            mask = torch.ones_like(prompt)
            out = model.generate(prompt, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, **how)
            drawn += list(out[:, :length].cpu())
            bar.update(len(out))
    return torch.stack(drawn)
