"""Two processes that share the calibration batches make the twin that one makes."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from surgery.runtime import processes
from surgery.runtime.launch import _first_failure
from tests import commands, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("group")
    tiny.save_with_tokenizer("llama", place / "base")
    return place


def convert(folder, name, *more):
    run = commands.process if "--nproc" in more else commands.surgery
    return run(
        "convert", folder / "base", "-o", folder / name, "--json", "--text", "python", "--tokens", "6000",
        "--window", "32", "--measure", "512", *more,
    )  # fmt: skip


def test_two_processes_make_the_twin_that_one_makes(folder):
    exact = ("--epochs", "0")
    alone, together = convert(folder, "alone", *exact), convert(folder, "together", *exact, "--nproc", "2")
    assert alone.returncode == together.returncode == 0, together.stderr
    one, two = (json.loads(done.stdout) for done in (alone, together))
    assert one["calibration"] == two["calibration"]
    assert one["perplexity"]["nats"] == pytest.approx(two["perplexity"]["nats"], abs=1e-6)
    for mine, theirs in zip(one["blocks"], two["blocks"], strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["ridge"] == theirs["ridge"]
        assert mine["r2_held"] == pytest.approx(theirs["r2_held"], abs=1e-6)
    first, second = (load_file(folder / name / "model.safetensors") for name in ("alone", "together"))
    for name, value in first.items():
        # Sums are float64 in another order; passes are float32, so the second block differs by their rounding.
        assert (value - second[name]).norm() <= 2e-5 * value.norm(), name


def test_two_processes_descend_on_the_same_steps(folder):
    """Not to the last digit: Adam divides by the gradient's size, so that the order of a sum shows where it is small.
    Steps on half of the tokens would show in the second digit."""
    alone, together = convert(folder, "descended"), convert(folder, "descended-together", "--nproc", "2")
    assert alone.returncode == together.returncode == 0, together.stderr
    one, two = (json.loads(done.stdout) for done in (alone, together))
    assert one["perplexity"]["nats"] == pytest.approx(two["perplexity"]["nats"], abs=2e-3)
    for mine, theirs in zip(one["blocks"], two["blocks"], strict=True):
        assert mine["r2_fit"] == pytest.approx(theirs["r2_fit"], abs=2e-3)


def test_more_processes_than_batches_is_an_error(folder):
    done = convert(folder, "few", "--nproc", "2", "--tokens", "400", "--batch", "64", "--short", "0")
    assert done.returncode == 2
    assert "calibration batches" in done.stderr
    assert not (folder / "few").exists()


TWICE = """
import json, os, sys, surgery
from surgery.runtime import processes
folder, said = sys.argv[1], []
for name in ("refused", "first", "second"):
    settings = dict(text="python", tokens=4000, window=32, measure=512)
    try:
        _, report = surgery.convert(f"{folder}/base", output=f"{folder}/{name}", **settings)
        said.append([processes.rank(), processes.count(), report.perplexity["nats"]])
    except surgery.SurgeryError as error:
        said.append(error.where.rpartition("/")[2])
processes.leave()
open(f"{folder}/said-{os.environ['RANK']}.json", "w").write(json.dumps(said))
"""


def test_a_script_under_a_launcher_converts_twice(folder):
    """The group outlives a conversion, and its processes agree on what it cost; or on what the first one refuses."""
    (folder / "refused.partial").mkdir()
    (folder / "refused.partial" / "model.layers.0.mlp.safetensors").write_bytes(b"of another run")
    (folder / "twice.py").write_text(TWICE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(folder / "twice.py"), str(folder)], check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (refused, *mine), (also_refused, *theirs) = (
        json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1)
    )
    assert refused == also_refused == "refused.partial"
    assert [said[:2] for said in mine] == [[0, 2], [0, 2]]
    assert [said[:2] for said in theirs] == [[1, 2], [1, 2]]
    assert len({said[2] for said in (*mine, *theirs)}) == 1
    assert (folder / "first" / "config.json").is_file() and (folder / "second" / "config.json").is_file()


def ends(code, after=0.0):
    return subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({after}); raise SystemExit({code})"])


def test_the_error_that_can_be_mended_goes_before_those_it_causes():
    assert _first_failure([ends(1), ends(2, after=1)]) == 1
    assert _first_failure([ends(0), ends(1)]) == 1
    assert _first_failure([ends(0), ends(0)]) is None


def test_a_process_that_hangs_does_not_hide_the_failure_of_another():
    hanging = ends(0, after=60)
    assert _first_failure([hanging, ends(1)]) == 1
    assert hanging.poll() is None
    hanging.kill()
    hanging.wait()


def test_alone_everything_is_given_back():
    rows = torch.randn(3, 2)
    assert processes.together(rows) is rows
    assert processes.total(rows) is rows
    assert processes.sum_number(3) == 3
    assert processes.own_part([1, 2, 3]) == (0, [1, 2, 3])
    assert processes.gather("a") == processes.gather_to_first("a") == ["a"]
    assert processes.looked_up(lambda: "a") == "a"
    assert processes.first()
