"""Loading twins: those of earlier formats, and what is said of them."""

from pathlib import Path

import pytest
import torch

import surgery
from surgery.errors import ModelError
from tests import tiny

GOLDEN = Path(__file__).parents[1] / "data" / "twin-format-1"


def test_twins_of_format_1_keep_loading():
    """A checkpoint written by version 0.1.0, with the outputs it had then."""
    from safetensors.torch import load_file

    probe = load_file(GOLDEN / "probe" / "probe.safetensors")
    with torch.no_grad():
        found = surgery.load(str(GOLDEN))(input_ids=probe["input_ids"]).logits
    torch.testing.assert_close(found, probe["logits"], rtol=1e-4, atol=1e-5)


def test_converting_a_twin_again_says_so(tmp_path, capfd):
    ids = torch.randint(3, 96, (64, 32), generator=torch.Generator().manual_seed(3))
    tiny.make("llama").save_pretrained(tmp_path / "base")
    for degree in (2, 3):
        surgery.convert(tmp_path / "base", text=ids, degree=degree, output=tmp_path / f"twin-{degree}")
        note = f"this is a polynomial twin already, made from base at degree {degree}"
        assert surgery.inspect(str(tmp_path / f"twin-{degree}")).note == note
    _, report = surgery.convert(tmp_path / "twin-2", text=ids, quiet=False)
    assert report.source["note"] == "this is a polynomial twin already, made from base at degree 2"
    assert report.source["note"] in capfd.readouterr().err
    with pytest.raises(ModelError, match="polynomials already"):
        surgery.convert(tmp_path / "twin-3", text=ids)
    (tmp_path / "twin-3" / "surgery.json").write_text("{}")
    assert surgery.inspect(str(tmp_path / "twin-3")).note == "this is a polynomial twin already"
