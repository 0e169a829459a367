"""Divergence and agreement, against their definitions."""

import pytest
import torch

from evals import fidelity
from evals.fidelity import compare_outputs, compare_tokens
from tests import tiny


@pytest.mark.parametrize("logits", [fidelity.LOGITS, 5 * 96, 1])
def test_divergence_and_agreement_against_their_definitions(ids, logits, monkeypatch):
    """However many tokens at a time: 5 do not divide a window's."""
    monkeypatch.setattr(fidelity, "LOGITS", logits)
    one, two = tiny.make("llama"), tiny.make("llama", seed=5)
    found = compare_tokens(one, two, ids[:3])
    with torch.no_grad():
        p, q = (model(input_ids=ids[:3]).logits[:, :-1].double().softmax(-1) for model in (one, two))
    torch.testing.assert_close(found.divergence.double(), (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6)
    truth = ids[:3, 1:, None]
    torch.testing.assert_close(found.original.double(), -p.gather(-1, truth)[..., 0].log(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.twin.double(), -q.gather(-1, truth)[..., 0].log(), rtol=1e-4, atol=1e-6)
    assert torch.equal(found.agree, p.argmax(-1) == q.argmax(-1))
    itself = compare_tokens(one, one, ids[:3])
    assert itself.divergence.abs().max() < 1e-6
    assert itself.agree.all()


def test_outputs_of_encoders_are_compared(ids):
    one = tiny.make("bert")
    same = compare_outputs(one, one, {"input_ids": ids[:2]})
    other = compare_outputs(one, tiny.make("bert", seed=9), {"input_ids": ids[:2]})
    assert same["cosine"].min() > 1 - 1e-9
    assert same["relative_error"].max() == 0
    assert other["cosine"].mean() < 0.9
    assert other["relative_error"].mean() > 0.3
