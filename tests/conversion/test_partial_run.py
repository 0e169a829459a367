"""What an interrupted conversion has finished is not done again."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.errors import CheckpointError
from tests import tiny


def test_samples_are_not_drawn_again_after_an_interruption(tmp_path, monkeypatch):
    from surgery.calibration import windows
    from surgery.fitting import either

    tiny.save_with_tokenizer("llama", tmp_path / "model")
    settings = {"output": tmp_path / "twin", "tokens": 2048, "window": 32, "measure": 64}

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(either, "fit_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            surgery.convert(tmp_path / "model", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(windows, "drawn_once", interrupted)
        with pytest.raises(KeyboardInterrupt):  # negative control: other settings need other samples
            surgery.convert(tmp_path / "model", **settings, seed=1)
        _, report = surgery.convert(tmp_path / "model", **settings)
    assert report.calibration["source"] == "samples"
    assert report.perplexity["tokens"] == 62
    assert not (tmp_path / "twin.partial").exists()


def test_interrupted_runs_resume_and_do_not_redo_finished_blocks(ids, tmp_path, monkeypatch):
    from surgery.conversion import pipeline
    from surgery.fitting import either

    real, calls = either.fit_block, []

    def counting(station, *rest):
        calls.append(station.block.path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(station, *rest)

    model = tiny.make("llama")
    state = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(either, "fit_block", counting)
    with pytest.raises(KeyboardInterrupt):
        surgery.convert(model, text=ids, output=tmp_path / "twin")
    assert not (tmp_path / "twin").exists()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items()), "put back as it was"
    with pytest.raises(CheckpointError, match="other settings"):
        surgery.convert(model, text=ids, output=tmp_path / "twin", degree=3)
    surgery.convert(model, text=ids, output=tmp_path / "twin")
    assert calls == ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.1.mlp"]
    assert not (tmp_path / "twin.partial").exists()
    monkeypatch.undo()

    def failing(*_, **__):
        raise CheckpointError("no space")

    monkeypatch.setattr(pipeline, "save", failing)
    with pytest.raises(CheckpointError, match="no space"):
        surgery.convert(tiny.make("llama"), text=ids, output=tmp_path / "late")
    monkeypatch.undo()
    monkeypatch.setattr(either, "fit_block", None)  # all blocks are done: only saving is left
    surgery.convert(tiny.make("llama"), text=ids, output=tmp_path / "late")
    monkeypatch.undo()
    surgery.convert(tiny.make("llama"), text=ids, output=tmp_path / "straight")
    one, two = (load_file(tmp_path / place / "model.safetensors") for place in ("twin", "straight"))
    three = load_file(tmp_path / "late" / "model.safetensors")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(three[key], two[key], rtol=0, atol=0)
