"""Two processes that share the calibration batches make the twin that one makes."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from surgery.runtime import processes
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("group")
    tiny.save_with_tokenizer("llama", place / "base")
    return place


def convert(folder, name, *more):
    done = subprocess.run(
        [sys.executable, "-m", "surgery", "convert", str(folder / "base"), "-o", str(folder / name), "--json",
         "--calibration", "python", "--tokens", "6000", "--length", "32", "--measure", "512", *more],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    return done


def test_two_processes_make_the_twin_that_one_makes(folder):
    alone, together = convert(folder, "alone"), convert(folder, "together", "--nproc", "2")
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


def test_more_processes_than_batches_is_an_error(folder):
    done = convert(folder, "few", "--nproc", "2", "--tokens", "400", "--batch", "64", "--short", "0")
    assert done.returncode == 2
    assert "calibration batches" in done.stderr
    assert not (folder / "few").exists()


def test_alone_everything_is_given_back():
    rows = torch.randn(3, 2)
    assert processes.together(rows) is rows
    assert processes.total(rows) is rows
    assert processes.sum_number(3) == 3
    assert processes.own_part([1, 2, 3]) == (0, [1, 2, 3])
    assert processes.gather("a") == ["a"]
    assert processes.first()
