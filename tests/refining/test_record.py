"""What is said of a refinement afterwards."""

import json
import subprocess
import sys

import pytest
import torch

from surgery.errors import SurgeryError
from surgery.refining.run import refined
from surgery.refining.settings import RefineSettings
from surgery.refining.training import Training
from tests import commands
from tests.refining.support import settings_of


def test_the_control_is_the_original_trained_on_the_text(place, tmp_path):
    record = refined(settings_of(place, tmp_path / "out", control=True))
    control = record["control"]
    assert control["nats_after"] < control["nats_before"] - 0.5, "a random original learns these few words"
    assert control["nats_before"] == pytest.approx(record["curve"][0]["nats"] - record["curve"][0]["lost"], abs=1e-5)


def test_a_refined_twin_is_measured_on_what_was_held_out(place, tmp_path):
    from evals.settings import unseen

    out = tmp_path / "out"
    refined(settings_of(place, out))
    kept = json.loads((out / "surgery.json").read_text())["refinement"]["held_out"]["text.txt"]
    assert (kept["begin"], kept["end"]) == (0, 512)
    assert unseen([str(out)], str(place / "text.txt")) == (0, 512)
    assert unseen([str(out)], "another.txt") == (0, None)
    assert unseen([str(place / "native"), str(out)], str(place / "text.txt")) == (0, 512), "of both"
    command = ["eval", out, "--original", place / "llama", "--text", place / "text.txt",
               "--window", "32", "--block-tokens", "64", "--no-speed", "--no-cache", "--json"]  # fmt: skip
    alone = commands.surgery(*command)
    assert alone.returncode == 0, alone.stderr
    assert json.loads(alone.stdout)["settings"]["tokens"] == 512
    command.pop()
    more = commands.surgery(*command, "--skip", 100)
    assert "SEEN IN TRAINING" in more.stdout


def test_too_little_memory_says_what_to_lower(place, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Training, "_one_step", full)
    with pytest.raises(SurgeryError, match="out of memory") as raised:
        refined(settings_of(place, tmp_path / "out"))
    assert "--checkpointing" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_the_card_tells_of_the_refinement_and_how_to_repeat_it(place, tmp_path):
    from surgery.publishing.card import render_card

    record = refined(settings_of(place, tmp_path / "out"))
    text = render_card(tmp_path / "out", base_model="them/base", license="mit").text
    assert f"{record['divergence_before']:.4f} before, {record['divergence_after']:.4f} after" in text
    assert str(tmp_path) not in text
    command = next(line for line in text.splitlines() if line.startswith("surgery refine")).split()
    command[2:] = [{"twin": place / "native", "them/base": place / "llama", "refined": tmp_path / "x",
                    "text.txt": place / "text.txt"}.get(word, word) for word in command[2:]]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command), "--dry-run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "16 steps of 256 tokens" in done.stdout


def test_a_refined_delta_is_a_whole_twin(place, tmp_path):
    from surgery.publishing.delta import export_delta

    export_delta(place / "custom", tmp_path / "delta", str(place / "llama"))
    settings = vars(settings_of(place, tmp_path / "out", "custom"))
    with pytest.raises(SurgeryError, match="not on the Hub"):
        refined(RefineSettings(**{**settings, "twin": str(tmp_path / "delta")}))
