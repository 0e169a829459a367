"""Models that the tests of evals share."""

import pytest
import torch

import surgery
from tests import tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny original with a tokenizer, its quadratic twin, and a text file."""
    folder = tmp_path_factory.mktemp("pair")
    tiny.save_with_tokenizer("llama", folder / "base")
    surgery.convert(folder / "base", output=folder / "twin", text="python", tokens=4096, window=32, measure=0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "(1,", "2)", "[3:", "4];", "=", "fox."]
    order = torch.randint(len(words), (6000,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "text.txt").write_text(" ".join(words[index] for index in order))
    return folder
