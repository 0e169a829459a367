"""Sentences by themselves, and windows that begin as they do."""

import itertools

import pytest
import torch
from transformers import AutoTokenizer

from surgery.calibration.sentences import LONGEST, SHORTEST, Sentences, opening, openings_of, sentence_starts
from tests import tiny
from tests.calibration.support import Characters

TEXT = "the fox jumps over the lazy dog. it is quick: and then nothing more of it was seen. so"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences")
    tiny.save_with_tokenizer("llama", folder)
    return AutoTokenizer.from_pretrained(folder)


def test_sentences_are_all_of_the_text_each_after_a_start_token(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found = list(Sentences(tokenizer).of(ids))
    start = found[0][0]
    assert start in tokenizer.all_special_ids
    assert all(piece[0] == start for piece in found)
    whole = [token for piece in found for token in piece[1:]]
    assert whole == ids[: len(whole)]
    assert len(ids) - len(whole) < SHORTEST, "what is left of a text is no sentence"
    first, second = (tokenizer.decode(piece[1:]).replace(" ", "") for piece in found[:2])
    assert first.endswith("dog.")
    assert second.endswith("quick:")


def test_what_has_no_end_is_cut_and_what_is_too_short_goes_with_the_next():
    words = dict(enumerate(["", "<s>", "</s>", ".", "a"]))

    class Words:
        all_special_ids, bos_token_id, eos_token_id = (1, 2), 1, 2

        def __init__(self, before):
            self.before = before

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [*self.before, 4] if add_special_tokens else [4]}

        def decode(self, ids):
            return words[ids[0]]

    bare, framed = Words([]), Words([1])
    assert [list(piece) for piece in Sentences(bare).of([4, 3, 4, 4, 3, 4, 3, 2])] == [[1, 4, 3, 4, 4, 3]]
    assert [len(piece) for piece in Sentences(bare).of([4] * (2 * LONGEST + 1))] == [1 + LONGEST] * 2
    assert [list(piece) for piece in Sentences(framed).of([4, 4, 4, 3])] == [[4, 4, 4, 3]], "packing puts it there"


def test_windows_begin_where_sentences_do_without_the_space_before(tokenizer):
    ids = torch.tensor(tokenizer(whole := (TEXT + ". ") * 20, add_special_tokens=False)["input_ids"])
    for room in (4, 9):
        places = sentence_starts(ids, tokenizer, room)
        assert places[0] == 0
        assert all(later - place >= room for place, later in itertools.pairwise(places))
        assert places[-1] <= len(ids) - room
        assert all(tokenizer.decode(ids[place - 1]).strip() in (".", ":") for place in places[1:])
    rows = openings_of(ids, 8, ([7], [9]), tokenizer, 5)
    assert rows.shape == (5, 8)
    assert (rows[:, 0] == 7).all()
    assert (rows[:, -1] == 9).all()
    texts = [whole[whole.index(word) :] for word in ("the fox", "it is", "and then", "so.")]
    beginnings = [tokenizer(text, add_special_tokens=False)["input_ids"][:6] for text in texts]
    assert all(row in beginnings for row in rows[:, 1:-1].tolist())
    letters = Characters()
    ids = torch.tensor(letters("one two. three four five six")["input_ids"])
    (_, place) = sentence_starts(ids, letters, 8)
    assert opening(ids, place, letters, 8) == letters("three fo")["input_ids"]
    assert openings_of(ids[:0], 8, ([], []), tokenizer, 5).shape == (0, 8)
