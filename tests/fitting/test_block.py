"""A block with fewer units."""

import pytest
import torch
import transformers

import surgery
from tests import tiny


def test_half_the_units_stay_a_native_twin_of_half_the_width(ids, tmp_path):
    whole, _ = surgery.convert(tiny.make("llama"), text=ids, window=24)
    half, report = surgery.convert(tiny.make("llama"), text=ids, window=24, units=0.5, output=tmp_path / "half")
    assert report.form == "native"
    assert whole.config.intermediate_size == tiny.HIDDEN
    assert half.config.intermediate_size == tiny.HIDDEN // 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    with torch.no_grad():
        original, mine, theirs = (model(ids[:8]).logits for model in (tiny.make("llama"), half, whole))
        assert torch.allclose(again(ids[:8]).logits, mine, atol=1e-5)
    assert (mine - original).norm() >= 0.999 * (theirs - original).norm()


def test_the_units_kept_are_better_than_others(ids):
    """Negative control: the same number of units, drawn at random."""
    kept, _ = surgery.convert(tiny.make("llama"), text=ids, window=24, units=0.25)

    def drawn(fit, prior, count, free=1, counts=None):
        order = torch.randperm(len(prior) - free, generator=torch.Generator().manual_seed(1))[:count]
        return torch.cat([order.sort().values, torch.arange(len(prior) - free, len(prior))])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.fitting.readout.most_useful", drawn)
        random, _ = surgery.convert(tiny.make("llama"), text=ids, window=24, units=0.25)
    with torch.no_grad():
        original, mine, theirs = (model(ids[:16]).logits for model in (tiny.make("llama"), kept, random))
    assert (mine - original).norm() < 0.95 * (theirs - original).norm()
