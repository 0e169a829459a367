"""One expert of a mixture is read as any block is, on the tokens that go to it."""

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.blocks.experts import Routing
from surgery.errors import CalibrationError, RecipeError
from surgery.reading.activity import Activity
from surgery.reading.block_in_model import find_block, recorded_activity
from surgery.reading.spectrum import spectrum
from tests import tiny
from tests.blocks.of_experts import IDS, model_of
from tests.reading import dictionaries


def twin_of(name):
    return surgery.convert(model_of(name), text=IDS, window=24)[0]


@pytest.mark.parametrize("name", ["mixtral", "dbrx", "llama4"])
def test_an_expert_is_what_its_module_computes_on_its_tokens(name):
    twin = twin_of(name)
    block = find_block(twin, 0, expert=2)
    module, seen = twin.get_submodule(block.path), {}
    handle = module.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    with torch.no_grad():
        twin(input_ids=IDS[:4])
    handle.remove()
    recorded = recorded_activity(twin, block, [{"input_ids": IDS[:4]}])
    x, y, here = recorded.x, recorded.y, ~recorded.size.isnan()
    assert 0 < int(here.sum()) < IDS[:4].numel() == len(x)
    if name != "llama4":
        rows, _ = Routing.of(module, seen["args"], seen["kwargs"]).of_expert(2)
        assert sorted(rows.tolist()) == here.nonzero()[:, 0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(y[here], module.one(2, x[here]), rtol=1e-3, atol=1e-4)
    other = find_block(twin, block.index, expert=1).polynomial(x[here].double())
    assert (other - y[here]).norm() > 0.1 * y[here].norm()


def test_which_expert_has_to_be_said(tmp_path):
    twin = twin_of("mixtral")
    with pytest.raises(RecipeError, match="mixture of 4 experts") as caught:
        find_block(twin, 0)
    assert "--expert 3" in str(caught.value)
    with pytest.raises(RecipeError, match="4 is none of them"):
        find_block(twin, 0, expert=4)
    with pytest.raises(RecipeError, match="not a mixture of experts"):
        find_block(surgery.convert(tiny.make("llama"), text=IDS % 96, window=24)[0], 0, expert=0)


def test_an_expert_is_explained(tmp_path):
    twin = surgery.convert(model_of("mixtral"), text=IDS, window=24, output=tmp_path / "twin")[0]
    save_file({"input_ids": IDS}, tmp_path / "ids.safetensors")
    given = {"text": str(tmp_path / "ids.safetensors"), "tokens": 512, "window": 16}
    found = surgery.explain(tmp_path / "twin", 0, expert=1, direction="coordinate:3", **given)
    assert found["block"]["expert"] == 1
    assert found["text"]["left_out"] > 100, "tokens that go elsewhere are no part of its statistics"
    own = find_block(twin, 0, expert=1).polynomial.expand(torch.zeros(found["block"]["width"]).double())
    e3 = torch.eye(found["block"]["out"]).double()[3]
    square = spectrum(own.quadratic(e3), 1).square
    assert found["spectrum"]["square"] == pytest.approx(square, rel=1e-3)


def test_an_expert_without_tokens_is_said_to_have_none():
    sizes = torch.full((64,), torch.nan)
    sizes[5] = 1.0
    with pytest.raises(CalibrationError, match="1 ordinary tokens") as caught:
        Activity.of(IDS[:4, :16], torch.randn(64, 8), sizes)
    assert "routed to this expert" in str(caught.value)


def test_an_expert_is_read_in_features(tmp_path):
    surgery.convert(model_of("mixtral"), text=IDS, window=24, output=tmp_path / "twin")
    save_file({"input_ids": IDS}, tmp_path / "ids.safetensors")
    width = surgery.load(tmp_path / "twin").config.hidden_size
    folder = dictionaries.write(tmp_path / "exact", dictionaries.exact(dictionaries.orthogonal(width)))
    given = {"text": str(tmp_path / "ids.safetensors"), "tokens": 512, "window": 16}
    asked = {"expert": 1, "direction": "coordinate:3", "features": folder, "output_features": folder}
    found = surgery.explain(tmp_path / "twin", 0, **asked, **given)["features"]
    assert found["whole"]["r2"] == pytest.approx(1, abs=1e-4)
    assert found["input"]["site"] == "input" and list(found["output"]["r2"]) == ["output"]
    assert found["judged_on"] < 400, "tokens that go elsewhere judge nothing"
