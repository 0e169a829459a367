"""Twins of earlier formats keep loading."""

from pathlib import Path

import torch

import surgery

GOLDEN = Path(__file__).parents[1] / "data" / "twin-format-1"


def test_twins_of_format_1_keep_loading():
    """A checkpoint written by version 0.1.0, with the outputs it had then."""
    from safetensors.torch import load_file

    probe = load_file(GOLDEN / "probe" / "probe.safetensors")
    with torch.no_grad():
        found = surgery.load(str(GOLDEN))(input_ids=probe["input_ids"]).logits
    torch.testing.assert_close(found, probe["logits"], rtol=1e-4, atol=1e-5)
