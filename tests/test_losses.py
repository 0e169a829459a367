"""Perplexity against a computation that shares no code with it."""

import math

import pytest
import torch

from surgery.losses import perplexity, token_nats
from tests import tiny


def test_perplexity_is_the_exponential_of_the_mean_loss(ids):
    model = tiny.make("llama")
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    found = perplexity(model, [{"input_ids": part} for part in ids.split(7)])
    assert found.tokens == 64 * 31
    assert found.nats == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_padding_is_not_counted(ids):
    model = tiny.make("llama")
    padded = torch.cat([ids, torch.zeros_like(ids[:, :5])], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :5])], dim=1)
    one = perplexity(model, [{"input_ids": padded, "attention_mask": mask}])
    assert one.tokens == 64 * 31
    assert one.nats == pytest.approx(perplexity(model, [{"input_ids": ids}]).nats, rel=1e-5)


def test_nats_per_token_are_where_they_belong(ids):
    model = tiny.make("llama")
    nats = token_nats(model, [{"input_ids": ids}])
    with torch.no_grad():
        log = model(input_ids=ids).logits.log_softmax(-1)
    assert nats[5, 9].item() == pytest.approx(-log[5, 9, ids[5, 10]].item(), rel=1e-4)
