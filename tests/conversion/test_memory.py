"""Too many tokens for memory are said before any work is done."""

import pytest
import torch

import surgery
from surgery.conversion import memory
from surgery.errors import CalibrationError
from tests import commands, tiny


def bytes_of(tokens):
    """Of a tiny Llama: two streams of 32 numbers, each twice."""
    return tokens * 32 * 4 * 2 * 2


@pytest.fixture
def folder(tmp_path):
    tiny.save_with_tokenizer("llama", tmp_path / "base")
    return tmp_path


@pytest.mark.parametrize(("text", "free"), [("python", bytes_of(4096) - 1), ("samples", bytes_of(2048) - 1)])
def test_tokens_that_do_not_fit_are_refused(text, free, folder, monkeypatch):
    """Of samples, what cannot fit in any case is said before they are drawn."""
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    done = commands.surgery("convert", folder / "base", "-o", folder / "out", "--text", text, "--tokens", 4096)
    assert done.returncode == 2
    assert "hidden states of 4,096 tokens take" in done.stderr
    assert "--offload" in done.stderr
    assert "sampling" not in done.stderr
    assert not (folder / "out").exists()


def test_tokens_that_fit_exactly_are_taken(folder, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: bytes_of(4096))
    settings = {"text": "python", "tokens": 4096, "window": 32, "measure": 0, "epochs": 0}
    surgery.convert(folder / "base", **settings)
    with pytest.raises(CalibrationError, match="hidden states"):
        surgery.convert(folder / "base", **settings | {"tokens": 4097})
    surgery.convert(folder / "base", target="block", **settings | {"tokens": 8192})  # one stream alone
    surgery.convert(folder / "base", output=folder / "out", offload=True, **settings | {"tokens": 8192})


def test_there_is_memory():
    assert 2**20 < memory.free_memory(torch.device("cpu")) < 2**50
