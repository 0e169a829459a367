import pytest
import torch

from surgery.runtime import precision

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Sets what the clock says of float32 and bfloat16; what was found before is forgotten, and so is this."""
    precision.fast_bf16.cache_clear()
    yield lambda exact, rounded: monkeypatch.setattr(
        precision, "_seconds", {torch.float32: exact, torch.bfloat16: rounded}.get
    )
    precision.fast_bf16.cache_clear()


@pytest.mark.parametrize(("seconds", "fast"), [(0.3, True), (0.9, False), (5.0, False)])
def test_bfloat16_is_chosen_where_it_is_faster_by_the_clock(clock, seconds, fast):
    clock(1.0, seconds)
    assert precision.fast_bf16(CPU) is fast
    assert precision.chosen_dtype("auto", CPU) == ("bfloat16" if fast else "float32")
    assert precision.chosen_dtype("float32", CPU) == "float32"  # what is asked for is done


def test_the_clock_runs():
    assert 0 < precision._seconds(torch.float32) < 5
    assert precision.fast_bf16(torch.device("meta")) is False


def test_products_are_rounded_and_weights_are_not():
    one = torch.nn.Linear(64, 64)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    with precision.autocast("bfloat16", CPU):
        rounded = one(x)
    with precision.autocast("float32", CPU):
        exact = one(x)
    assert rounded.dtype == torch.bfloat16 and exact.dtype == one.weight.dtype == torch.float32
    assert 1e-4 < float((rounded - exact).detach().norm() / exact.detach().norm()) < 1e-2
