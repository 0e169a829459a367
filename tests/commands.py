"""The command line, in this process: one of its own costs seconds that most tests have no use for."""

import contextlib
import io
import subprocess
import sys
from unittest import mock

from surgery.cli.main import main

KILLED_AT_THE_SECOND_BLOCK = """
import os, signal
from surgery.cli.main import main
from surgery.fitting import either
calls, real = [], either.fit_block
def fit_block(*given):
    calls.append(given)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given)
either.fit_block = fit_block
main()
"""
"""`surgery …`, for `python -c`: the first block is finished, the second is not."""


def process(*arguments, **more) -> subprocess.CompletedProcess:
    """The same in a process of its own, as users have it; `--nproc` needs that."""
    command = [sys.executable, "-m", "surgery", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def surgery(*arguments) -> subprocess.CompletedProcess:
    """`surgery ARGUMENTS`: its exit code and what it printed, as a shell would see them."""
    words = ["surgery", *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", words):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
