"""A brief distillation of a twin from its original: what the closed form leaves, made smaller.

    L = mean over tokens of T² KL(softmax(original ÷ T) ‖ softmax(twin ÷ T))

Teacher and twin share every tensor that is not trained, so memory holds one model, the original's feed-forward blocks
and the optimiser's state. Training windows are drawn in one seeded order and shared out between the processes, so that
a step sees the same text whatever their number, as long as batch × accumulate × processes is the same.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import checkpoint, loading
from surgery.calibration import sequences
from surgery.card import read_twin
from surgery.distill import kl, named_trainable, share
from surgery.errors import CalibrationError, CheckpointError, RecipeError
from surgery.texts import frame, tokens_of

MOST_SKIPPED = 10  # steps in a row that may be skipped for not being finite


@dataclass(frozen=True)
class RefineSettings:
    """What `surgery refine` does; the options of the same names.

    Attributes:
        text, tokens, length: training text, how much of it, and tokens a window.
        batch, accumulate: windows a forward pass and process, and forward passes a step.
        train: coefficients, readout, block or all.
        rate, warmup, clip: peak learning rate, share of the steps to reach it, bound on the gradient's norm.
        temperature: T of the loss.
        validate_tokens, validate_every: held-out tokens, and steps between two looks at them.
        patience: looks without improvement after which to stop; 0 never stops early.
    """

    twin: str
    teacher: str
    output: str
    text: str = "python"
    tokens: int = 51_200
    length: int = 256
    batch: int = 4
    accumulate: int = 1
    train: str = "block"
    rate: float = 1e-4
    warmup: float = 0.05
    clip: float = 1.0
    temperature: float = 1.0
    validate_tokens: int = 4096
    validate_every: int = 10
    patience: int = 0
    dtype: str = "float32"
    seed: int = 0
    teacher_revision: str | None = None


def refine(
    settings: RefineSettings, overwrite: bool = False, restart: bool = False, quiet: bool = True
) -> dict[str, Any]:
    """Distils, keeps the state of least held-out divergence, saves and verifies; the refinement's record.

    Raises:
        SurgeryError: teacher and twin do not match, too little text, values not finite, a folder of another run.
    """
    from accelerate import Accelerator

    out = Path(settings.output)
    report = read_twin(Path(settings.twin))
    checkpoint.check_target(out, overwrite)
    accelerator = Accelerator(gradient_accumulation_steps=settings.accumulate)
    loaded = loading.load(settings.twin, dtype=settings.dtype)
    student: Any = loaded.model
    trainable = named_trainable(student, settings.train)
    teacher: Any = loading.load(settings.teacher, settings.teacher_revision, settings.dtype).model
    held, windows = _windows(settings, loaded.tokenizer, report, accelerator.num_processes)
    optimizer = torch.optim.AdamW(trainable.values(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.0)
    network, optimizer = accelerator.prepare(student, optimizer)
    teacher.to(accelerator.device)
    saved = share(student, teacher, set(trainable))  # only now, since moving to a device copies

    run = _Run(settings, accelerator, network, teacher, trainable, optimizer, held, windows)
    place = out.with_name(out.name + ".refining")
    run.resume(place, restart)
    begun = time.monotonic()
    for _ in run.steps(quiet):
        run.keep(place)
    run.restore_best()
    record = run.record(time.monotonic() - begun) | {"shared_bytes": saved}
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        report["refinement"] = record
        probe = checkpoint.probe_inputs({"input_ids": held[:2].to(accelerator.device)})
        dtype = loaded.source.dtype
        checkpoint.save(student, loaded.tokenizer, out, report, probe, dtype=dtype, native=report["form"] == "native")
        shutil.rmtree(place, ignore_errors=True)
    accelerator.end_training()
    return record


def _windows(settings: RefineSettings, tokenizer: Any, report: dict[str, Any], processes: int) -> tuple[Tensor, Tensor]:
    """Held-out windows, then training windows: of the text after what the conversion was calibrated on."""
    used = report["calibration"]
    skip = used["tokens"] if used["source"] == settings.text else 0
    ids = tokens_of(settings.text, tokenizer, settings.validate_tokens + settings.tokens, skip)
    rows = sequences(ids, settings.length, frame(tokenizer), settings.text)
    held = max(1, settings.validate_tokens // settings.length)
    if len(rows) - held < settings.batch * settings.accumulate * processes:
        raise CalibrationError(
            f"{len(ids):,} tokens are too few for {held} held-out windows of {settings.length} and one step",
            where=settings.text,
            fix="give more text, or lower --length, --batch or --validate-tokens",
        )
    return rows[:held], rows[held:]


class _Run:
    """State of one refinement; everything in it is restored by `resume`."""

    def __init__(
        self, settings: RefineSettings, accelerator: Any, network: nn.Module, teacher: Any,
        trainable: dict[str, nn.Parameter], optimizer: Any, held: Tensor, windows: Tensor,
    ) -> None:  # fmt: skip
        self.settings, self.accelerator, self.network, self.teacher = settings, accelerator, network, teacher
        self.trainable, self.optimizer, self.held, self.windows = trainable, optimizer, held, windows
        self.rows = settings.batch * settings.accumulate * accelerator.num_processes  # windows a step
        self.total = len(windows) // self.rows
        generator = torch.Generator().manual_seed(settings.seed)
        self.order = torch.randperm(len(windows), generator=generator)
        self.step, self.skipped, self.in_a_row, self.stale = 0, 0, 0, 0
        self.losses: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_divergence = math.inf

    def steps(self, quiet: bool) -> Iterator[None]:
        """Runs to the end; yields after every look at the held-out text."""
        from tqdm import tqdm

        hidden = quiet or not self.accelerator.is_main_process
        with tqdm(total=self.total, initial=self.step, desc="refining", unit="step", disable=hidden) as bar:
            if not self.curve:
                self._look()
                yield
            while self.step < self.total and not (self.settings.patience and self.stale >= self.settings.patience):
                self.losses.append(self._one_step())
                self.step += 1
                bar.set_postfix_str(f"KL {self.losses[-1]:.4f}, held out {self.curve[-1]['nats']:.4f} nats")
                bar.update(1)
                if self.step % self.settings.validate_every == 0 or self.step == self.total:
                    self._look()
                    yield

    def _one_step(self) -> float:
        settings, accelerator = self.settings, self.accelerator
        rows = self.windows[self.order[self.step * self.rows : (self.step + 1) * self.rows]]
        mine = rows[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        losses = []
        for part in mine.split(settings.batch):
            with accelerator.accumulate(self.network):
                with torch.no_grad():
                    goal = self.teacher(input_ids=part, use_cache=False).logits
                loss = kl(goal, self.network(input_ids=part, use_cache=False).logits, settings.temperature)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(list(self.trainable.values()), settings.clip)
                    mean = accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
                    if bool(torch.isfinite(norm)) and bool(torch.isfinite(mean)):
                        self.optimizer.step()
                        self.in_a_row = 0
                    else:
                        self._skip()
                    self.optimizer.zero_grad()
        value: float = mean.item()
        return value

    def _skip(self) -> None:
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row > MOST_SKIPPED:
            raise CalibrationError(
                f"{self.in_a_row} steps in a row were not finite",
                where=f"step {self.step}",
                cause="a polynomial left the range it was fitted on",
                fix="lower --rate, or use --dtype float32",
            )

    def _rate(self) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        warm = max(1, round(self.settings.warmup * self.total))
        done = (self.step - warm) / max(1, self.total - warm)
        share: float = (self.step + 1) / warm if done < 0 else 0.1 + 0.45 * (1 + math.cos(math.pi * done))
        return self.settings.rate * share

    def _look(self) -> None:
        """Held-out nats and KL; the best state so far is kept."""
        model = self.accelerator.unwrap_model(self.network)
        sums = torch.zeros(4, dtype=torch.float64, device=self.accelerator.device)
        mine = self.held[self.accelerator.process_index :: self.accelerator.num_processes]
        with torch.no_grad():
            for part in mine.split(self.settings.batch):
                ids = part.to(self.accelerator.device)
                ours, goal = (m(input_ids=ids, use_cache=False).logits[:, :-1] for m in (model, self.teacher))
                target, count = ids[:, 1:].flatten(), ids[:, 1:].numel()
                nats = [F.cross_entropy(logits.flatten(0, 1).float(), target) for logits in (ours, goal)]
                sums += torch.stack([*nats, kl(goal, ours), torch.ones_like(nats[0])]).double() * count
        sums = self.accelerator.reduce(sums, reduction="sum")
        nats_now, original, divergence = (sums[:3] / sums[3]).tolist()
        tokens = self.step * self.rows * self.settings.length
        self.curve.append(
            {
                "step": self.step,
                "tokens": tokens,
                "nats": nats_now,
                "lost": nats_now - original,
                "divergence": divergence,
            }
        )
        if divergence < self.best_divergence:
            self.best_divergence, self.stale = divergence, 0
            self.best = {name: value.detach().cpu().clone() for name, value in self.trainable.items()}
        else:
            self.stale += 1

    def restore_best(self) -> None:
        with torch.no_grad():
            for name, value in self.trainable.items():
                value.copy_(self.best[name])

    def record(self, seconds: float) -> dict[str, Any]:
        """What the report says of the refinement."""
        first, best = self.curve[0], min(self.curve, key=lambda row: row["divergence"])
        return {
            "settings": asdict(self.settings),
            "processes": self.accelerator.num_processes,
            "trained_parameters": sum(value.numel() for value in self.trainable.values()),
            "tokens_seen": self.step * self.rows * self.settings.length,
            "seconds": round(seconds, 1),
            "held_out_tokens": self.held.shape[0] * (self.held.shape[1] - 1),
            "lost_before": first["lost"],
            "lost_after": best["lost"],
            "best_step": best["step"],
            "divergence_before": first["divergence"],
            "divergence_after": best["divergence"],
            "skipped_steps": self.skipped,
            "curve": self.curve,
            "losses": self.losses,
        }

    def _key(self) -> dict[str, Any]:
        return asdict(self.settings) | {"processes": self.accelerator.num_processes}

    def keep(self, place: Path) -> None:
        """Everything needed to go on exactly, under a temporary name and then renamed."""
        if self.accelerator.is_main_process:
            state = {
                "key": self._key(), "step": self.step, "skipped": self.skipped, "in_a_row": self.in_a_row,
                "stale": self.stale, "losses": self.losses, "curve": self.curve,
                "best_divergence": self.best_divergence,
            }  # fmt: skip
            place.mkdir(parents=True, exist_ok=True)
            tensors = {
                "state": state, "best": self.best, "optimizer": self.optimizer.state_dict(),
                "now": {name: value.detach().cpu() for name, value in self.trainable.items()},
            }  # fmt: skip
            torch.save(tensors, place / "state.tmp")
            (place / "state.tmp").replace(place / "state.pt")
            checkpoint.write_json(place / "progress.json", state)

    def resume(self, place: Path, restart: bool) -> None:
        """Goes on from `keep`. Raises CheckpointError where the folder is another run's."""
        file = place / "state.pt"
        if restart and self.accelerator.is_main_process:
            shutil.rmtree(place, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if not file.is_file():
            return
        kept = torch.load(file, map_location="cpu", weights_only=True)
        state = kept["state"]
        if json.loads(json.dumps(state["key"])) != json.loads(json.dumps(self._key())):
            raise CheckpointError(
                "an interrupted refinement with other settings left its state here",
                where=str(place),
                fix="repeat the earlier command to finish it, or give --restart to discard it",
            )
        self.step, self.skipped, self.in_a_row = state["step"], state["skipped"], state["in_a_row"]
        self.stale, self.losses, self.curve = state["stale"], state["losses"], state["curve"]
        self.best, self.best_divergence = kept["best"], state["best_divergence"]
        self.optimizer.load_state_dict(kept["optimizer"])
        with torch.no_grad():
            for name, value in self.trainable.items():
                value.copy_(kept["now"][name])


def check(settings: RefineSettings) -> None:
    """What can be wrong before a model is loaded."""
    read_twin(Path(settings.twin))
    loading.load_config(settings.teacher, settings.teacher_revision)
    positive = ("tokens", "length", "batch", "accumulate", "rate", "clip", "temperature", "validate_every")
    for name in positive:
        if not getattr(settings, name) > 0:
            raise RecipeError(f"{getattr(settings, name)} is not positive", where=f"--{name.replace('_', '-')}")
