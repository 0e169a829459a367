"""Text packed into windows in which no document sees another."""

from itertools import pairwise

import pytest
import torch

from surgery.refining.packing import cut, pack, packable
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("packing")
    tiny.save_with_tokenizer("llama", folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_documents_do_not_see_each_other(tokenizer, name):
    """Every document in a window gets the logits it gets alone."""
    model = tiny.make(name)
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 90, (n,), generator=draw).tolist() for n in (11, 30, 7, 16, 40)]
    windows = pack(texts, 32, tokenizer, True)
    assert windows.ids.shape == windows.positions.shape == (3, 32)
    with torch.no_grad():
        together = model(**windows.inputs("cpu"), use_cache=False).logits
        for row in range(3):
            starts = [*(windows.positions[row] == 0).nonzero().flatten().tolist(), 32]
            assert len(starts) > 1 + (row == 0)
            for begin, end in pairwise(starts):
                alone = model(windows.ids[row, begin:end][None], use_cache=False).logits
                torch.testing.assert_close(together[row, begin:end], alone[0], rtol=1e-4, atol=1e-4)
        leaking = model(windows.ids, use_cache=False).logits
    assert (leaking - together).abs().max() > 1e-2, "the control: without positions they do see each other"


@pytest.mark.parametrize(("name", "can"), [("llama", True), ("gpt2", True), ("opt", False), ("t5", False)])
def test_whether_positions_keep_documents_apart_is_tried(name, can):
    assert packable(tiny.make(name)) is can


def test_windows_lose_no_token_but_those_of_the_last(tokenizer):
    texts = [list(range(5, 25)), list(range(30, 47)), list(range(50, 90))]
    windows = pack(texts, 16, tokenizer, False)
    flat = [token for text in texts for token in text]
    assert windows.ids.flatten().tolist() == flat[: len(windows) * 16]
    assert windows.positions is None
    pieces = list(cut(texts, 18, 45))
    assert [piece for piece, inside in pieces if inside] == [[23, 24], list(range(30, 47)), list(range(50, 58))]
    assert [piece for piece, inside in pieces if not inside] == [list(range(5, 23)), list(range(58, 90))]


def test_a_start_token_goes_before_every_piece():
    class Framed:
        eos_token_id = 2

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1, 7] if add_special_tokens else [7]}

    windows = pack([list(range(10, 40))], 8, Framed(), True)
    assert (windows.ids[:, 0] == 1).all()
    assert windows.positions[0].tolist() == list(range(8))
