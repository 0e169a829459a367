"""Texts that are drawn once."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from surgery.calibration import drawn_once as module
from surgery.calibration.drawn_once import drawn_once
from surgery.models import fingerprint
from surgery.runtime.files import cache_folder
from tests import tiny
from tests.calibration.support import Characters


@pytest.fixture
def draws(monkeypatch, tmp_path):
    """What was drawn, with a cache that is empty."""
    drawn, real = [], module.sample
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "sample", lambda *given, **more: drawn.append(more) or real(*given, **more))
    return drawn


def test_the_same_of_the_same_model_is_drawn_once(draws):
    one = drawn_once(tiny.make("llama"), Characters(), 4, 10, seed=1)
    assert torch.equal(drawn_once(tiny.make("llama"), Characters(), 4, 10, seed=1), one)
    assert len(draws) == 1
    assert len(list(cache_folder("samples").iterdir())) == 1


def test_where_a_model_lies_is_no_matter_and_what_it_is_matters_to_the_last_weight(draws, tmp_path):
    for name in ("here", "there"):
        tiny.make("llama").save_pretrained(tmp_path / name)
    here, there = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("here", "there"))
    assert torch.equal(*(drawn_once(model, Characters(), 4, 10, seed=1) for model in (here, there)))
    assert len(draws) == 1
    with torch.no_grad():
        there.model.layers[1].mlp.down_proj.weight[:, 5] = 0
    drawn_once(there, Characters(), 4, 10, seed=1)
    assert len(draws) == 2
    one = torch.randn(4096, 7)
    two = one.clone()
    two[:, 3] = 0
    assert fingerprint.of_tensors({"a": one}) != fingerprint.of_tensors({"a": two})
    assert fingerprint.of_tensors({"a": one}) != fingerprint.of_tensors({"b": one})
    assert fingerprint.of_tensors({"a": one}) != fingerprint.of_tensors({"a": one.view(7, 4096)})
    assert fingerprint.of_tensors({"a": one}, "x") == fingerprint.of_tensors({"a": one.clone()}, "x")


def test_another_model_or_wish_is_drawn_anew(draws):
    model = tiny.make("llama")
    one = drawn_once(model, Characters(), 4, 10, seed=1)
    for rows, length, seed in ((5, 10, 1), (4, 11, 1), (4, 10, 2)):
        drawn_once(model, Characters(), rows, length, seed)
    assert len(draws) == 4

    class OtherStart(Characters):
        bos_token_id = 5

    assert not torch.equal(drawn_once(model, OtherStart(), 4, 10, seed=1), one)
    model.generation_config.eos_token_id = 7
    drawn_once(model, Characters(), 4, 10, seed=1)
    assert len(draws) == 6
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
    drawn_once(model, Characters(), 4, 10, seed=1)
    assert len(draws) == 7


def test_a_file_that_is_broken_is_drawn_again_and_no_cache_is_no_error(draws, monkeypatch, tmp_path):
    model = tiny.make("llama")
    one = drawn_once(model, Characters(), 4, 10, seed=1)
    (file,) = cache_folder("samples").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(drawn_once(model, Characters(), 4, 10, seed=1), one)
    assert len(draws) == 2
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert torch.equal(drawn_once(model, Characters(), 4, 10, seed=1), one)
    assert len(draws) == 3


def test_of_weights_that_are_not_there_nothing_is_kept(draws, monkeypatch):
    monkeypatch.setattr(module, "sample", lambda *given, **more: torch.zeros(4, 10, dtype=torch.long))
    drawn_once(tiny.make("llama").to("meta"), Characters(), 4, 10, seed=1)
    assert not cache_folder("samples").exists()
