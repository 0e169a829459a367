"""What a caller gives in Python instead of a source's name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

import surgery
from surgery.calibration.inputs import calibration_inputs, is_named
from surgery.errors import CalibrationError, RecipeError
from tests import tiny
from tests.calibration.support import Characters

TEXTS = ["hello world, this is a text\n" * 4, "and this is another one\n" * 4]
LLAMA = tiny.make("llama")
IDS = [[3 + (7 * row + column) % 90 for column in range(64)] for row in range(4)]
STREAM = [token for row in IDS for token in row]


def read(given, tokenizer=None, tokens=128, length=16):
    data = calibration_inputs(given, LLAMA, tokenizer or Characters(), tokens=tokens, length=length, batch=4)
    return torch.cat([batch["input_ids"] for batch in data.batches])


def texts_as_ids(texts=TEXTS):
    return [token for text in texts for token in [*Characters()(text)["input_ids"], 2]]


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor(STREAM),
        torch.tensor(STREAM, dtype=torch.int32),
        np.array(STREAM),
        np.array(STREAM, dtype=np.uint16),
        STREAM,
        IDS,
        [torch.tensor(row) for row in IDS],
        (np.array(row) for row in IDS),
        iter(STREAM),
        [{"input_ids": row} for row in IDS],
        [{"input_ids": torch.tensor(row), "attention_mask": torch.ones(64)} for row in IDS],
        Dataset.from_dict({"input_ids": IDS}),
        Dataset.from_dict({"input_ids": IDS}).with_format("torch"),
        Dataset.from_dict({"input_ids": IDS}).to_iterable_dataset(),
    ],
    ids=range(14),
)
def test_streams_of_token_ids_are_cut_into_sequences(given):
    found = read(given, tokens=256)
    assert found.dtype == torch.long
    assert torch.equal(found, torch.tensor(STREAM).view(16, 16))


@pytest.mark.parametrize("given", [torch.tensor(IDS), np.array(IDS, dtype=np.int32)])
def test_rows_of_token_ids_stay_rows(given):
    assert torch.equal(read(given), torch.tensor(IDS))


@pytest.mark.parametrize(
    "given",
    [
        TEXTS,
        tuple(TEXTS),
        (text for text in TEXTS),
        [{"text": text, "id": 3} for text in TEXTS],
        Dataset.from_dict({"text": TEXTS, "id": [1, 2]}),
    ],
    ids=range(5),
)
def test_texts_are_tokenised_each_closed_by_the_end_of_text_token(given):
    assert torch.equal(read(given), torch.tensor(texts_as_ids()[:128]).view(8, 16))


def test_padding_of_tokenised_rows_is_left_out():
    rows = [{"input_ids": row, "attention_mask": [0] * 4 + [1] * 60} for row in IDS]
    stream = [token for row in IDS for token in row[4:]]
    assert torch.equal(read(rows, tokens=240), torch.tensor(stream).view(15, 16))


def test_batches_of_model_inputs_from_a_loader_or_as_arrays():
    loader = DataLoader(Dataset.from_dict({"input_ids": IDS}).with_format("torch"), batch_size=2)
    halves = [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:]}]
    for given in (loader, {"input_ids": np.array(IDS)}, {"input_ids": IDS}, halves):
        assert torch.equal(read(given, tokens=256), torch.tensor(IDS))

    def endless():
        while True:
            yield {"input_ids": torch.tensor(IDS)}

    assert read(endless(), tokens=512).shape == (8, 64), "no more than is asked for"
    assert read([{"input_ids": torch.tensor(IDS)}] * 3, tokens=256).shape == (12, 64), "a list is taken whole"
    pixels = [{"pixel_values": np.ones((2, 3, 4, 4), dtype=np.float32)}] * 2
    vision = calibration_inputs(pixels, tiny.make("vit"), None, tokens=9, length=9, batch=1)
    assert [batch["pixel_values"].shape for batch in vision.batches] == [(1, 3, 4, 4)] * 4


def test_paths_name_files_and_lists_of_lines_are_texts(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("".join(TEXTS))
    expected = torch.tensor(texts_as_ids(["".join(TEXTS)])[:128]).view(8, 16)
    for given in (file, [file], str(file), {file: 1.0}):
        assert is_named(given)
        assert torch.equal(read(given, tokens=128), expected)
    assert not is_named(TEXTS) and not is_named(["x" * 300])
    for missing in (["novles.txt"], Path("novles.txt")):
        with pytest.raises(CalibrationError, match=r"novles\.txt: there is no such"):
            read(missing)
        with pytest.raises(RecipeError, match="no text source"):
            surgery.convert(LLAMA, tokenizer=Characters(), text=missing)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor(STREAM).float(), "integers, not float32"),
        (np.array(STREAM) / 2, "integers, not float64"),
        ([0.5, 1.5], "float cannot be used as calibration input"),
        (torch.tensor(STREAM) > 9, "integers, not bool"),
        ({"input_ids": torch.rand(4, 16)}, "integers, not float32"),
        (torch.tensor([[3, -100] * 8] * 4), "-100 is below 0"),
        ({"input_ids": torch.tensor([[3, -1] * 8] * 4)}, "-1 is below 0"),
        (torch.full((4, 16), 5000), "5000 is not in the model's vocabulary"),
        (torch.zeros(2, 3, 4, dtype=torch.long), "one dimension or two"),
        (torch.tensor(3), "one dimension or two"),
        ([[1, 2], [3, [4]]], "cannot be made a tensor"),
        ({"input_ids": [[1, 2], [3]]}, "cannot be made a tensor"),
        ({"input_ids": torch.tensor(3)}, "a single number"),
        ({"input_ids": "hello"}, "cannot be made a tensor"),
        ([{"words": "hello"}], "row 1 .*'words'"),
        ([{"text": "a"}, {"text": 3}], "row 2 .*'text'"),
        ([], "nothing is given"),
        ({}, "number of examples"),
        (iter(()), "nothing is given"),
        (3, "int cannot be used as calibration input"),
        (object(), "object cannot be used as calibration input"),
        ([None], "NoneType cannot be used as calibration input"),
        ([{"input_ids": IDS}, "text\n"], "in one"),
        (b"some bytes", "bytes cannot be used as calibration input"),
    ],
)
def test_anything_else_is_one_clear_error(given, message):
    with pytest.raises(CalibrationError, match=message):
        read(given)


def test_texts_need_a_tokenizer():
    with pytest.raises(CalibrationError, match="no tokenizer"):
        calibration_inputs(TEXTS, LLAMA, None, tokens=128, length=16, batch=4)


def test_an_encoder_decoder_reads_the_same_ids_on_both_sides():
    data = calibration_inputs(IDS, tiny.make("t5"), None, tokens=256, length=16, batch=4)
    assert torch.equal(data.batches[0]["input_ids"], data.batches[0]["decoder_input_ids"])
