"""The whole story in one place: load → find → calibrate → solve → swap → save."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from surgery import checkpoint, group, loading, offload, on_disk, swap
from surgery.blocks import Block, Survey, survey
from surgery.budget import Budget, draw, within
from surgery.calibration import Calibration, prepare, start_tokens
from surgery.confirm import confirmed
from surgery.errors import RecipeError
from surgery.fit import Gaussian
from surgery.inspection import check_hooks, check_repeated, choose, form_of
from surgery.recipe import Recipe
from surgery.reexpress import as_llama
from surgery.replacement import Replaced, Task, replace_blocks, unchanged_on_error
from surgery.report import Report
from surgery.resume import Workshop, identity, kept, merged, partial
from surgery.stream import first_token_is_sink
from surgery.texts import label


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
        model: Hub id, folder, .gguf file, or a transformers model in memory, which is changed in place and put in
            evaluation mode; on error it is as it was, but for that mode.
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
        target = checkpoint.check_target(target, overwrite)
        plan = plan.model_copy(update={"output": str(target)})
        if group.first():
            shutil.rmtree(partial(target) if restart else merged(target), ignore_errors=True)
        group.agreed(None)  # nobody puts anything there before
    torch.manual_seed(plan.seed)
    loaded = _loaded(plan, target) if isinstance(model, str | Path) else loading.in_memory(model, tokenizer)
    loaded_at = time.monotonic()
    with on_disk.read_when_used(loaded.source.name) if plan.offload else nullcontext():
        ready = _ready(loaded, plan, moments, calibration, quiet)
    task, plan, data = ready.task, ready.task.plan, ready.task.data
    ready_at = time.monotonic()
    workshop = Workshop.open(target, plan, ready.identity, data) if group.first() else Workshop(None)
    workshop = group.agreed(workshop)
    with unchanged_on_error(task) if loaded.source.kind == "memory" else nullcontext():
        made = _make(ready, workshop)
        made_at = time.monotonic()
        report = Report(
            recipe=plan.resolved() | _public(plan),
            source=loaded.source.as_dict(),
            calibration=data.as_dict(),
            form=made.form,
            blocks=tuple(made.replaced.rows),
            left_alone=ready.left_alone,
            perplexity=_compared(ready.perplexity, _perplexity(task.model, data.unseen), plan),
            budget=None if made.account is None else made.account.as_dict(),
            seconds={
                "load": round(loaded_at - started, 2),
                "prepare": round(ready_at - loaded_at, 2),
                "convert": round(made_at - ready_at, 2),
            },
        )
        if target is not None and group.first():
            _store(loaded, ready, made, target, workshop, report)
        group.agreed(None)  # nobody leaves before the twin stands
    if plan.offload:
        return loading.load(str(target), dtype=plan.dtype, device_map=on_disk.ON_DISK).model, report
    return task.model, report


def _loaded(plan: Recipe, target: Path | None) -> loading.LoadedModel:
    """The recipe's model, where it is to compute."""
    where = loading.placed(plan.device)
    if plan.blocks is not None:  # a wrong number is said before the weights are read
        choose(survey(loading.load_meta(plan.model, plan.revision)[0]), plan)
    if target is not None and plan.offload:
        return loading.load(plan.model, plan.revision, plan.dtype, on_disk.ON_DISK, merged=merged(target))
    loaded = loading.load(plan.model, plan.revision, plan.dtype)
    loaded.model.to(where)
    return loaded


@dataclass(frozen=True)
class _Made:
    """The blocks replaced, the form of the twin that `_Ready.task.model` now is, and the account of a budget."""

    replaced: Replaced
    form: str
    account: Budget | None


def _make(ready: _Ready, workshop: Workshop) -> _Made:
    """Fits the blocks one after another, puts them in, and makes of the network what its form asks for."""
    task, native, account = ready.task, ready.form == "native", None
    if task.plan.budget is None:
        done = replace_blocks(task, native, workshop, probe=ready.probe if task.plan.offload else None)
    else:
        check = task.data.unseen
        done, account, native = within(task, native, task.plan.budget, _nats, _divergence, check, workshop)
    if native:
        swap.finish_native(task.model, task.blocks)
    else:
        swap.finish_custom(task.model, done.entries)
    return _Made(done, "native" if native else "custom", account)


def _store(
    loaded: loading.LoadedModel, ready: _Ready, made: _Made, target: Path, workshop: Workshop, report: Report
) -> None:
    """Writes the twin and has it read by a fresh process."""
    network, plan, native = ready.task.model, ready.task.plan, made.form == "native"
    dtype = loaded.source.dtype if plan.save_dtype == "auto" else plan.save_dtype
    if plan.offload:
        assert workshop.folder is not None
        with checkpoint.whole_folder(target) as place:
            offload.write(network, workshop.folder, ready.files, loaded.tokenizer, place, dtype)
            answer = checkpoint.main_output(made.replaced.outcome)
            seen = checkpoint.verified(place, ready.probe, answer, dtype, native, on_disk=True)
            checkpoint.write_report(place, report.as_dict(), seen)
    else:
        checkpoint.save(network, loaded.tokenizer, target, report.as_dict(), ready.probe, dtype=dtype, native=native)
    workshop.close()
    if made.account is not None:
        draw(made.account, target / "budget.png")


@dataclass(frozen=True)
class _Ready:
    """All that stands before the first fit: what to replace, the form it takes, and the original's perplexity.

    Attributes:
        files: where the original's tensors are, for a model whose weights stay on disk.
        identity: of the model, see :func:`surgery.resume.identity`.
    """

    task: Task
    form: str
    left_alone: tuple[tuple[str, str], ...]
    probe: dict[str, Tensor]
    perplexity: Any
    files: dict[str, offload.Place]
    identity: str


def _ready(
    loaded: loading.LoadedModel,
    plan: Recipe,
    moments: Mapping[str, Gaussian] | None,
    calibration: Any,
    quiet: bool,
) -> _Ready:
    network, found, blocks, native = _to_replace(loaded, plan)
    check_hooks(network, blocks)
    files = offload.places(network, loaded.source) if plan.offload else {}
    given = dict(moments or {}) | _moments_file(plan, blocks)
    if plan.budget is not None and not _is_causal(network):
        raise RecipeError("a budget is in nats, which only a causal language model has", fix="leave --budget out")
    form_of(plan, native)  # whatever can be wrong is said before samples are drawn
    plan = _chosen_source(plan, loaded)
    source = plan.calibration if calibration is None or isinstance(calibration, str) else calibration
    known = identity(loaded, plan.model, given)
    data = group.agreed(_inputs(source, loaded, plan, known) if group.first() else cast(Calibration, None))
    probe = _probe(network, data)
    blocks, others = _seen_to_run(network, blocks, probe, plan)
    check_repeated(blocks, plan)
    form = form_of(plan, native and not others)
    first_is_sink = _is_causal(network) and first_token_is_sink(network, probe, blocks)
    task = Task(network, blocks, data, plan, given, first_is_sink, quiet)
    return _Ready(task, form, (*found.left_alone, *others), probe, _perplexity(network, data.unseen), files, known)


def _to_replace(loaded: loading.LoadedModel, plan: Recipe) -> tuple[Any, Survey, tuple[Block, ...], bool]:
    """The network, what it contains, the blocks chosen, and whether their twin can be native.

    A model from disk that is a Llama under another name is written as one where that makes the twin native.
    """
    network: Any = loaded.model
    found = survey(network)
    blocks = choose(found, plan)
    whole = not found.left_alone and len(blocks) == len(found.blocks)
    native = whole and swap.native_config(network, blocks, blocks[0].hidden + 1) is not None
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
    good, bad = confirmed(model, blocks, lambda: _once(model, probe))
    if bad and (not good or plan.blocks is not None):
        raise next(iter(bad.values()))
    return good, tuple((path, f"{error.what}: {error.cause}") for path, error in bad.items())


def _public(plan: Recipe) -> dict[str, Any]:
    """Local paths by their last part only: the report travels with the checkpoint."""
    local = {"model": Path(plan.model).expanduser().exists(), "output": True, "moments": True}
    paths = {key: Path(value).name for key, here in local.items() if here and (value := getattr(plan, key))}
    return paths | {"calibration": label(plan.calibration)}


def _inputs(source: Any, loaded: loading.LoadedModel, plan: Recipe, known: str) -> Calibration:
    """Calibration batches, and further ones that no fit sees, to measure perplexity on."""
    measured = plan.measure if isinstance(source, str) and _is_causal(loaded.model) and not plan.offload else 0
    settings: dict[str, Any] = {
        "tokens": plan.tokens, "length": plan.length, "batch": plan.batch, "seed": plan.seed, "short": plan.short_share,
        "random_tokens": plan.random_tokens, "unseen": measured,
    }  # fmt: skip

    def draw() -> Calibration:
        return prepare(source, loaded.model, loaded.tokenizer, **settings)

    target = Path(plan.output) if plan.output and source == "samples" else None
    return kept(target, known, settings, draw)


def _chosen_source(plan: Recipe, loaded: loading.LoadedModel) -> Recipe:
    """`auto` spelled out: the model's own samples, unless it cannot generate or has no tokenizer to begin with."""
    if plan.calibration != "auto":
        return plan
    generates = _is_causal(loaded.model) and loaded.tokenizer is not None and start_tokens(loaded.tokenizer)
    return plan.model_copy(update={"calibration": "samples" if generates else "python"})


def _is_causal(model: Any) -> bool:
    return bool(model.can_generate()) and not getattr(model.config, "is_encoder_decoder", False)


def _probe(model: Any, data: Calibration) -> dict[str, Tensor]:
    device = on_disk.device_of(model)
    return {name: value.to(device) for name, value in checkpoint.probe_inputs(data.batches[0]).items()}


def _once(model: Any, probe: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        model(**probe)


def _perplexity(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> Any:
    from evals.perplexity import Perplexity, perplexity

    if not batches:
        return None
    _, mine = group.mine(batches)
    own = perplexity(model, mine) if mine else Perplexity(0.0, 0)
    tokens = group.number(own.tokens)
    return Perplexity(group.number(own.nats * own.tokens) / tokens, int(tokens))


def _nats(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> float:
    found: float = _perplexity(model, batches).nats
    return found


def _divergence(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> Callable[[Any], float]:
    """Measures how far a model's predictions, changed, are from those it makes now: mean KL, nats."""
    from evals.fidelity import Predictions

    _, mine = group.mine(batches)
    now = Predictions(model, mine)

    def measure(changed: Any) -> float:
        total, count = now.divergence(changed)
        return group.number(total) / group.number(count)

    return measure


def _compared(before: Any, after: Any, plan: Recipe) -> dict[str, Any] | None:
    if before is None:
        return None
    return {
        "original": before.perplexity,
        "twin": after.perplexity,
        "nats": after.nats - before.nats,
        "tokens": before.tokens,
        "text": f"{label(plan.calibration)}, the {before.tokens} tokens after those used for calibration",
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
