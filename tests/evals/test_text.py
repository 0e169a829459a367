"""Windows of a text."""

import pytest
import torch

from evals.evaluation import measure
from evals.memo import Memo
from evals.text import cut
from tests.evals.support import settings_of


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
def test_every_token_is_predicted_once_whatever_the_stride(stride):
    ids = torch.arange(16 + 5 * stride)
    text = cut(ids, "given", 16, stride)
    predicted = text.windows[:, 1:][text.fresh]
    assert sorted(predicted.tolist()) == sorted(set(predicted.tolist())), "none twice"
    expected = torch.arange(1, 16 + 5 * stride) if stride < 16 else [i for i in range(96) if i % 16]
    assert sorted(predicted.tolist()) == list(expected)


def test_a_stride_gives_context_and_so_other_numbers(pair):
    one = measure(settings_of(pair, stride=8), Memo(None))
    assert one["text"]["tokens"] == 1024 - 1
    assert all(row["from"] >= 1 for row in one["text"]["by_position"])
    assert one["text"]["by_position"][-1]["tokens"] > one["text"]["by_position"][0]["tokens"]
