"""Converting with several processes on this machine: time and efficiency, in closed form and with descent.

    python benchmarks/processes.py MODEL [--tokens 8192] [--processes 1 2 4] [--epochs 0 3]

Every process has one thread. Efficiency is the time of one process over that of N, divided by N or by the cores where
those are fewer: what is lost to adding up sums, to waiting for one another and to what each process does for itself.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from surgery.runtime.settings import whole_number


def seconds(options: argparse.Namespace, processes: int, epochs: int) -> float:
    """Of the conversion, without loading and saving; what it found is left in no place."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "surgery", "convert", options.model, "-o", f"{folder}/twin", "--json"]
        command += ["--text", options.text, "--tokens", str(options.tokens), "--measure", "0"]
        command += ["--batch", "2"]  # enough batches for every process to have as much of the text
        command += ["--epochs", str(epochs), "--nproc", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return float(json.loads(Path(folder, "twin", "surgery.json").read_text())["seconds"]["convert"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", default="python")
    parser.add_argument("--tokens", type=whole_number, default=8192)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--epochs", type=int, nargs="+", default=[0, 3])
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for epochs in options.epochs:
        alone = seconds(options, 1, epochs)
        for processes in options.processes:
            taken = alone if processes == 1 else seconds(options, processes, epochs)
            efficiency = alone / taken / min(processes, cores)
            print(
                f"epochs {epochs}, {processes} of {cores} cores: {taken:.1f} s, efficiency {efficiency:.2f}", flush=True
            )


if __name__ == "__main__":
    main()
