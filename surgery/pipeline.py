"""The whole story in one place: load → find → calibrate → solve → swap → save."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery import checkpoint, loading, swap
from surgery.blocks import Block, Survey, attribute, survey
from surgery.calibration import Calibration, prepare, start_tokens
from surgery.confirm import confirmed
from surgery.errors import ModelError, RecipeError
from surgery.fit import FitSettings, FittedBlock, Gaussian, fit_block
from surgery.fit_experts import FittedExperts, fit_experts
from surgery.modeling_polynomial import install
from surgery.progress import Progress
from surgery.recipe import Recipe, parse_blocks
from surgery.reexpress import as_llama, llama_config
from surgery.report import Report, block_row
from surgery.resume import Workshop, kept, partial
from surgery.stream import Stream, first_token_is_sink

CACHE_BYTES = 1 << 30  # hidden vectors kept per block, so that they are computed once


@dataclass(frozen=True)
class Inspection:
    """What `surgery inspect` shows."""

    name: str
    architecture: str
    survey: Survey
    native: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "architecture": self.architecture,
            "blocks": [{**block.as_dict(), "forms": self.forms(block)} for block in self.survey.blocks],
            "left_alone": [{"path": path, "reason": reason} for path, reason in self.survey.left_alone],
        }

    def forms(self, block: Block) -> list[str]:
        """Checkpoint forms a twin of degree 2 can take with this block converted."""
        return (["native"] if self.native and block.kind == "gated" else []) + ["custom"]


def inspect(name: str, revision: str | None = None) -> Inspection:
    """Finds the blocks of a model from its configuration alone; no weights are read."""
    model, config = loading.load_meta(name, revision)
    found = survey(model)
    hidden = found.blocks[0].hidden if found.blocks else 0
    stored = loading.stored_dtype(Path(name), config)
    native = swap.native_config(model, found.blocks, hidden + 1) is not None or llama_config(model, stored) is not None
    return Inspection(name, type(model).__name__, found, native and not found.left_alone)


def plan(recipe: Recipe) -> dict[str, Any]:
    """What a conversion would do, without loading weights: `--dry-run`."""
    seen = inspect(recipe.model, recipe.revision)
    blocks = choose(seen.survey, recipe)
    form = _form(recipe, seen.native and len(blocks) == len(seen.survey.blocks))
    unit = {"plain": recipe.degree + 1}.get(blocks[0].kind, 2 * recipe.degree + 1)
    return {
        **seen.as_dict(),
        "recipe": recipe.resolved(),
        "convert": [block.path for block in blocks],
        "form": form,
        "coefficients_per_unit": unit,
    }


def choose(found: Survey, recipe: Recipe) -> tuple[Block, ...]:
    """The blocks the recipe asks for. Raises ModelError where there are none, RecipeError for a wrong number."""
    if not found.blocks:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in found.left_alone[:3])
        raise ModelError(
            "no convertible feed-forward block was found" + (f" ({reasons})" if reasons else ""),
            where=recipe.model,
            cause="not a transformer, or an architecture whose blocks have another shape",
            fix="run `surgery inspect` to see what was looked at",
        )
    if recipe.blocks is None:
        return found.blocks
    wanted = parse_blocks(recipe.blocks)
    if wanted[-1] >= len(found.blocks):
        raise RecipeError(f"block {wanted[-1]} was asked for, but the model has blocks 0 to {len(found.blocks) - 1}")
    return tuple(found.blocks[index] for index in wanted)


def _form(recipe: Recipe, native_possible: bool) -> str:
    native = native_possible and recipe.degree == 2
    if recipe.form == "native" and not native:
        raise RecipeError(
            "the native form is not possible here",
            cause="it needs every block gated and converted at degree 2, in an architecture with mlp_bias",
            fix="use form: auto or custom",
        )
    return "native" if native and recipe.form != "custom" else "custom"


def convert(
    model: Any,
    *,
    tokenizer: Any = None,
    calibration: str | Tensor | Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor] | None = None,
    moments: Mapping[str, Gaussian] | None = None,
    recipe: Recipe | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> tuple[Any, Report]:
    """Replaces a transformer's feed-forward blocks by their least-squares optimal polynomials.

    Args:
        model: Hub id, folder, .gguf file, or a transformers model in memory (changed in place; unchanged on error).
        tokenizer: for a model in memory, to calibrate on text and to be saved along.
        calibration: a source name (see `surgery.calibration`), token ids, or model inputs; default from the recipe.
        moments: distribution of each block's input by path, for `assume="gaussian"`; measured where absent.
        recipe: settings; `settings` (any field of :class:`~surgery.recipe.Recipe`) override it.
        output: folder to save the twin to, verified by reloading it in a fresh process.
        overwrite, restart: replace an earlier twin; discard what an interrupted run has finished.
    Returns:
        the model with its blocks swapped, and the report.
    Raises:
        SurgeryError: a mistake that can be mended; its text says how.

    Example:
        >>> twin, report = surgery.convert("HuggingFaceTB/SmolLM2-135M", degree=2)
    """
    chosen = (recipe.model_dump() if recipe else {}) | settings
    if isinstance(calibration, str):
        chosen["calibration"] = calibration
    if isinstance(model, str | Path):
        chosen["model"] = str(model)
    if output is not None:
        chosen["output"] = str(output)
    from surgery.recipe import load_recipe

    plan = load_recipe(None, chosen)
    started = time.monotonic()
    target = Path(plan.output) if plan.output else None
    if target is not None:
        checkpoint.check_target(target, overwrite)
        if restart:
            shutil.rmtree(partial(target), ignore_errors=True)
    torch.manual_seed(plan.seed)
    if isinstance(model, str | Path):
        loaded = loading.load(str(model), plan.revision, plan.dtype)
    else:
        loaded = loading.in_memory(model, tokenizer)
    loaded_at = time.monotonic()
    network, found, blocks, native = _to_replace(loaded, plan)
    given = dict(moments or {}) | _moments_file(plan, blocks)
    form = _form(plan, native)  # whatever can be wrong is said before samples are drawn
    plan = _chosen_source(plan, loaded)
    source = plan.calibration if calibration is None or isinstance(calibration, str) else calibration
    data = _inputs(source, loaded, plan)
    probe = _probe(network, data)
    blocks, others = _seen_to_run(network, blocks, probe, plan)
    form = _form(plan, native and not others)
    first_is_sink = _is_causal(network) and first_token_is_sink(network, probe, blocks)
    before = _perplexity(network, data.unseen)
    ready_at = time.monotonic()

    workshop = Workshop.open(target, plan, loaded.source, data)
    entries, rows = _replace_blocks(
        network, blocks, data, plan, given, form == "native", first_is_sink, workshop, quiet
    )
    fitted_at = time.monotonic()
    if form == "native":
        swap.finish_native(network, blocks)
    else:
        swap.finish_custom(network, entries)
    after = _perplexity(network, data.unseen)
    report = Report(
        recipe=plan.resolved() | _public(plan),
        source=loaded.source.as_dict(),
        calibration=data.as_dict(),
        form=form,
        blocks=tuple(rows),
        left_alone=(*found.left_alone, *others),
        perplexity=_compared(before, after, plan),
        seconds={
            "load": round(loaded_at - started, 2),
            "prepare": round(ready_at - loaded_at, 2),
            "convert": round(fitted_at - ready_at, 2),
        },
    )
    if target is not None:
        dtype = loaded.source.dtype if plan.save_dtype == "auto" else plan.save_dtype
        checkpoint.save(
            network, loaded.tokenizer, target, report.as_dict(), probe, dtype=dtype, native=form == "native"
        )
        workshop.close()
    return network, report


def _to_replace(loaded: loading.LoadedModel, plan: Recipe) -> tuple[Any, Survey, tuple[Block, ...], bool]:
    """The network, what it contains, the blocks chosen, and whether their twin can be native.

    A model from disk that is a Llama under another name is written as one where that makes the twin native.
    """
    network: Any = loaded.model
    found = survey(network)
    blocks = choose(found, plan)
    whole = not found.left_alone and len(blocks) == len(found.blocks)
    native = whole and swap.native_config(network, blocks, blocks[0].hidden + 1) is not None
    if whole and not native and plan.degree == 2 and plan.form != "custom" and loaded.source.kind != "memory":
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
    good, bad = confirmed(model, blocks, lambda: _once(model, probe))
    if bad and (not good or plan.blocks is not None):
        raise next(iter(bad.values()))
    return good, tuple((path, f"{error.what}: {error.cause}") for path, error in bad.items())


def _public(plan: Recipe) -> dict[str, Any]:
    """Local paths by their last part only: the report travels with the checkpoint."""
    local = {"model": Path(plan.model).expanduser().exists(), "output": True}
    return {key: Path(value).name for key, here in local.items() if here and (value := getattr(plan, key))}


def _inputs(source: Any, loaded: loading.LoadedModel, plan: Recipe) -> Calibration:
    """Calibration batches, and further ones that no fit sees, to measure perplexity on."""
    measured = plan.measure if isinstance(source, str) and _is_causal(loaded.model) else 0
    settings: dict[str, Any] = {
        "tokens": plan.tokens, "length": plan.length, "batch": plan.batch, "seed": plan.seed, "short": plan.short_share,
        "unseen": measured,
    }  # fmt: skip

    def draw() -> Calibration:
        return prepare(source, loaded.model, loaded.tokenizer, **settings)

    target = Path(plan.output) if plan.output and source == "samples" else None
    return kept(target, loaded.source, settings, draw)


def _chosen_source(plan: Recipe, loaded: loading.LoadedModel) -> Recipe:
    """`auto` spelled out: the model's own samples, unless it cannot generate or has no tokenizer to begin with."""
    if plan.calibration != "auto":
        return plan
    generates = _is_causal(loaded.model) and loaded.tokenizer is not None and start_tokens(loaded.tokenizer)
    return plan.model_copy(update={"calibration": "samples" if generates else "python"})


def _is_causal(model: Any) -> bool:
    return bool(model.can_generate()) and not getattr(model.config, "is_encoder_decoder", False)


def _probe(model: Any, data: Calibration) -> dict[str, Tensor]:
    return {name: value.to(model.device) for name, value in checkpoint.probe_inputs(data.batches[0]).items()}


def _once(model: Any, probe: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        model(**probe)


def _perplexity(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> Any:
    from evals.perplexity import perplexity

    return perplexity(model, batches) if batches else None


def _compared(before: Any, after: Any, plan: Recipe) -> dict[str, Any] | None:
    if before is None:
        return None
    return {
        "original": before.perplexity,
        "twin": after.perplexity,
        "nats": after.nats - before.nats,
        "tokens": before.tokens,
        "text": f"{plan.calibration}, the {before.tokens} tokens after those used for calibration",
        "window": plan.length,
    }


def _moments_file(plan: Recipe, blocks: Sequence[Block]) -> dict[str, Gaussian]:
    """Distributions of the blocks' inputs from a safetensors file, or N(0, I) for `assume: standard`."""
    if plan.assume == "standard":
        return {
            block.path: Gaussian(torch.ones(1), torch.zeros(1, block.width), torch.eye(block.width)[None])
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
        found[block.path] = Gaussian(weights / weights.sum(), means, covariances)
    return found


def _replace_blocks(
    model: Any,
    blocks: Sequence[Block],
    data: Calibration,
    plan: Recipe,
    given: Mapping[str, Gaussian],
    native: bool,
    first_is_sink: bool,
    workshop: Workshop,
    quiet: bool,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Fits and installs one block after another. On any error the model is put back as it was."""
    settings = FitSettings(
        degree=plan.degree,
        assume="data" if plan.assume == "data" else "gaussian",
        refit=plan.refit,
        tail_weight=plan.tail,
        tail_width=plan.tail_width,
        guard=native,
        units=plan.units,
    )
    like = next(model.parameters())
    originals = {path: attribute(model, path) for block in blocks for path in block.replaced}
    entries: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    follow = plan.refit and plan.target == "stream" and any(block.additive for block in blocks)
    batches = [{name: value.to(model.device) for name, value in batch.items()} for batch in data.batches]
    passed = [{**batch, **_no_cache(model)} for batch in batches]
    done = workshop.finished(blocks)
    if len(done) == len(blocks):
        passed = []  # nothing is left to calibrate, so nothing has to run
    try:
        with (
            Stream(model, passed, blocks, follow, first_is_sink) as stream,
            Progress(len(blocks), quiet) as progress,
        ):
            for station in stream:
                block, begun = station.block, time.monotonic()
                if block.path in done:
                    entry, row, modules = workshop.load(block, like)
                    stream.replace(modules)
                else:
                    fitted: FittedBlock | FittedExperts = (
                        fit_experts(station, settings)
                        if block.kind == "experts"
                        else fit_block(station, settings, given.get(block.path), CACHE_BYTES)
                    )
                    entry = swap.describe(fitted, native)
                    modules = swap.modules_for(fitted, native, like)
                    stream.replace(modules)
                    if isinstance(fitted, FittedBlock) and block.kind != "plain":  # there the passes wait inside
                        for number, output in enumerate(fitted.outputs):
                            stream.answer(number, output)
                        for number, output in enumerate(fitted.written):
                            stream.answer(number, output, original=True)
                    row = block_row(fitted, time.monotonic() - begun)
                    workshop.keep(block, entry, row, modules)
                entries.append(entry)
                rows.append(row)
                progress.step(row)
    except BaseException:
        for path, module in originals.items():
            install(model, path, module)
        raise
    return entries, rows


def _no_cache(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if model.can_generate() else {}
