"""A twin beside its original, both loaded, and how faithful it is on one text; shared between the processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from evals.fidelity import TokenFidelity, compare_tokens
from evals.memo import Memo, model_fingerprint
from evals.text import MeasuredText
from surgery.errors import EvaluationError
from surgery.models import loading
from surgery.runtime import processes, weights_on_disk
from surgery.runtime.precision import chosen_dtype

CHUNK_WINDOWS = 64  # windows per kept piece: what a kill can cost


@dataclass(frozen=True)
class Pair:
    """Both models; whether they predict next tokens; the precision they compute in; their fingerprints."""

    original: loading.LoadedModel
    twin: loading.LoadedModel
    causal: bool
    dtype: str
    keys: dict[str, str]

    @property
    def tokenizer(self) -> Any:
        return self.original.tokenizer or self.twin.tokenizer or self.original.text_tokenizer

    def window(self, wanted: int) -> int:
        """Tokens of a window: as wanted, or what the model takes at most."""
        network: Any = self.original.model
        return min(wanted, getattr(network.config.get_text_config(), "max_position_embeddings", None) or wanted)


def load_pair(
    twin: str,
    original: str,
    *,
    revision: str | None = None,
    original_revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    device_map: str | None = None,
) -> Pair:
    """Both models where they are to compute. Raises EvaluationError where their tokenizers differ."""
    place = loading.placed(device)
    spread: Any = weights_on_disk.ON_DISK if device_map == "disk" else device_map
    dtype = processes.looked_up(lambda: chosen_dtype(dtype, place))
    options: dict[str, Any] = {"dtype": dtype, "device_map": spread}
    first = loading.loaded(original, original_revision, **options)
    second = loading.loaded(twin, revision, **options)
    models: list[Any] = [first.model, second.model]
    if device_map is None:
        for model in models:
            model.to(place)
    one, two = first.tokenizer, second.tokenizer
    if one is not None and two is not None and one.get_vocab() != two.get_vocab():
        raise EvaluationError(
            "the two models have different tokenizers, so their predictions cannot be compared token by token",
            where=f"{twin} and {original}",
            cause="the twin was made from another model",
            fix="name the model that the twin was converted from with --original",
        )
    keys = {
        "original": model_fingerprint(original, first.source.revision),
        "twin": model_fingerprint(twin, second.source.revision),
    }
    return Pair(first, second, all(map(loading.is_causal, models)), dtype, keys)


def token_fidelity(pair: Pair, text: MeasuredText, batch: int, memo: Memo, name: str, bar: Any) -> TokenFidelity | None:
    """Both models over a text, on the first process; every finished piece is kept.

    Args:
        batch: windows a forward pass.
        name: of the text, by which `memo` says what it had already.
        bar: a progress bar, moved on by windows.
    """
    first, second = pair.original.model, pair.twin.model
    parts = []
    for number, windows in enumerate(text.windows.split(CHUNK_WINDOWS)):
        key = ["tokens", pair.keys, pair.dtype, text.fingerprint, text.length, text.stride, CHUNK_WINDOWS, number]
        kept = processes.looked_up(partial(memo.find, name, key))
        if kept is not None:
            parts.append(TokenFidelity(**{field: torch.tensor(value) for field, value in kept.items()}))
            bar.update(len(windows))
            continue
        mine = []
        own = processes.own_rows(windows)
        for part in own.split(batch) if len(own) else ():
            mine.append(guarded(partial(compare_tokens, first, second, part)))
            bar.update(len(part) * processes.count())
        shares = processes.gather_to_first(mine)
        if shares is not None:
            whole = TokenFidelity.join([part for share in shares for part in share])
            memo.keep(key, {field: value.tolist() for field, value in vars(whole).items()})
            parts.append(whole)
    return TokenFidelity.join(parts) if processes.first() else None


def guarded(measure: Callable[[], Any], fix: str = "lower --batch or --window, or use --dtype bfloat16") -> Any:
    """What `measure` gives; an error with a next step where the device runs out of memory."""
    try:
        return measure()
    except torch.cuda.OutOfMemoryError as error:
        raise EvaluationError("the device is out of memory", fix=fix) from error
