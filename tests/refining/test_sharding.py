"""Several processes refine as one does, whether each holds the whole model or a part of it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from surgery.errors import ModelError, RecipeError
from surgery.refining import own_texts, sharding
from tests import commands

STOPS = """
import os, sys
from surgery.cli.main import main
from surgery.refining import training
looks, real = [], training.Training.keep
def keep(self, place):
    real(self, place)
    looks.append(self.step)
    if len(looks) == 3:
        os._exit(9)
training.Training.keep = keep
main()
"""


FOUR_TEXTS_AT_ONCE = """
from surgery.cli.main import main
from surgery.refining import own_texts
own_texts.DRAWN_TOGETHER = 4
main()
"""


def arguments(place, twin, out, *more):
    base = {"native": "llama", "plain": "gpt2"}[twin]
    return [
        "refine", str(place / twin), "--original", str(place / base), "-o", str(out), "--text",
        str(place / "text.txt"), "--tokens", "2048", "--window", "32", "--validate-tokens", "544", "--validate-every",
        "2", "--rate", "0.003", "--accumulate", "1", "--dtype", "float32", "--average", "0.5", *map(str, more),
    ]  # fmt: skip


def both(*command):
    """Two processes, as accelerate and torchrun start them; what they exit with, and what they say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    said = [rank.communicate()[1].decode()[-3000:] for rank in ranks]
    return [rank.returncode for rank in ranks], said


def record(folder):
    return json.loads((folder / "surgery.json").read_text())["refinement"]


def assert_alike(one, two):
    """Figures and weights, up to the rounding of sums taken in another order."""
    first, second = record(one), record(two)
    assert second["losses"] == pytest.approx(first["losses"], rel=1e-4)
    assert [r["nats"] for r in second["curve"]] == pytest.approx([r["nats"] for r in first["curve"]], rel=1e-5)
    assert second["trained_parameters"] == first["trained_parameters"]
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert (value - theirs[name]).norm() <= 1e-3 * value.norm(), name


@pytest.mark.parametrize(
    ("twin", "more"),
    [
        ("native", ["--text", "samples"]),
        ("native", ["--shard", "--train", "all", "--checkpointing"]),
        ("native", ["--shard", "--train", "lora", "--text", "samples"]),
        ("plain", ["--shard", "--control", "--text", "samples"]),
    ],
)
def test_two_processes_refine_as_one_does(place, tmp_path, monkeypatch, twin, more):
    """The same global batch: 8 windows in one process, 4 in each of two; an odd number of held-out windows. Of the
    original's texts each draws some."""
    monkeypatch.setattr(own_texts, "DRAWN_TOGETHER", 4)
    same = [word for word in more if word != "--shard"]
    alone = commands.surgery(*arguments(place, twin, tmp_path / "one", "--batch", 8, *same))
    assert alone.returncode == 0, alone.stderr
    assert "held-out tokens" in alone.stdout
    codes, errors = both("-c", FOUR_TEXTS_AT_ONCE, *arguments(place, twin, tmp_path / "two", "--batch", 4, *more))
    assert codes == [0, 0], errors
    assert record(tmp_path / "two")["processes"] == 2
    assert record(tmp_path / "two")["sharded"] == ("--shard" in more)
    assert_alike(tmp_path / "one", tmp_path / "two")
    if "--control" in more:
        one, two = (record(tmp_path / name)["control"] for name in ("one", "two"))
        assert two["nats_after"] == pytest.approx(one["nats_after"], rel=1e-5)


def test_a_killed_sharded_run_goes_on_exactly(place, tmp_path):
    given = ("--batch", 4, "--shard", "--train", "all", "--text", "samples")
    codes, errors = both("-m", "surgery", *arguments(place, "native", tmp_path / "whole", *given))
    assert codes == [0, 0], errors
    cut = arguments(place, "native", tmp_path / "cut", *given)
    assert both("-c", STOPS, *cut)[0] == [9, 9]
    assert not (tmp_path / "cut").exists()
    kept = sorted(file.name for file in (tmp_path / "cut.refining").glob("state*"))
    assert kept == ["state-4-of-0.pt", "state-4-of-1.pt"]
    # Another process died before it could keep the newest: the last state that both have is gone on from.
    shutil.copy(tmp_path / "cut.refining" / kept[0], tmp_path / "cut.refining" / "state-6-of-0.pt")
    codes, errors = both("-m", "surgery", *cut)
    assert codes == [0, 0], errors
    assert record(tmp_path / "cut")["losses"] == record(tmp_path / "whole")["losses"]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_several_processes_refuse(place, tmp_path):
    blended = arguments(place, "native", tmp_path / "out", "--shard", "--blend", 0.5)
    codes, errors = both("-m", "surgery", *blended)
    assert codes == [2, 2] and "cannot be run by themselves" in errors[0]
    assert not (tmp_path / "out").exists()

    def asked(kind, processes=2, asked=True, **plugin):
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin))
        return sharding.wanted(
            SimpleNamespace(distributed_type=f"DistributedType.{kind}", num_processes=processes, state=state), asked
        )

    assert asked("MULTI_GPU") and not asked("MULTI_GPU", asked=False) and not asked("NO", 1, asked=False)
    assert asked("FSDP", asked=False, fsdp_version=2, cpu_offload=None)
    with pytest.raises(ModelError, match="version 2"):
        asked("FSDP", fsdp_version=1, cpu_offload=None)
    with pytest.raises(ModelError, match="DEEPSPEED"):
        asked("DEEPSPEED")
    with pytest.raises(RecipeError, match="one process"):
        asked("NO", 1)
