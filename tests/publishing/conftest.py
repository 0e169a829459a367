"""Models that the tests of publishing share."""

import pytest

import surgery
from tests import tiny


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A native and a custom twin of a tiny Llama."""
    folder = tmp_path_factory.mktemp("publish")
    tiny.save_with_tokenizer("llama", folder / "base")
    settings = {"text": "python", "tokens": 4096, "window": 32, "measure": 512}
    for name, degree in (("native", 2), ("custom", 3)):
        surgery.convert(folder / "base", output=folder / name, degree=degree, **settings)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A native and a custom twin of a tiny Llama."""
    folder = tmp_path_factory.mktemp("export")
    tiny.save_with_tokenizer("llama", folder / "base")
    for name, degree in (("native", 2), ("custom", 3)):
        surgery.convert(
            folder / "base",
            output=folder / name,
            degree=degree,
            text="python",
            tokens=4096,
            window=32,
            measure=0,
        )
    return folder
