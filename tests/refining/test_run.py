"""Refinement by distillation, at tiny size."""

import json

import pytest
import torch

import surgery
from surgery.errors import CheckpointError
from surgery.refining.run import refined
from tests import commands
from tests.refining.support import interrupted, settings_of


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_distillation_lowers_the_loss_and_a_native_twin_stays_native(place, tmp_path):
    record = refined(settings_of(place, tmp_path / "out"))
    assert record["divergence_after"] < 0.7 * record["divergence_before"]
    assert record["divergence_after"] == min(row["divergence"] for row in record["curve"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_act"] == "linear"
    assert config == json.loads((place / "native" / "config.json").read_text())
    report = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert report["refinement"]["tokens_seen"] == 4096
    assert report["verification"]["verified"]
    before, after = weights(place / "native"), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".mlp." in name for name in changed), "only the blocks were trained"


def test_a_killed_run_goes_on_exactly(place, tmp_path):
    whole = refined(settings_of(place, tmp_path / "whole"))
    settings = settings_of(place, tmp_path / "cut")
    with interrupted(after=3):
        refined(settings)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(CheckpointError, match="other settings"):
        refined(settings_of(place, tmp_path / "cut", rate=1e-3))
    again = refined(settings)
    assert again["losses"] == whole["losses"]
    assert [row["nats"] for row in again["curve"]] == [row["nats"] for row in whole["curve"]]
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (tmp_path / "cut.refining").exists()


def test_a_run_that_gains_nothing_keeps_the_start_and_says_so(place, tmp_path):
    record = refined(settings_of(place, tmp_path / "out", rate=3.0, clip=1e9))
    assert record["divergence_after"] == record["divergence_before"]
    before, after = weights(place / "native"), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert record["best_step"] == 0


def test_steps_that_are_not_finite_are_skipped_and_then_an_error(place, tmp_path, monkeypatch):
    from surgery.refining import objectives

    monkeypatch.setattr(objectives, "kl", lambda goal, found, temperature=1.0: found.float().sum() * float("nan"))
    with pytest.raises(surgery.SurgeryError, match="not finite"):
        refined(settings_of(place, tmp_path / "out", validate_every=1000))
    assert not (tmp_path / "out").exists()


def command(place, out, **more):
    options = {"--original": place / "llama", "-o": out, "--text": place / "text.txt", "--tokens": 2048, "--window": 32}
    options |= {"--validate-tokens": 512, "--rate": 0.003, "--validate-every": 4, "--accumulate": 1}
    options |= {"--dtype": "float32"} | more
    return ["refine", place / "native", *(part for item in options.items() for part in item)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--tokens": 64, "--validate-tokens": 64, "--batch": 64}, ["too few"]),
        ({"--tokens": "many"}, ["is not a whole number"]),
        ({"--objective": "locl"}, ["did you mean 'local'"]),
        ({"--train": "lora", "--lora-modules": "nowhere"}, ["nowhere"]),
        ({"--report-to": "tensorboard2"}, ["tensorboard2", "not installed"]),
        ({"--average": 1}, ["--average"]),
        ({"--train": "blok"}, ["did you mean 'block'"]),
        ({"--rate": -1}, ["--rate", "not positive"]),
        ({"--original": "nowhere/"}, ["nowhere"]),
    ],
)
def test_bad_input_is_a_clear_error(place, tmp_path, change, words):
    done = commands.surgery(*command(place, tmp_path / "out", **change))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "out").exists()


def test_that_sentences_are_left_out_is_said(place, tmp_path, monkeypatch, capsys):
    """Where packed documents see each other, sentences by themselves would see each other, too."""
    monkeypatch.setattr("surgery.refining.text.packable", lambda model: False)
    record = refined(settings_of(place, tmp_path / "out", tokens=1024), quiet=False)
    assert "no sentences by themselves" in record["note"]
    assert "no sentences by themselves" in capsys.readouterr().err
    record = refined(settings_of(place, tmp_path / "none", tokens=1024, short=0.0), quiet=False)
    assert not record["note"]
