"""The loop of a refinement: steps, looks at held-out text, the average of the weights, the state kept for a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.errors import CalibrationError, CheckpointError
from surgery.refining import sharding
from surgery.refining.losses import kl, sum_dtype
from surgery.refining.objectives import Objective
from surgery.refining.packing import PackedWindows
from surgery.refining.schedule import Schedule
from surgery.refining.sequence import TrainingWindows
from surgery.refining.sharding import local_part
from surgery.refining.student import Trainee
from surgery.runtime import processes
from surgery.runtime.files import replacing, write_json

MOST_SKIPPED = 10  # steps in a row that may be skipped for not being finite


STATE = ("key", "step", "skipped", "in_a_row", "stale", "losses", "curve", "seconds", "best_divergence")


def _means(sums: Tensor) -> dict[str, float]:
    nats, original, divergence = (sums[:3] / sums[3]).tolist()
    return {"nats": nats, "lost": nats - original, "divergence": divergence}


class Training:
    """One run; everything in it is restored by `resume`.

    Args:
        student: what is trained, ready to be.
        teacher: what held-out divergence is measured from.
        objective: one batch forward and backward.
        held: held-out windows by the name of their text; each is measured by itself and all together.
        key: settings that an interrupted run must share to be gone on with.
        log: called with what a tracker records, and the step.
    Where the network is sharded every process keeps its own part of the state.
    """

    def __init__(
        self,
        accelerator: Any,
        student: Trainee,
        teacher: Any,
        objective: Objective,
        schedule: Schedule,
        held: dict[str, PackedWindows],
        windows: TrainingWindows,
        key: dict[str, Any],
        log: Callable[[dict[str, float], int], None] | None = None,
    ) -> None:
        self.accelerator, self.teacher, self.objective, self.schedule = accelerator, teacher, objective, schedule
        self.network, self.trainable, self.optimizer = student.network, student.trainable, student.optimizer
        self.held, self.windows, self.key, self.log = held, windows, key, log
        self.sharded = sharding.is_sharded(self.network)
        self.rows = schedule.settings.batch * schedule.settings.accumulate * accelerator.num_processes  # windows a step
        self.step, self.skipped, self.in_a_row, self.stale, self.seconds = 0, 0, 0, 0, 0.0
        self.losses: list[float] = []
        self.curve: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.best_divergence = math.inf
        self.mean: dict[str, Tensor] = {}
        self.start = (
            {name: local_part(p).clone() for name, p in self.trainable.items()} if schedule.settings.anchor else {}
        )

    @property
    def tokens_seen(self) -> int:
        return int(self.step * self.rows * self.windows.length)

    def steps(self, quiet: bool, label: str = "refining") -> Iterator[None]:
        """Runs to the end; yields after every look at the held-out text."""
        from tqdm import tqdm

        schedule = self.schedule
        hidden = quiet or not self.accelerator.is_main_process
        with tqdm(total=schedule.steps, initial=self.step, desc=label, unit="step", disable=hidden) as bar:
            if not self.curve:
                self._look()
                yield
            patience = schedule.settings.patience
            while self.step < schedule.steps and not (patience and self.stale >= patience):
                self.losses.append(self._one_step())
                self.step += 1
                if self.log is not None:
                    self.log({"loss": self.losses[-1], "rate": schedule.rate_at(self.step - 1)}, self.step)
                bar.set_postfix_str(f"loss {self.losses[-1]:.4f}, held out {self.curve[-1]['lost']:+.4f} nats")
                bar.update(1)
                if self.step % schedule.settings.validate_every == 0 or self.step == schedule.steps:
                    self._look()
                    yield

    def _one_step(self) -> float:
        accelerator = self.accelerator
        windows = self.windows.of_step(self.step, self.rows)
        mine = windows[accelerator.process_index :: accelerator.num_processes]
        self.objective.done = self.step / self.schedule.steps
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.schedule.rate_at(self.step)
        losses = []
        for part in mine.split(self.schedule.settings.batch):
            with accelerator.accumulate(self.network):
                losses.append(self.objective(part))
                if accelerator.sync_gradients:
                    self._share_gradients()
                    norm = accelerator.clip_grad_norm_(list(self.trainable.values()), self.schedule.settings.clip)
                    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                    mean = accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
                    if bool(torch.isfinite(norm)) and bool(torch.isfinite(mean)):
                        self.optimizer.step()
                        self._pull_back()
                        self.in_a_row = 0
                        self._average()
                    else:
                        self._skip()
                    self.optimizer.zero_grad()
        value: float = mean.item()
        return value

    def _share_gradients(self) -> None:
        """For an objective that goes past the wrapper which does this by itself."""
        if self.accelerator.num_processes > 1 and getattr(self.objective, "unwrapped", False):
            for parameter in self.trainable.values():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def _average(self) -> None:
        if not self.schedule.settings.average:
            return
        now = {name: local_part(value) for name, value in self.trainable.items()}
        if not self.mean:
            self.mean = {name: value.clone() for name, value in now.items()}
        share = 1 - self.schedule.decay_at(self.step)
        for name, value in now.items():
            self.mean[name].lerp_(value, share)

    def _pull_back(self) -> None:
        share = min(1.0, self.schedule.settings.anchor * self.schedule.rate_at(self.step))
        with torch.no_grad():
            for name, value in self.start.items():
                local_part(self.trainable[name]).lerp_(value, share)

    def _skip(self) -> None:
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row > MOST_SKIPPED:
            raise CalibrationError(
                f"{self.in_a_row} steps in a row were not finite",
                where=f"step {self.step}",
                cause="a polynomial left the range it was fitted on",
                fix="lower --rate, or train with --dtype float32",
            )

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the weights are their running mean."""
        kept = {name: local_part(self.trainable[name]).clone() for name in self.mean}
        self._put(self.mean)
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                local_part(self.trainable[name]).copy_(value)
        sharding.drop_stale(self.network)

    def _look(self) -> None:
        """Held-out nats and KL of the mean weights; the best state so far is kept."""
        with self._averaged():
            row = self.look()
            if row["divergence"] < self.best_divergence:
                self.best_divergence, self.stale = row["divergence"], 0
                self.best = {name: local_part(value).cpu().clone() for name, value in self.trainable.items()}
            else:
                self.stale += 1
        self.curve.append({"step": self.step, "tokens": self.tokens_seen} | row)
        if self.log is not None:
            self.log({f"held_out_{name}": row[name] for name in ("nats", "lost", "divergence")}, self.step)

    def look(self) -> dict[str, Any]:
        """What the weights as they are lose on held-out text: nats, nats lost, divergence; and so for each text."""
        sums = {name: self._measured(windows) for name, windows in self.held.items()}
        texts = {"texts": {name: _means(values) for name, values in sums.items()}} if len(sums) > 1 else {}
        return _means(torch.stack(list(sums.values())).sum(0)) | texts

    def _measured(self, held: PackedWindows) -> Tensor:
        """Sums over tokens of the twin's nats, the original's, the divergence, and their number; float64.

        In the precision the weights are kept in, so that figures do not hang on how the twin was trained.
        """
        accelerator = self.accelerator
        model: Any = accelerator.unwrap_model(self.network)
        sums = torch.zeros(4, dtype=sum_dtype(accelerator.device), device=accelerator.device)
        mine = held[accelerator.process_index :: accelerator.num_processes]
        parts = [(part, 1.0) for part in mine.split(self.schedule.settings.batch)]
        if self.sharded:  # all processes put a layer together at once, so that all must run as many passes
            most = len(held[:: accelerator.num_processes].split(self.schedule.settings.batch))
            parts += [(held[:1], 0.0)] * (most - len(parts))
        with torch.no_grad():
            for part, counts in parts:
                given = part.inputs(accelerator.device)
                ours, goal = (m(**given, use_cache=False).logits[:, :-1] for m in (model, self.teacher))
                target, count = given["input_ids"][:, 1:].flatten(), given["input_ids"][:, 1:].numel()
                nats = [F.cross_entropy(logits.flatten(0, 1).float(), target) for logits in (ours, goal)]
                sums += torch.stack([*nats, kl(goal, ours), torch.ones_like(nats[0])]).to(sums) * counts * count
        total: Tensor = accelerator.reduce(sums, reduction="sum").cpu().double()
        return total

    def restore_best(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Puts the best state in place, rounded as it will be stored; what it loses so.

        Raises:
            CalibrationError: no state was finite.
        """
        if not self.best:
            raise CalibrationError("the divergence on held-out text was never finite", fix="train with --dtype float32")
        self._put({name: value.to(dtype) for name, value in self.best.items()})
        return self.look()

    def keep(self, place: Path) -> None:
        """Everything needed to go on exactly, under a temporary name and then renamed; of a sharded run by every
        process, and an earlier state goes when all have kept the new one."""
        accelerator = self.accelerator
        if not (accelerator.is_main_process or self.sharded):
            return
        state = {name: getattr(self, name) for name in STATE}
        tensors = {
            "state": state,
            "best": self.best,
            "optimizer": sharding.own_state(self.optimizer),
            "mean": self.mean,
            "windows": self.windows.state(),
            "now": {name: local_part(value).cpu() for name, value in self.trainable.items()},
        }
        file = self._file(place, self.step)
        with replacing(file) as temporary:
            torch.save(tensors, temporary)
        if self.sharded:
            accelerator.wait_for_everyone()
            for other in place.glob(self._file(place, "*").name):
                if other != file:
                    other.unlink()
        if accelerator.is_main_process:
            write_json(place / "progress.json", state)

    def _file(self, place: Path, step: int | str) -> Path:
        return place / (f"state-{step}-of-{self.accelerator.process_index}.pt" if self.sharded else "state.pt")

    def _latest(self, place: Path) -> Path:
        """The state to go on from: of a sharded run the last that every process has kept."""
        if not self.sharded:
            return self._file(place, 0)
        steps = [int(file.name.split("-")[1]) for file in place.glob(self._file(place, "*").name)]
        common = set(steps).intersection(*processes.gather(steps))
        return self._file(place, max(common, default=0))

    def resume(self, place: Path) -> None:
        """Goes on from `keep`. Raises CheckpointError where the folder is another run's."""
        file = self._latest(place)
        if not file.is_file():
            return
        kept = torch.load(file, map_location="cpu", weights_only=True)
        state = kept["state"]
        if json.loads(json.dumps(state["key"])) != json.loads(json.dumps(self.key)):
            if state["step"] == 0:
                return  # nothing was done yet
            raise CheckpointError(
                "an interrupted refinement with other settings, models or text left its state here",
                where=str(place),
                fix="repeat the earlier command to finish it, or give --restart to discard it",
            )
        for name in set(STATE) - {"key"}:
            setattr(self, name, state[name])
        self.best = kept["best"]
        self.windows.load_state(kept.get("windows"))
        sharding.load_own_state(self.optimizer, kept["optimizer"])
        self.mean = {name: value.to(self.trainable[name].device) for name, value in kept["mean"].items()}
        self._put(kept["now"])
