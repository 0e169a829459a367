"""lm-evaluation-harness tasks for two models with identical settings, paired sample by sample."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.uncertainty import paired_difference
from surgery.errors import EvaluationError, did_you_mean, first_line
from surgery.runtime import processes
from surgery.runtime.settings import at_least

SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
OWN_TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class TaskSettings:
    """What both models are run with; see lm-eval's own options of the same names.

    Attributes:
        apply_chat_template: put the questions into the tokenizer's chat template; or the name of one of several.
        system_instruction: a system message before them.
    """

    num_fewshot: int | None = at_least(0, None)
    apply_chat_template: bool | str = False
    system_instruction: str | None = None
    limit: float | None = None
    batch_size: int = at_least(1, 8)
    max_length: int = at_least(2, 2048)
    seed: int = 0
    include_path: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskResult:
    """One task of one model.

    Attributes:
        metrics: lm-eval's own results, by its own keys ("acc,none", "acc_stderr,none", …).
        samples: per metric, the value of every sample in the order of the documents; only metrics given per sample.
        documents: how many documents each process saw.
        version: of the task.
    """

    task: str
    metrics: dict[str, Any]
    samples: dict[str, list[float]]
    documents: list[int]
    version: Any

    def as_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "metrics": self.metrics,
            "samples": self.samples,
            "documents": self.documents,
            "version": self.version,
        }


def task_manager(include_path: Sequence[str] = ()) -> Any:
    """lm-eval's registry, with this package's own tasks and the user's."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError("lm-eval is not installed", fix="pip install 'polysurgery[eval]'") from error
    for folder in include_path:
        if not Path(folder).is_dir():
            raise EvaluationError("there is no such folder of task files", where=folder, fix="check --include-path")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        return TaskManager(include_path=[str(OWN_TASKS), *include_path])
    except Exception as error:
        raise EvaluationError(f"a task file cannot be read: {error}", where=", ".join(include_path)) from error


def resolve_tasks(manager: Any, names: Sequence[str]) -> list[str]:
    """The tasks that `names` (which may hold wildcards) stand for. Raises EvaluationError naming the nearest."""
    found: list[str] = []
    unknown = []
    for name in names:
        matched = manager.match_tasks([name])
        found += [task for task in matched if task not in found]
        if not matched:
            unknown.append(f"{name!r}{did_you_mean(name, manager.all_tasks)}")
    if unknown:
        raise EvaluationError(
            "no such task: " + ", ".join(unknown),
            fix="`lm-eval ls tasks` lists them; --include-path DIR adds your own",
        )
    return found


def language_model(model: Any, tokenizer: Any, settings: TaskSettings) -> Any:
    """lm-eval's wrapper around a model in memory, shared out over all processes, on any device.

    lm-eval takes a model in memory for the only process; here the wrapper is told rank and world size, so that the
    documents are shared out over all nodes, also on CPU. It counts the documents it was given.
    """
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):  # type: ignore[misc]
        seen: set[tuple[Any, Any]]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(self._noted(requests), disable_tqdm)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(self._noted(requests), disable_tqdm)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            return super().generate_until(self._noted(requests), disable_tqdm)

        def _noted(self, requests: list[Any]) -> list[Any]:
            self.seen |= {(request.task_name, request.doc_id) for request in requests}
            return requests

    wrapped = Counting(
        pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, max_length=settings.max_length
    )
    if settings.apply_chat_template:
        try:
            wrapped.chat_template(settings.apply_chat_template)
            wrapped.apply_chat_template([{"role": "user", "content": "…"}])
        except Exception as error:
            raise EvaluationError(
                f"the tokenizer has no such chat template: {first_line(error)}",
                where="--apply-chat-template",
                fix="leave it out for a base model",
            ) from error
    wrapped.seen = set()
    if processes.count() > 1:
        wrapped.accelerator = processes.accelerator()
        wrapped._rank, wrapped._world_size = processes.rank(), processes.count()
    return wrapped


def run_task(lm: Any, task: str, manager: Any, settings: TaskSettings) -> TaskResult | None:
    """One task (or group); None on every process but the first.

    Raises:
        EvaluationError: the task's data cannot be fetched (no network), or the task needs more than a language model.
    """
    from lm_eval import simple_evaluate

    lm.seen = set()
    try:
        found = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            apply_chat_template=settings.apply_chat_template,
            system_instruction=settings.system_instruction,
            log_samples=True,
            bootstrap_iters=1000,
            **dict.fromkeys(SEEDS, settings.seed),
        )
    except (OSError, ConnectionError, ValueError) as error:
        raise EvaluationError(
            f"the task could not be run: {first_line(error)}",
            where=task,
            cause="its data is on the Hub and there is no network, or a data file is missing",
            fix="check the network; tasks over local json files need none",
        ) from error
    shares = lm.gather_object(len(lm.seen))
    if found is None or shares is None:
        return None
    documents = [int(share) for share in shares]
    metrics = {
        name: {key: value for key, value in values.items() if _number(value)}
        for name, values in found["results"].items()
    }
    samples: dict[str, list[float]] = {}
    for name, rows in (found.get("samples") or {}).items():
        for row in sorted(rows, key=lambda row: (str(row.get("filter")), row["doc_id"])):
            for metric in row.get("metrics", ()):
                if _number(row.get(metric)):
                    samples.setdefault(f"{name}/{metric},{row.get('filter', 'none')}", []).append(float(row[metric]))
    return TaskResult(task, metrics, samples, documents, found["versions"].get(task))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def compared(before: TaskResult, after: TaskResult) -> list[dict[str, Any]]:
    """A row per (sub)task and metric: both values with lm-eval's own errors, and the paired difference with its."""
    rows = []
    for name, values in after.metrics.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not kind or key not in before.metrics.get(name, {}):
                continue
            first = before.metrics[name]
            row: dict[str, Any] = {
                "task": name, "metric": key, "original": first[key], "twin": value,
                "original_stderr": first.get(f"{metric}_stderr,{kind}"),
                "twin_stderr": values.get(f"{metric}_stderr,{kind}"),
                "difference": value - first[key], "difference_stderr": None, "paired_samples": 0,
            }  # fmt: skip
            ours, theirs = after.samples.get(f"{name}/{key}"), before.samples.get(f"{name}/{key}")
            if ours and theirs and len(ours) == len(theirs):
                mean, error = paired_difference(theirs, ours)
                if abs(mean - row["difference"]) < 1e-6:  # the metric is the mean of its samples
                    row |= {"difference_stderr": error, "paired_samples": len(ours)}
            rows.append(row)
    return rows
