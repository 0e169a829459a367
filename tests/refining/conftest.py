"""Models that the tests of refining share."""

import pytest
import torch

import surgery
from tests import tiny
from tests.refining.support import BASES


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny originals with rough twins: native, custom, and of plain blocks."""
    folder = tmp_path_factory.mktemp("refine")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "(1,", "2)", "[3:", "4];", "=", "fox."]
    order = torch.randint(len(words), (6000,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "text.txt").write_text(" ".join(words[index] for index in order))
    settings = {"tokens": 1024, "window": 32, "measure": 0, "readout": "keep", "text": "python"}
    settings |= {"random_tokens": 0.0}  # rough: on words calibration did not meet there is something left to win
    for name, base in BASES.items():
        if not (folder / base).exists():
            tiny.save_with_tokenizer(base, folder / base)
        form = "custom" if name == "custom" else "auto"
        surgery.convert(folder / base, output=folder / name, degree=2, form=form, **settings)
    return folder
