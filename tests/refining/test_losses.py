"""The divergence and its gradient."""

import pytest
import torch

from surgery.refining.losses import kl


def test_divergence_is_zero_for_equal_logits_and_has_the_right_value(ids):
    g = torch.Generator().manual_seed(0)
    one, two = torch.randn(3, 5, 7, generator=g), torch.randn(3, 5, 7, generator=g)
    assert kl(one, one).abs() < 1e-6
    p, q = one.double().softmax(-1), two.double().softmax(-1)
    assert kl(one, two).item() == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_and_its_gradient_are_torchs_own(temperature, monkeypatch):
    from surgery.refining import losses

    monkeypatch.setattr(losses, "PIECE", 4)  # three uneven pieces
    g = torch.Generator().manual_seed(1)
    goal, found = torch.randn(2, 5, 11, generator=g), torch.randn(2, 5, 11, generator=g)
    ours, theirs = found.clone().requires_grad_(), found.clone().requires_grad_()
    p, q = (x.flatten(0, 1).div(temperature).log_softmax(-1) for x in (goal, theirs))
    expected = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2
    loss = kl(goal, ours, temperature)
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
