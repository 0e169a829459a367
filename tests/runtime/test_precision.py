import importlib.util
import sys

import pytest
import torch

from surgery.runtime import precision

CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch):
    """The module as it is; the tests' own copy never finds bfloat16 fast."""
    spec = importlib.util.spec_from_file_location("fresh_precision", precision.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh_precision", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("seconds", "fast"), [(0.3, True), (0.9, False), (5.0, False)])
def test_bfloat16_is_chosen_where_it_is_faster_by_the_clock(fresh, monkeypatch, seconds, fast):
    monkeypatch.setattr(fresh, "_seconds", {torch.float32: 1.0, torch.bfloat16: seconds}.get)
    assert fresh.fast_bf16(CPU) is fast
    assert fresh.chosen_dtype("auto", CPU) == ("bfloat16" if fast else "float32")
    assert fresh.chosen_dtype("float32", CPU) == "float32"  # what is asked for is done


def test_the_clock_runs(fresh):
    assert 0 < fresh._seconds(torch.float32) < 5
    assert fresh.fast_bf16(torch.device("meta")) is False


def test_products_are_rounded_and_weights_are_not():
    one = torch.nn.Linear(64, 64)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    with precision.autocast("bfloat16", CPU):
        rounded = one(x)
    with precision.autocast("float32", CPU):
        exact = one(x)
    assert rounded.dtype == torch.bfloat16 and exact.dtype == one.weight.dtype == torch.float32
    assert 1e-4 < float((rounded - exact).detach().norm() / exact.detach().norm()) < 1e-2
