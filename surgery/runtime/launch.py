"""`--nproc`: starts several processes of this package on this machine, which join one group."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from surgery.errors import EXIT_USER, SurgeryError

MARK = "POLYSURGERY_LAUNCHED"  # set in what --nproc starts, so that it does not start more
GRACE = 3.0  # seconds in which the error of another may turn out to be the cause


def started() -> bool:
    """Whether a launcher (ours, `accelerate launch` or torchrun) has started this process already."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or MARK in os.environ


def relaunch(count: int, arguments: Sequence[str]) -> int:
    """Runs `surgery ARGUMENTS` in `count` processes on this machine, which accelerate then joins; the exit code.

    What `accelerate launch` does on GPUs, on CPU too (where it starts one process only), and with exit codes kept: a
    process that fails ends the others, and its error is the last one shown. Threads are shared out.
    """
    import torch

    gpus = torch.cuda.device_count()
    if gpus and count > gpus:
        raise SurgeryError(f"{count} processes on {gpus} GPUs", where="--nproc", fix=f"at most {gpus}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ, MARK: "1"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
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
        if failed and started_here[0].returncode != EXIT_USER:  # else the first one has said it
            quiet[failed - 1].seek(0)
            sys.stderr.write(quiet[failed - 1].read())
        return 0 if failed is None else started_here[failed].returncode


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits until all have ended well (None), or one has not: its rank.

    One that ends takes the others with it, whose connections break; so what a user can mend goes before the rest.
    """
    earliest, until = None, 0.0
    while True:
        codes = [process.poll() for process in processes]
        if EXIT_USER in codes:
            return codes.index(EXIT_USER)
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is None and None not in codes:
            return None
        if earliest is None and failed is not None:
            earliest, until = failed, time.monotonic() + GRACE
        if earliest is not None and (None not in codes or time.monotonic() > until):
            return earliest
        time.sleep(0.1)
