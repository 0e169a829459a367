"""The whole story in one place: load → find → calibrate → solve → swap → save."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.blocks.find import survey
from surgery.calibration.texts import check_source, label
from surgery.closed_form.moments import GaussianMixture
from surgery.conversion.budget import Budget, convert_within
from surgery.conversion.measures import compared, divergence, nats, shared_perplexity
from surgery.conversion.partial_run import PartialRun, merged_folder, partial_folder
from surgery.conversion.plot import plot_costs
from surgery.conversion.preparation import Preparation, prepared
from surgery.conversion.recipe import Recipe, load_recipe
from surgery.conversion.replacement import replace_blocks
from surgery.conversion.selection import check_named, chosen_blocks
from surgery.conversion.task import Replacements, unchanged_on_error
from surgery.models import loading
from surgery.runtime import processes, weights_on_disk
from surgery.saving.checkpoint import save
from surgery.saving.folder import check_target, whole_folder
from surgery.saving.forms import finish_custom, finish_native
from surgery.saving.reload import main_output, verified
from surgery.saving.report import Report, write_report
from surgery.saving.shards import write_shards


def convert(
    model: Any,
    *,
    tokenizer: Any = None,
    calibration: str | Tensor | Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor] | None = None,
    moments: Mapping[str, GaussianMixture] | None = None,
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
        calibration: a source name (see :mod:`surgery.calibration.texts`), token ids, or model inputs; default from
            the recipe.
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
    chosen = (recipe.model_dump() if recipe else {}) | settings
    if isinstance(calibration, str):
        chosen["calibration"] = calibration
    if isinstance(model, str | Path):
        chosen["model"] = str(model)
    if output is not None:
        chosen["output"] = str(output)
    plan = load_recipe(None, chosen)
    if isinstance(model, str | Path):
        check_named(plan)
    if calibration is None or isinstance(calibration, str):
        check_source(plan.calibration)
    started = time.monotonic()
    target = Path(plan.output) if plan.output else None
    if target is not None:
        target = check_target(target, overwrite)
        plan = plan.model_copy(update={"output": str(target)})
        if processes.first():
            shutil.rmtree(partial_folder(target) if restart else merged_folder(target), ignore_errors=True)
        processes.from_first(None)  # nobody puts anything there before
    torch.manual_seed(plan.seed)
    loaded = _loaded(plan, target) if isinstance(model, str | Path) else loading.from_memory(model, tokenizer)
    loaded_at = time.monotonic()
    with weights_on_disk.read_when_used(loaded.source.name) if plan.offload else nullcontext():
        ready = prepared(loaded, plan, moments, calibration, quiet)
    task, plan, data = ready.task, ready.task.plan, ready.task.data
    ready_at = time.monotonic()
    workshop = PartialRun.open(target, plan, ready.identity, data) if processes.first() else PartialRun(None)
    workshop = processes.from_first(workshop)
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
            perplexity=compared(ready.perplexity, shared_perplexity(task.model, data.unseen), plan),
            budget=None if made.account is None else made.account.as_dict(),
            seconds={
                "load": round(loaded_at - started, 2),
                "prepare": round(ready_at - loaded_at, 2),
                "convert": round(made_at - ready_at, 2),
            },
        )
        if target is not None and processes.first():
            _store(loaded, ready, made, target, workshop, report)
        processes.from_first(None)  # nobody leaves before the twin stands
    if plan.offload:
        return loading.load(str(target), dtype=plan.dtype, device_map=weights_on_disk.ON_DISK).model, report
    return task.model, report


def _loaded(plan: Recipe, target: Path | None) -> loading.LoadedModel:
    """The recipe's model, where it is to compute."""
    where = loading.placed(plan.device)
    if plan.blocks is not None:  # a wrong number is said before the weights are read
        chosen_blocks(survey(loading.load_meta(plan.model, plan.revision)[0]), plan)
    if target is not None and plan.offload:
        return loading.load(
            plan.model, plan.revision, plan.dtype, weights_on_disk.ON_DISK, merged=merged_folder(target)
        )
    loaded = loading.load(plan.model, plan.revision, plan.dtype)
    loaded.model.to(where)
    return loaded


@dataclass(frozen=True)
class _Made:
    """The blocks replaced, the form of the twin that `_Ready.task.model` now is, and the account of a budget."""

    replaced: Replacements
    form: str
    account: Budget | None


def _make(ready: Preparation, workshop: PartialRun) -> _Made:
    """Fits the blocks one after another, puts them in, and makes of the network what its form asks for."""
    task, form, account = ready.task, ready.form, None
    if task.plan.budget is None:
        done = replace_blocks(task, form, workshop, probe=ready.probe if task.plan.offload else None)
    else:
        check = task.data.unseen
        done, account, form = convert_within(task, form, task.plan.budget, nats, divergence, check, workshop)
    if form == "native":
        finish_native(task.model, task.blocks)
    else:
        finish_custom(task.model, done.entries)
    return _Made(done, form, account)


def _store(
    loaded: loading.LoadedModel, ready: Preparation, made: _Made, target: Path, workshop: PartialRun, report: Report
) -> None:
    """Writes the twin and has it read by a fresh process."""
    network, plan = ready.task.model, ready.task.plan
    dtype = loaded.source.dtype if plan.save_dtype == "auto" else plan.save_dtype
    if plan.offload:
        assert workshop.folder is not None
        with whole_folder(target) as place:
            write_shards(network, workshop.folder, ready.files, loaded.tokenizer, place, dtype)
            answer = main_output(made.replaced.outcome)
            seen = verified(place, ready.probe, answer, dtype, made.form, on_disk=True)
            write_report(place, report.as_dict(), seen)
    else:
        save(network, loaded.tokenizer, target, report.as_dict(), ready.probe, dtype=dtype, form=made.form)
    workshop.close()
    if made.account is not None:
        plot_costs(made.account, target / "budget.png")


def _public(plan: Recipe) -> dict[str, Any]:
    """Local paths by their last part only: the report travels with the checkpoint."""
    local = {"model": Path(plan.model).expanduser().exists(), "output": True, "moments": True}
    paths = {key: Path(value).name for key, here in local.items() if here and (value := getattr(plan, key))}
    return paths | {"calibration": label(plan.calibration)}
