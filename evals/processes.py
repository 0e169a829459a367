"""Several processes, each with its share of the documents, through accelerate; on CUDA and on CPU (gloo)."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evals.text import EvaluationError

MARK = "POLYSURGERY_LAUNCHED"  # set in what --nproc starts, so that it does not start more


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
        rank, count: global, over all nodes.
        accelerator: accelerate's, None for a single process.
    """

    rank: int = 0
    count: int = 1
    accelerator: Any | None = None

    @staticmethod
    def join() -> Processes:
        """Joins the group that `accelerate launch` (or torchrun) started; alone otherwise."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Processes()
        import torch
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        return Processes(accelerator.process_index, accelerator.num_processes, accelerator)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Any]) -> Any:
        """Every `count`-th item (or row of a tensor), from the rank's own on."""
        return items[self.rank :: self.count]

    def gather(self, item: Any) -> list[Any]:
        """The items of all processes, in order of rank; complete on the first, empty on the others."""
        if self.count == 1:
            return [item]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count if self.first else []
        dist.gather_object(item, found if self.first else None)
        return found

    def agree(self, item: Any) -> Any:
        """The first process's item, on all."""
        if self.count == 1:
            return item
        import torch.distributed as dist

        box = [item]
        dist.broadcast_object_list(box)
        return box[0]

    def leave(self) -> None:
        if self.accelerator is not None:
            self.accelerator.end_training()


def started() -> bool:
    """Whether a launcher (ours, `accelerate launch` or torchrun) has started this process already."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or MARK in os.environ


def relaunch(count: int, arguments: Sequence[str]) -> int:
    """Runs `surgery ARGUMENTS` in `count` processes on this machine, which accelerate then joins; the exit code.

    What `accelerate launch` does on GPUs, on CPU too (where it starts one process only), and with exit codes kept: the
    first process to fail ends the others, and its error is the only one shown. Threads are shared out.
    """
    import torch

    gpus = torch.cuda.device_count()
    if gpus and count > gpus:
        raise EvaluationError(f"{count} processes on {gpus} GPUs", where="--nproc", fix=f"at most {gpus}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ, MARK: "1",
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        quiet = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count - 1)]
        started_here = [
            subprocess.Popen(
                [sys.executable, "-m", "surgery", *arguments],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=None if rank == 0 else quiet[rank - 1],
            )
            for rank in range(count)
        ]
        try:
            failed = _first_failure(started_here)
        finally:
            for process in started_here:
                process.terminate()
                process.wait()
        if failed:
            quiet[failed - 1].seek(0)
            sys.stderr.write(quiet[failed - 1].read())
        return 0 if failed is None else started_here[failed].returncode


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits until all have ended well (None), or one has not (its rank)."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.1)
