"""The notebook that reads a twin."""

import os
import re
from pathlib import Path

import pytest

import surgery

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "recipes" / "read_a_twin.ipynb"
MODEL = ROOT / "build" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def printed(notebook):
    """What the cells print, and how many pictures they show."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    return text, sum("image/png" in output.get("data", {}) for output in outputs)


def read():
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_with_its_outputs_and_needs_nothing_of_this_project():
    notebook = read()
    text, pictures = printed(notebook)
    assert pictures == 3
    assert "LlamaForCausalLM linear" in text
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert not re.search(r"^\s*(import|from) (surgery|evals)", code, re.MULTILINE)
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow
def test_it_runs_from_the_first_cell_to_the_last(tmp_path, monkeypatch):
    """On a twin of few tokens: the form is the block's, and removing what adds most lowers the logit it adds to."""
    nbclient = pytest.importorskip("nbclient")
    surgery.convert(str(MODEL), text="python", tokens=16384, measure=0, output=tmp_path / "twin")
    monkeypatch.setitem(os.environ, "TWIN", str(tmp_path / "twin"))
    notebook = read()
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    text, pictures = printed(notebook)
    assert pictures == 3
    assert float(re.search(r"block and its form: (\S+)", text)[1]) < 1e-9
    before, after = map(float, re.search(r"' Paris' over ' London': (\S+) → (\S+)", text).groups())
    assert after < before
