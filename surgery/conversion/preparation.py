"""All that stands before the first fit: what to replace, on which inputs, and what is checked on the way."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.blocks.block import Block
from surgery.blocks.find import Survey, survey
from surgery.blocks.verify import verify_each
from surgery.calibration.arrivals import first_token_size
from surgery.calibration.automatic import automatic
from surgery.calibration.inputs import Calibration, calibration_inputs, is_named
from surgery.calibration.mixtures import Mixture
from surgery.calibration.texts import AUTO, SAMPLES
from surgery.closed_form.moments import GaussianMixture
from surgery.conversion.measures import shared_perplexity
from surgery.conversion.memory import check_memory
from surgery.conversion.partial_run import kept_samples, model_identity
from surgery.conversion.recipe import Recipe
from surgery.conversion.selection import check_hooks, check_repeated, chosen_blocks, form_of
from surgery.conversion.task import ConversionTask
from surgery.errors import ModelError, RecipeError
from surgery.losses import Perplexity
from surgery.models import loading, modeling_polynomial
from surgery.models.as_llama import as_llama
from surgery.models.loading import is_causal
from surgery.runtime import processes, weights_on_disk
from surgery.runtime.precision import chosen_dtype, runs_in_bfloat16, usable_dtype
from surgery.runtime.public import printable
from surgery.saving.forms import native_config
from surgery.saving.reload import probe_inputs
from surgery.saving.shards import StoredTensor, stored_tensors


@dataclass(frozen=True)
class Preparation:
    """All that stands before the first fit: what to replace, the form it takes, and the original's perplexity.

    Attributes:
        files: where the original's tensors are, for a model whose weights stay on disk.
        identity: of the model, see :func:`surgery.conversion.partial_run.model_identity`.
    """

    task: ConversionTask
    form: str
    left_alone: tuple[tuple[str, str], ...]
    probe: dict[str, Tensor]
    perplexity: Perplexity | None
    files: dict[str, StoredTensor]
    identity: str


def prepared(
    loaded: loading.LoadedModel,
    plan: Recipe,
    moments: Mapping[str, GaussianMixture] | None,
    text: Any,
    quiet: bool,
) -> Preparation:
    """All that is known before a block is fitted, with everything said that can be wrong.

    Raises:
        SurgeryError: blocks, form, budget or calibration that the model does not allow.
    """
    network, found, blocks, native = _to_replace(loaded, plan)
    check_hooks(network, blocks)
    files = stored_tensors(network, loaded.source) if plan.offload else {}
    given = dict(moments or {}) | _moments_file(plan, blocks)
    if plan.budget is not None and not is_causal(network):
        raise RecipeError("a budget is in nats, which only a causal language model has", fix="leave --budget out")
    form_of(plan, native)  # whatever can be wrong is said before samples are drawn
    named = text is None or is_named(text)
    like = torch.empty(0, dtype=network.dtype, device=weights_on_disk.device_of(network))
    if named:
        check_memory(blocks, plan, like)
    plan, note = processes.looked_up(lambda: _chosen_source(plan, loaded)) if named else (plan, "")
    known = processes.looked_up(lambda: model_identity(loaded, plan.model, given))
    data = processes.looked_up(lambda: _inputs(plan.text if named else text, loaded, plan, known))
    data = replace(data, note=data.note or note)
    if not quiet and processes.first():
        for said in (loaded.source.note, loaded.companions.note if plan.output else ""):
            if said:
                print(printable(f"{loaded.source.name}: {said}"), file=sys.stderr)
        if data.note:
            print(printable(f"calibration text: {data.source}; {data.note}"), file=sys.stderr)
    probe = _probe(network, data)
    blocks, others = _seen_to_run(network, blocks, probe, plan)
    check_repeated(blocks, plan)
    plan = plan.model_copy(update={"matmul": processes.looked_up(lambda: _products(network, plan, probe))})
    if named:  # now it is known whether the original's stream runs too
        check_memory(blocks, plan, like)
    form = form_of(plan, native and not others)
    first_token = first_token_size(network, probe, blocks) if is_causal(network) else 0.0
    task = ConversionTask(network, blocks, data, plan, given, first_token, quiet)
    return Preparation(
        task, form, (*found.left_alone, *others), probe, shared_perplexity(network, data.unseen), files, known
    )


def _to_replace(loaded: loading.LoadedModel, plan: Recipe) -> tuple[Any, Survey, tuple[Block, ...], bool]:
    """The network, what it contains, the blocks chosen, and whether their twin can be native.

    A model from disk that is a Llama under another name is written as one where that makes the twin native.
    """
    network: Any = loaded.model
    found = survey(network)
    if not found.blocks and isinstance(network, modeling_polynomial.PolynomialModel):
        raise ModelError(
            "all its blocks are polynomials already",
            where=loaded.source.name,
            cause="it is a polynomial twin",
            fix="convert its original, with another degree or other settings",
        )
    blocks = chosen_blocks(found, plan)
    whole = not found.left_alone and len(blocks) == len(found.blocks)
    native = whole and native_config(network, blocks, blocks[0].hidden + 1) is not None
    if (
        whole
        and not native
        and plan.degree == 2
        and plan.form != "custom"
        and not (loaded.source.kind == "memory" or plan.offload)
    ):
        stored = loaded.source.dtype if plan.save_dtype == "auto" else plan.save_dtype
        llama = as_llama(network, stored)
        if llama is not None:
            found = survey(llama)
            return llama, found, found.blocks, True
    return network, found, blocks, native


def _seen_to_run(
    model: Any, blocks: Sequence[Block], probe: Mapping[str, Tensor], plan: Recipe
) -> tuple[tuple[Block, ...], tuple[tuple[str, str], ...]]:
    """The blocks that compute what their weights say, and (path, reason) of the others.

    Raises ModelError if there are none, or if blocks were asked for by number and one is not what it seems.
    """
    good, bad = verify_each(model, blocks, lambda: _once(model, probe))
    if bad and (not good or plan.blocks is not None):
        raise next(iter(bad.values()))
    return good, tuple((path, f"{error.what}: {error.cause}") for path, error in bad.items())


def _inputs(source: Any, loaded: loading.LoadedModel, plan: Recipe, known: str) -> Calibration:
    """Calibration batches, and further ones that no fit sees, to measure perplexity on."""
    measured = plan.measure if is_named(source) and is_causal(loaded.model) and not plan.offload else 0
    settings = {name: getattr(plan, name) for name in ("tokens", "batch", "seed", "random_tokens")}
    settings |= {"length": plan.window, "short": plan.short, "unseen": measured}

    def draw() -> Calibration:
        ids_only = not is_named(source) or Mixture.of(source).is_inputs
        tokenizer = loaded.tokenizer if ids_only else loaded.text_tokenizer
        return calibration_inputs(source, loaded.model, tokenizer, **settings)

    drawn = is_named(source) and Mixture.of(source).share(SAMPLES) > 0
    target = Path(plan.output) if plan.output and drawn else None
    return kept_samples(target, f"{known} {source}", settings, draw)


def _chosen_source(plan: Recipe, loaded: loading.LoadedModel) -> tuple[Recipe, str]:
    """`auto` spelled out, and a plain word on it; see :func:`surgery.calibration.automatic.automatic`."""
    if plan.text != AUTO:
        return plan, ""
    source, note = automatic(loaded.tokenizer, is_causal(loaded.model))
    return plan.model_copy(update={"text": source}), note


def _probe(model: Any, data: Calibration) -> dict[str, Tensor]:
    device = weights_on_disk.device_of(model)
    return {name: value.to(device) for name, value in probe_inputs(data.batches[0]).items()}


def _once(model: Any, probe: Mapping[str, Tensor]) -> None:
    cache = {"use_cache": False} if model.can_generate() else {}  # layers are run twice, which a cache would remember
    with torch.no_grad():
        model(**probe, **cache)


def _products(model: Any, plan: Recipe, probe: Mapping[str, Tensor]) -> str:
    """What float32 matrices are multiplied in. Raises ModelError if bfloat16 is asked for and the model runs not so."""
    device = weights_on_disk.device_of(model)
    if model.dtype != torch.float32:  # its passes keep their precision, and what is fitted is float32 all the same
        return chosen_dtype(plan.matmul, device)
    if plan.matmul == "bfloat16" and not runs_in_bfloat16(device, lambda: _once(model, probe)):
        raise ModelError(
            "this model does not run with products in bfloat16",
            where="--matmul",
            cause="its own code mixes precisions",
            fix="--matmul auto, or float32",
        )
    return usable_dtype(plan.matmul, device, lambda: _once(model, probe))


def _moments_file(plan: Recipe, blocks: Sequence[Block]) -> dict[str, GaussianMixture]:
    """Distributions of the blocks' inputs from a safetensors file, or N(0, I) for `assume: standard`."""
    if plan.assume == "standard":
        return {
            block.path: GaussianMixture(torch.ones(1), torch.zeros(1, block.width), torch.eye(block.width)[None])
            for block in blocks
        }
    if plan.moments is None:
        return {}
    from safetensors.torch import load_file

    try:
        tensors = load_file(Path(plan.moments).expanduser())
    except Exception as error:
        raise RecipeError(f"the moments file cannot be read: {error}", where=plan.moments) from error
    found = {}
    for block in blocks:
        mean, covariance = tensors.get(f"{block.path}.mean"), tensors.get(f"{block.path}.covariance")
        if mean is None or covariance is None:
            raise RecipeError(
                f"no {block.path}.mean and {block.path}.covariance", where=plan.moments, fix="name every block"
            )
        means = mean if mean.dim() == 2 else mean[None]
        covariances = covariance if covariance.dim() == 3 else covariance[None]
        weights = tensors.get(f"{block.path}.weights", torch.full((len(means),), 1 / len(means)))
        if means.shape[1:] != (block.width,) or covariances.shape != (len(means), block.width, block.width):
            raise RecipeError(f"{block.path} is {block.width} wide; the moments have another shape", where=plan.moments)
        found[block.path] = GaussianMixture(weights / weights.sum(), means, covariances)
    return found
