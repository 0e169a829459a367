"""Models that the tests of reading share."""

import pytest

import surgery
from surgery.reading.explanation import ExplainSettings, explained
from tests import tiny
from tests.reading.support import TEXT


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An original with its tokenizer, and twins of it."""
    place = tmp_path_factory.mktemp("explain")
    tiny.save_with_tokenizer("llama", place / "original")
    made = {"original": str(place / "original")}
    settings = {"tokens": 2048, "window": 32, "measure": 0}
    for name, more in {"twin": {}, "partial": {"blocks": "1", "degree": 3}, "affine": {"degree": 1}}.items():
        made[name] = str(place / name)
        surgery.convert(made["original"], output=made[name], text="python", **settings, **more)
    return made


@pytest.fixture(scope="module")
def report(folders):
    return explained(ExplainSettings(folders["twin"], 1, "token:fox", pairs=4, **TEXT))
