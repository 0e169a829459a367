"""What a twin loses on kinds of text that it has not seen: nats and KL on each, mean and worst over them.

    KIND=SOURCE         a text source, see :mod:`surgery.calibration.texts`
    KIND=chat:SOURCE    its paragraphs as turns of a dialogue, in the tokenizer's chat template
    KIND=lines:SOURCE   every line by itself, after the start token: what short sentences are to a model

Whether a kind was seen is read from the twin's own record: the texts that its fit, its ridge or a training step read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evals.fidelity import TokenFidelity
from evals.memo import Memo
from evals.pair import Pair, token_fidelity
from evals.settings import CHAT, LINES, unseen
from evals.text import MeasuredText, cut, read
from evals.uncertainty import bootstrap_ratio, mean_of
from surgery.calibration.common_pile import KIND_OF
from surgery.calibration.samples import start_tokens
from surgery.calibration.texts import documents, label
from surgery.errors import EvaluationError, RecipeError
from surgery.runtime import processes
from surgery.runtime.progress import progress
from surgery.saving.report import read_report

BUILT_IN = {"manual": "python", "code": "code"}
"""Kinds of the sources that ship with Python."""
SHORTEST_TURN = 40  # characters
LONGEST_LINE = 64  # tokens


@dataclass(frozen=True)
class Kind:
    """One kind of text, as windows of token ids.

    Attributes:
        seen: "text" where the twin has read this source (what is measured here follows), "kind" where another text of
            the kind, "no" else.
    """

    name: str
    source: str
    text: MeasuredText
    seen: str


def compare_kinds(
    pair: Pair,
    twin: str,
    sources: Mapping[str, str],
    *,
    tokens: int = 4096,
    window: int = 512,
    batch: int = 4,
    seed: int = 0,
    seen: Collection[str] = (),
    unseen_by: Collection[str] = (),
    memo: Memo | None = None,
    quiet: bool = True,
) -> dict[str, Any] | None:
    """Compares a twin with its original on several kinds of text; under a launcher every process runs its share.

    Args:
        twin: its folder, for what its record says.
        sources: by kind, see the module.
        tokens: of every kind, in windows of `window`, or of what the model takes at most.
        seen: kinds that were seen, though the record cannot tell from the names of the texts.
        unseen_by: further twins, whose texts are passed over too.
        memo: where finished pieces are kept.
    Returns:
        `kinds`: a row each with `nats`, `nats_lost`, `divergence` (KL(original ‖ twin)) and their 95 % intervals;
        `unseen`: mean and worst over the kinds that the twin has not seen (None where it has seen all); nats a token.
        None on every process but the first.
    Raises:
        SurgeryError: models without a tokenizer, a source that cannot be read, or too little text.
    """
    if pair.tokenizer is None:
        raise EvaluationError("kinds of text need a tokenizer", where=twin)
    report, window = _record(twin), pair.window(window)
    if unknown := set(seen) - set(sources):
        raise RecipeError(f"no kind {min(unknown)!r} is measured", where="--seen")
    twins = (twin, *unseen_by)
    kinds = [_kind(name, source, twins, report, pair.tokenizer, tokens, window) for name, source in sources.items()]
    kinds = [replace(kind, seen="kind") if kind.seen == "no" and kind.name in seen else kind for kind in kinds]
    total = sum(len(kind.text.windows) for kind in kinds)
    rows = []
    with progress(total, "kinds of text", quiet or not processes.first()) as bar:
        for kind in kinds:
            found = token_fidelity(pair, kind.text, batch, memo or Memo(None), kind.name, bar)
            if found is not None:
                rows.append(_row(kind, found, seed))
    if not processes.first():
        return None
    return {"twin": Path(twin).name, "tokens": tokens, "window": window, "kinds": rows, "unseen": over_unseen(rows)}


def _record(twin: str) -> dict[str, Any]:
    try:
        return read_report(twin)
    except (OSError, KeyError, ValueError):
        raise EvaluationError("not a twin's folder", where=twin, fix="give the folder that convert wrote") from None


def _kind(
    name: str, given: str, twins: tuple[str, ...], report: Mapping[str, Any], tokenizer: Any, tokens: int, window: int
) -> Kind:
    form = next((form for form in (CHAT, LINES) if given.startswith(form)), "")
    source = given.removeprefix(form)
    skip, most = unseen(twins, source)
    if form == LINES:
        text = _lines(source, tokenizer, tokens)
    elif form == CHAT:
        ids = _dialogue(source, tokenizer, tokens + skip)[skip:]
        if len(ids) < window:
            raise EvaluationError(f"{len(ids)} tokens are fewer than one window of {window}", where=given)
        text = cut(ids, given, window, window, tokenizer)
    else:
        text = read(source, tokenizer, tokens=tokens if most is None else min(tokens, most), length=window, skip=skip)
    sources, kinds = _read_by(report)
    seen = "text" if label(source) in sources else "kind" if {name, f"{name}s", f"{name}es"} & kinds else "no"
    return Kind(name, label(source), replace(text, source=label(source)), seen)


def _read_by(report: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Labels and kinds of what the fit and all refinements have read."""
    calibration = report["calibration"]
    sources = {part["source"] for part in calibration.get("parts") or [calibration]}
    for refinement in [report.get("refinement"), *report.get("earlier_refinements", [])]:
        sources |= set((refinement or {}).get("held_out", {}))
    own = {source: kind for kind, source in BUILT_IN.items()} | KIND_OF
    return sources, {own.get(source, Path(source).stem) for source in sources}


def _dialogue(source: str, tokenizer: Any, tokens: int) -> Tensor:
    """Paragraphs as turns, four a conversation."""
    if not getattr(tokenizer, "chat_template", None):
        raise EvaluationError("the tokenizer has no chat template", where=f"{CHAT}{source}", fix="leave this kind out")
    turns = (part.strip() for text in documents(source) for part in text.replace("\r", "").split("\n\n"))
    ids: list[int] = []
    conversation: list[dict[str, str]] = []
    for turn in turns:
        if len(turn) < SHORTEST_TURN:
            continue
        conversation.append({"role": ("user", "assistant")[len(conversation) % 2], "content": turn})
        if len(conversation) == 4:
            text = tokenizer.apply_chat_template(conversation, tokenize=False)
            ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            conversation = []
        if len(ids) >= tokens:
            break
    return torch.tensor(ids[:tokens], dtype=torch.long)


def _lines(source: str, tokenizer: Any, tokens: int) -> MeasuredText:
    """A window for every line, filled up at the end; what fills up is not predicted."""
    rows: list[list[int]] = []
    start, left = start_tokens(tokenizer), tokens
    for line in (line.strip() for text in documents(source) for line in text.splitlines()):
        ids = tokenizer(line, add_special_tokens=False)["input_ids"][:LONGEST_LINE] if line else []
        if len(ids) > 1:
            rows.append([*start, *ids])
            left -= len(ids)
        if left <= 0:
            break
    if not rows:
        raise EvaluationError("no lines to measure on", where=source)
    longest = max(map(len, rows))
    windows = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows])
    fresh = torch.arange(1, longest)[None] < torch.tensor([len(row) for row in rows])[:, None]
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return MeasuredText(source, windows, fresh, longest, 0, digest)


def _row(kind: Kind, found: TokenFidelity, seed: int) -> dict[str, Any]:
    fresh = kind.text.fresh
    counts = fresh.sum(1)

    def over_windows(values: Tensor) -> dict[str, Any]:
        return bootstrap_ratio((values.double() * fresh).sum(1), counts, seed).as_dict()

    return {
        "kind": kind.name,
        "source": kind.source,
        "seen": kind.seen,
        "tokens": kind.text.tokens,
        "nats": {"original": over_windows(found.original), "twin": over_windows(found.twin)},
        "nats_lost": over_windows(found.twin.double() - found.original.double()),
        "divergence": over_windows(found.divergence),
        "fingerprint": kind.text.fingerprint,
    }


def unseen_by_all(compared: Iterable[Mapping[str, Any]]) -> set[str]:
    """The kinds that none of several twins has seen, from what :func:`compare_kinds` found for each."""
    rows = [row for found in compared for row in found["kinds"]]
    return {row["kind"] for row in rows} - {row["kind"] for row in rows if row["seen"] != "no"}


def over_unseen(rows: list[dict[str, Any]], kinds: Collection[str] | None = None) -> dict[str, Any] | None:
    """Mean and worst of the kinds that were not seen, or of these `kinds`; None where there are none."""
    chosen = [row for row in rows if (row["seen"] == "no" if kinds is None else row["kind"] in kinds)]
    if not chosen:
        return None
    worst = max(chosen, key=lambda row: row["nats_lost"]["value"])
    return {
        "kinds": len(chosen),
        "mean": mean_of([row["nats_lost"] for row in chosen]).as_dict(),
        "worst": worst["nats_lost"] | {"kind": worst["kind"]},
        "divergence": mean_of([row["divergence"] for row in chosen]).as_dict(),
    }
