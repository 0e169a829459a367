"""Blocks that several layers share, and blocks whose activation is called as a function."""

import json

import pytest
import torch
import transformers as T

import surgery
from evals.block_fidelity import block_sums
from surgery.blocks.find import survey
from surgery.blocks.verify import verify_all
from surgery.errors import ModelError
from tests import tiny

HRM = {key: value for key, value in tiny.COMMON.items() if key != "num_hidden_layers"}


def albert(seed=0):
    """Three layers, one set of weights."""
    config = T.AlbertConfig(**{**tiny.COMMON, "num_hidden_layers": 3}, embedding_size=16)
    return randomised(T.AlbertModel(config), seed)


def hrm(**changes):
    """Two stacks of one layer; each runs several times."""
    config = T.HrmTextConfig(**HRM, num_layers_per_stack=1, H_cycles=2, L_cycles=2, head_dim=8, **changes)
    return randomised(T.HrmTextForCausalLM(config), 0)


def randomised(model, seed):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def confirmed(model, ids):
    with torch.no_grad():
        return verify_all(model, survey(model).blocks, lambda: model(input_ids=ids[:2]))


def test_every_call_is_counted_and_recomputed(ids):
    (block,) = confirmed(albert(), ids)
    assert block.calls == 3
    assert block.residual is not None and block.residual.normed == "sum"
    assert [block.calls for block in confirmed(hrm(), ids)] == [4, 2]


def test_one_call_that_differs_is_enough_to_refuse(ids):
    model = albert()
    layer = model.encoder.albert_layer_groups[0].albert_layers[0]
    plain, calls = layer.ff_chunk, []

    def clamped_the_second_time(x):
        calls.append(x)
        if len(calls) != 2:
            return plain(x)
        return layer.ffn_output(layer.activation(layer.ffn(x)).clamp(-0.1, 0.1))

    layer.ff_chunk = clamped_the_second_time
    with pytest.raises(ModelError, match="does not give what the model computes"):
        confirmed(model, ids)


@pytest.mark.fresh_process
@pytest.mark.parametrize("make", [albert, hrm])
def test_a_shared_block_is_fitted_on_all_its_calls(make, ids, tmp_path):
    model = make()
    calls = {block.path: block.calls for block in confirmed(model, ids)}
    with torch.no_grad():
        before = model(input_ids=ids[:4])[0]
    twin, report = surgery.convert(model, text=ids, window=32, output=tmp_path / "twin")
    assert {row["path"]: row["tokens"] for row in report.blocks} == {p: n * ids.numel() for p, n in calls.items()}
    assert all(row["r2_held"] > 0.5 for row in report.blocks)
    assert json.loads((tmp_path / "twin" / "surgery.json").read_text())["verification"]["verified"]
    with torch.no_grad():
        after = twin(input_ids=ids[:4])[0]
    assert 1e-3 < (after - before).norm() / before.norm() < 0.8


def test_what_was_fitted_on_one_call_only_does_worse(ids, monkeypatch):
    """The negative control: inputs of the first layer say too little about those of the third."""
    from surgery.calibration import repeated
    from surgery.calibration.repeated import _calls

    def error():
        original, twin = albert(), surgery.convert(albert(), text=ids, window=32)[0]
        (sums,) = block_sums(original, twin, confirmed(original, ids), [{"input_ids": ids}]).values()
        return float(sums.residual.sum())

    together = error()
    of_all = _calls
    monkeypatch.setattr(repeated, "_calls", lambda *given: of_all(*given)[:1])
    assert together < 0.9 * error()


def test_shared_bilinear_blocks_are_recovered_exactly(ids):
    model, twin = hrm(hidden_act="linear"), hrm(hidden_act="linear")
    twin, report = surgery.convert(twin, text=ids, window=32, matmul="float32")
    with torch.no_grad():
        torch.testing.assert_close(twin(input_ids=ids[:4])[0], model(input_ids=ids[:4])[0], rtol=1e-3, atol=1e-3)
    assert min(row["r2_held"] for row in report.blocks) > 0.9999


def test_a_killed_run_goes_on_with_the_shared_blocks(ids, tmp_path, monkeypatch):
    from surgery.conversion import replacement
    from surgery.fitting.either import fit

    fitted = fit
    seen = []

    def fit(station, *rest):
        seen.append(station.block.path)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return fitted(station, *rest)

    monkeypatch.setattr(replacement, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        surgery.convert(hrm(), text=ids, window=32, output=tmp_path / "twin")
    _, report = surgery.convert(hrm(), text=ids, window=32, output=tmp_path / "twin")
    assert len(seen) == 3 and seen[2] == seen[1], "the finished block is not fitted again"
    _, whole = surgery.convert(hrm(), text=ids, window=32)
    assert [row["r2_held"] for row in report.blocks] == [row["r2_held"] for row in whole.blocks]


def test_a_budget_refuses_what_runs_several_times(ids):
    with pytest.raises(ModelError, match="share"):
        surgery.convert(hrm(), text=ids, window=32, budget=0.5)


@pytest.mark.fresh_process
@pytest.mark.parametrize("degree", [1, 3])
def test_a_half_is_replaced_as_a_whole(degree, ids, tmp_path):
    """ESM calls its activation as a function inside the module of the first map."""
    original = tiny.make("esm")
    twin, _ = surgery.convert(tiny.make("esm"), text=ids, degree=degree, output=tmp_path / "twin")
    blocks = confirmed(original, ids)
    assert {block.activation for block in blocks} == {"gelu"}
    sums = block_sums(original, twin, blocks, [{"input_ids": ids}])
    assert all(float(part.residual.sum()) > 0 for part in sums.values())
    assert twin.config.polynomial_format == (1 if degree == 1 else 3), "older files do not know halves"
    again = surgery.load(str(tmp_path / "twin"))
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids[:2])[0], twin(input_ids=ids[:2])[0], rtol=1e-4, atol=1e-4)


def test_a_delta_of_halves_gives_every_bit(ids, tmp_path):
    tiny.make("esm").save_pretrained(tmp_path / "base")
    surgery.convert(tmp_path / "base", text=ids, degree=3, readout="keep", form="custom", output=tmp_path / "twin")
    from surgery.publishing.delta import export_delta

    export_delta(tmp_path / "twin", tmp_path / "delta", str(tmp_path / "base"))
    whole, again = (
        surgery.load(str(tmp_path / "twin")),
        surgery.load(str(tmp_path / "delta"), original=str(tmp_path / "base")),
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
