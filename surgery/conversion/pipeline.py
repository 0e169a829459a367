"""The whole story in one place: load → find → calibrate → solve → swap → save."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.blocks.find import survey
from surgery.calibration.inputs import is_named, spelled
from surgery.calibration.mixtures import Mixture
from surgery.calibration.texts import label
from surgery.closed_form.moments import GaussianMixture
from surgery.conversion.budget import Budget, convert_within
from surgery.conversion.measures import compared, shared_perplexity
from surgery.conversion.partial_run import PartialRun, merged_folder, partial_folder
from surgery.conversion.plot import plot_costs
from surgery.conversion.preparation import Preparation, prepared
from surgery.conversion.recipe import Recipe, load_recipe
from surgery.conversion.replacement import replace_blocks
from surgery.conversion.selection import check_named, chosen_blocks
from surgery.conversion.task import Replacements, unchanged_on_error
from surgery.models import loading
from surgery.runtime import processes, weights_on_disk
from surgery.runtime.precision import chosen_dtype
from surgery.runtime.stopwatch import Stopwatch
from surgery.runtime.vocabulary import understands_former_names
from surgery.saving.checkpoint import save
from surgery.saving.folder import check_room, check_target, whole_folder
from surgery.saving.forms import finish_custom, finish_native
from surgery.saving.reload import main_output, verified
from surgery.saving.report import Report, write_report
from surgery.saving.shards import write_shards


@understands_former_names
def convert(
    model: Any,
    *,
    tokenizer: Any = None,
    text: Any = None,
    moments: Mapping[str, GaussianMixture] | None = None,
    recipe: Recipe | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> tuple[Any, Report]:
    """Replaces a transformer's feed-forward blocks by their least-squares optimal polynomials.

    Under a launcher (accelerate, torchrun) every process must call it, for the same model, and runs its share.

    Args:
        model: Hub id, folder, .gguf file, or a transformers model in memory, which is changed in place and put in
            evaluation mode; on error it is as it was, but for that mode.
        tokenizer: for a model in memory, to calibrate on text and to be saved along.
        text: to calibrate on: a source name (see :mod:`surgery.calibration.texts`), several or shares by name; or token
            ids, texts, model inputs or a dataset (see :mod:`surgery.calibration.given`); default from the recipe.
        moments: distribution of each block's input by path, for `assume="gaussian"`; measured where absent.
        recipe: settings; `settings` (any field of :class:`~surgery.conversion.recipe.Recipe`) override it.
        output: folder to save the twin to, verified by reloading it in a fresh process.
        overwrite, restart: replace an earlier twin; discard what an interrupted run has finished.
    Returns:
        the model with its blocks swapped, and the report.
    Raises:
        SurgeryError: a mistake that can be mended; its text says how.

    Example:
        >>> twin, report = surgery.convert("HuggingFaceTB/SmolLM2-135M", degree=2)
    """
    processes.join()
    named = isinstance(model, str | Path)
    plan = _plan(str(model) if named else None, text, recipe, output, settings)
    target, watch = _claimed(plan, overwrite, restart), Stopwatch()
    if target is not None:
        plan = plan.model_copy(update={"output": str(target)})
    place = loading.placed(plan.device)
    dtype = processes.looked_up(lambda: chosen_dtype(plan.dtype, place))
    plan, matmul = plan.model_copy(update={"dtype": dtype}), plan.matmul
    torch.manual_seed(plan.seed)
    with watch.timing("load"):
        loaded = _loaded(plan, target, place) if named else loading.from_memory(model, tokenizer)
    if target is not None:
        check_room(target, loaded.model, _stored(loaded, plan))
    on_disk = weights_on_disk.read_when_used(loaded.source.name) if plan.offload else nullcontext()
    with watch.timing("prepare"), on_disk:
        ready = prepared(loaded, plan, moments, text, quiet)
    task, plan = ready.task, ready.task.plan
    asked = plan.model_copy(update={"matmul": matmul})  # `auto` may be found otherwise when a run is gone on with
    partial = processes.looked_up(lambda: PartialRun.open(target, asked, ready.identity, task.data))
    with unchanged_on_error(task) if loaded.source.kind == "memory" else nullcontext():
        with watch.timing("convert"):
            made = _make(ready, partial)
        report = _reported(loaded, ready, made, watch)
        if target is not None and processes.first():
            _store(loaded, ready, made, target, partial, report)
        processes.from_first(None)  # nobody leaves before the twin stands
    if plan.offload:
        return loading.loaded(str(target), dtype=plan.dtype, device_map=weights_on_disk.ON_DISK).model, report
    return task.model, report


def _plan(
    model: str | None, text: Any, recipe: Recipe | None, output: str | Path | None, settings: Mapping[str, Any]
) -> Recipe:
    """The recipe with everything on top of it, checked as far as no model is needed."""
    chosen = (recipe.model_dump() if recipe else {}) | dict(settings)
    named = text is not None and is_named(text)
    given = {
        "model": model,
        "output": None if output is None else str(output),
        "text": spelled(text) if named else None,
    }
    plan = load_recipe(None, chosen | {name: value for name, value in given.items() if value is not None})
    if model is not None:
        check_named(plan)
    if text is None or named:
        Mixture.of(plan.text).check()
    return plan


def _claimed(plan: Recipe, overwrite: bool, restart: bool) -> Path | None:
    """The output from the root, if there is one and it may be written; leftovers that nobody wants are gone."""
    if not plan.output:
        return None
    target = check_target(Path(plan.output), overwrite)
    if processes.first():
        shutil.rmtree(partial_folder(target) if restart else merged_folder(target), ignore_errors=True)
    processes.from_first(None)  # nobody puts anything there before
    return target


def _loaded(plan: Recipe, target: Path | None, place: torch.device) -> loading.LoadedModel:
    """The recipe's model, where it is to compute."""
    if plan.blocks is not None:  # a wrong number is said before the weights are read
        chosen_blocks(survey(loading.load_meta(plan.model, plan.revision)[0]), plan)
    if target is not None and plan.offload:
        return loading.loaded(
            plan.model, plan.revision, plan.dtype, weights_on_disk.ON_DISK, merged=merged_folder(target)
        )
    loaded = loading.loaded(plan.model, plan.revision, plan.dtype)
    loaded.model.to(place)
    return loaded


@dataclass(frozen=True)
class _Made:
    """The blocks replaced, the form of the twin that the task's model now is, and the account of a budget."""

    replaced: Replacements
    form: str
    account: Budget | None


def _make(ready: Preparation, partial: PartialRun) -> _Made:
    """Fits the blocks one after another, puts them in, and makes of the network what its form asks for."""
    task, form, account = ready.task, ready.form, None
    if task.plan.budget is None:
        done = replace_blocks(task, form, partial, probe=ready.probe if task.plan.offload else None)
    else:
        done, account, form = convert_within(task, form, task.plan.budget, partial)
    if form == "native":
        finish_native(task.model, task.blocks)
    else:
        finish_custom(task.model, done.entries)
    return _Made(done, form, account)


def _reported(loaded: loading.LoadedModel, ready: Preparation, made: _Made, watch: Stopwatch) -> Report:
    task, plan = ready.task, ready.task.plan
    return Report(
        recipe=plan.resolved() | _public(plan),
        source=loaded.source.as_dict(),
        companions=loaded.companions.as_dict() if plan.output else {},
        calibration=task.data.as_dict(),
        form=made.form,
        blocks=tuple(made.replaced.rows),
        left_alone=ready.left_alone,
        perplexity=compared(ready.perplexity, shared_perplexity(task.model, task.data.unseen), plan),
        budget=None if made.account is None else made.account.as_dict(),
        seconds=watch.seconds,
    )


def _store(
    loaded: loading.LoadedModel, ready: Preparation, made: _Made, target: Path, partial: PartialRun, report: Report
) -> None:
    """Writes the twin and has it read by a fresh process."""
    network, plan = ready.task.model, ready.task.plan
    dtype = _stored(loaded, plan)
    if plan.offload:
        assert partial.folder is not None
        with whole_folder(target) as place:
            beside = loaded.tokenizer, loaded.companions
            write_shards(network, partial.folder, ready.files, *beside, place, dtype)
            expected = main_output(made.replaced.outcome)
            seen = verified(place, ready.probe, expected, dtype, made.form, on_disk=True)
            write_report(place, report.as_dict(), seen)
    else:
        how: dict[str, Any] = {"dtype": dtype, "form": made.form, "companions": loaded.companions}
        save(network, loaded.tokenizer, target, report.as_dict(), ready.probe, **how)
    partial.close()
    if made.account is not None:
        plot_costs(made.account, target / "budget.png")


def _stored(loaded: loading.LoadedModel, plan: Recipe) -> str:
    """Precision of the saved weights."""
    return loaded.source.dtype if plan.save_dtype == "auto" else plan.save_dtype


def _public(plan: Recipe) -> dict[str, Any]:
    """Local paths by their last part only: the report travels with the checkpoint."""
    local = {"model": Path(plan.model).expanduser().exists(), "output": True, "moments": True}
    paths = {key: Path(value).name for key, here in local.items() if here and (value := getattr(plan, key))}
    given = plan.text
    if isinstance(given, dict):
        return paths | {"text": {label(source): share for source, share in given.items()}}
    return paths | {"text": label(given) if isinstance(given, str) else [label(source) for source in given]}
