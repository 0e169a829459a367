"""The published table is about the installed transformers, and its rows still hold."""

from pathlib import Path

import pytest
import transformers

from evals.architectures.sweep import FAMILIES, Row, _judged, sweep, types
from surgery.models import modeling_polynomial

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
SAMPLE = (
    "llama",
    "gpt2",
    "gpt_oss",
    "mixtral",
    "mllama",
    "lfm2",
    "gemma3",
    "recurrent_gemma",
    "jetmoe",
    "t5",
    "albert",
    "esm",
    "mobilebert",
    "swinv2",
)


@pytest.fixture(scope="module")
def rows():
    return sweep(SAMPLE, quiet=True)


def test_the_table_lists_every_type_of_this_transformers():
    text = TABLE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " not in text:
        pytest.skip("another transformers is installed than the one the table is about")
    for family in FAMILIES:
        for model_type, architecture in types(family).items():
            assert f"| {model_type} | {architecture} |" in text


def test_a_twin_is_no_type_of_its_own():
    before = types("causal")
    modeling_polynomial.model_class("LlamaForCausalLM", "llama")
    assert types("causal") == before
    assert "llama" in before and not any(name.startswith(modeling_polynomial.PREFIX) for name in before)


def test_rows_of_the_table_hold(rows):
    text = TABLE.read_text(encoding="utf-8").splitlines()
    if not any(f"transformers {transformers.__version__} " in line for line in text):
        pytest.skip("another transformers is installed than the one the table is about")
    assert [row.markdown() for row in rows if row.markdown() not in text] == []


def test_most_causal_types_are_supported():
    sections = TABLE.read_text(encoding="utf-8").split("\n## ")[1:]
    counted = {}
    for section in sections:
        heading, *lines = section.splitlines()
        rows = [line.split(" | ") for line in lines if line.startswith("| ") and not line.startswith("| model type")]
        good = sum(row[3] in ("native", "custom") for row in rows)
        counted[heading.partition(":")[0]] = good, len(rows)
        assert heading.endswith(f": {good} of {len(rows)}"), "the heading counts its table"
        assert not [row for row in rows if row[3] == "failed"]
    assert set(counted) == set(FAMILIES)
    good, of = counted["causal"]
    assert good / of >= 164 / 177


def test_every_kind_of_answer_is_given(rows):
    forms = {(row.family, row.model_type): row.form for row in rows}
    assert forms["causal", "llama"] == "native"
    assert forms["causal", "mixtral"] == forms["encoder-decoder", "t5"] == "custom"
    assert forms["causal", "jetmoe"] == "unsupported"


def test_a_twin_that_loads_differently_is_a_failure():
    row = Row("causal", "llama", "LlamaForCausalLM", "2 gated", "native")
    good = {"missing": [], "unexpected": [], "difference": 1e-7, "generates": True}
    assert _judged(row, good).form == "native"
    for wrong in ({"difference": 0.1}, {"difference": float("nan")}, {"missing": ["a"]}, {"generates": False}):
        assert _judged(row, {**good, **wrong}).form == "failed"
    assert _judged(row, {"error": "OSError: none"}).form == "failed"
