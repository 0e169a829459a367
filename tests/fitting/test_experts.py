"""Polynomials of experts, each on its own tokens."""

import pytest
import torch

import surgery
from evals.architectures.tiny_models import tiny
from surgery.blocks import experts
from surgery.blocks.find import survey
from surgery.errors import CalibrationError, RecipeError
from tests import tiny as tiny_models
from tests.blocks.of_experts import IDS, LISTED, model_of, the_experts


@pytest.mark.parametrize("name", ["mixtral", "dbrx", "llama4", "longcat_flash"])
def test_what_is_quadratic_already_is_recovered_exactly(name):
    model = model_of(name)
    for block in survey(model).blocks:
        module = model.get_submodule(block.path)
        for part in (module, getattr(module, "mlp", module)):
            for attribute in ("act_fn", "activation_fn"):
                if hasattr(part, attribute):
                    setattr(part, attribute, torch.nn.Identity())  # gate ⊙ up: bilinear
    with torch.no_grad():
        before = model(IDS[:4]).logits
    twin, report = surgery.convert(model, text=IDS, degree=2, window=24, matmul="float32")
    with torch.no_grad():
        after = twin(IDS[:4]).logits
    assert all(row["starved"] == [] for row in report.blocks if row["kind"] == "experts")
    assert len(the_experts(twin)) == 0 < sum(row["kind"] == "experts" for row in report.blocks)
    assert (after - before).norm() < 1e-3 * before.norm()
    assert twin.config.polynomial_format == (2 if name == "longcat_flash" else 1)  # older files would pass nothing on


def test_swiglu_experts_are_no_quadratic_and_the_error_falls_with_the_degree():
    errors = []
    for degree in (1, 2, 3):
        model = model_of("gpt_oss")
        with torch.no_grad():
            before = model(IDS[:16]).logits
        twin, _ = surgery.convert(model, text=IDS, degree=degree, window=24)
        with torch.no_grad():
            errors.append(float((twin(IDS[:16]).logits - before).norm() / before.norm()))
    assert errors[0] > 1.1 * errors[1] > 1.21 * errors[2] > 0


def test_each_expert_is_fitted_on_its_own_tokens():
    model = model_of("mixtral")
    block = the_experts(model)[0]
    seen = {}

    def note(module, args, kwargs):
        seen["routing"] = experts.Routing.of(module, args, kwargs)

    module = model.get_submodule(block.path)
    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(IDS)
    handle.remove()
    expected = [len(seen["routing"].of_expert(number)[0]) for number in range(4)]
    _, report = surgery.convert(model, text=IDS, window=24, batch=64, matmul="float32")
    assert list(report.blocks[0]["tokens_by_expert"]) == expected
    assert sum(expected) == 2 * IDS.numel()


def without_tokens(model, block):
    """Takes every token from the block's last expert; the hook to remove afterwards."""
    gate = model.get_submodule(block.path.rpartition(".")[0]).gate
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[:3] = torch.randn(3, gate.weight.shape[1], generator=torch.Generator().manual_seed(3))
    return gate.register_forward_hook(lambda _, __, out: (out[0], out[1], out[2].clamp(max=2)))


def test_an_expert_without_tokens_is_reported_and_gets_its_layers_polynomial():
    model = model_of("mixtral")
    block = the_experts(model)[0]
    hook = without_tokens(model, block)
    original = experts.weights(model.get_submodule(block.path), 3).down[0].clone()
    twin, report = surgery.convert(model, text=IDS, window=24, readout="refit")
    hook.remove()
    assert report.blocks[0]["starved"] == [3]
    assert report.blocks[0]["tokens_by_expert"][3] == 0
    module = twin.get_submodule(block.path)
    hidden = original.shape[1]
    assert torch.allclose(module.down_weight[3, :, :hidden], original)  # the readout is kept
    assert module.coefficients[3].abs().sum() > 0


def test_an_expert_without_tokens_keeps_as_few_units_as_the_others():
    model = model_of("mixtral")
    block = the_experts(model)[0]
    hook = without_tokens(model, block)
    twin, report = surgery.convert(model, text=IDS, window=24, units=0.25)
    hook.remove()
    assert report.blocks[0]["starved"] == [3]
    assert twin.get_submodule(block.path).gate_weight.shape[1] == round(0.25 * block.hidden)


def test_errors_count_as_much_as_the_routing_does():
    """Tokens with a weight of nearly nothing, from another distribution, must not cost the others their fit."""
    from surgery.calibration.arrivals import Arrival, Station
    from surgery.fitting.block import FitSettings, fit_block
    from surgery.saving.modules import modules_for

    module = model_of("mixtral").model.layers[0].mlp.experts
    original = experts.weights(module, 0)
    generator = torch.Generator().manual_seed(0)
    heavy, light = torch.randn(600, 32, generator=generator), 3 + 2 * torch.randn(600, 32, generator=generator)
    x = torch.stack([heavy, light], dim=1).flatten(0, 1)
    weight = torch.tensor([1.0, 1e-3]).repeat(600)
    yes, no = torch.ones(1200, dtype=torch.bool), torch.zeros(1200, dtype=torch.bool)
    held = torch.arange(1200) >= 1000
    block = the_experts(model_of("mixtral"))[0]
    errors = []
    for counted in (weight, None):
        arrival = Arrival(x, yes, None, x.norm(dim=-1), held, no, weight=counted)
        one = block.one(0)
        with torch.no_grad():
            fitted = fit_block(Station(one, {}, (arrival,), ()), FitSettings(2), original=original)
            twin = modules_for(fitted, "custom", x)[1][one.path]
            errors.append(float((twin(heavy) - original(heavy)).norm()))
    assert errors[0] < 0.9 * errors[1]


def test_a_closed_form_under_a_gaussian_is_refused_where_there_is_none():
    with pytest.raises(CalibrationError, match="gate and up together"):
        surgery.convert(model_of("gpt_oss"), text=IDS, window=24, assume="gaussian")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_models, "make", lambda _: model_of("mixtral"))
        tiny_models.save_with_tokenizer("mixtral", folder / "base")
    surgery.convert(folder / "base", output=folder / "twin", tokens=2048, window=32, measure=256, text="python")
    return folder


def test_twins_of_experts_are_measured_block_by_block(saved):
    from evals.block_fidelity import block_rows, block_sums

    original, twin = (surgery.load(str(saved / name)) for name in ("base", "twin"))
    blocks = the_experts(original)
    rows = block_rows(original, twin, blocks, block_sums(original, twin, blocks, [{"input_ids": IDS[:32]}]))
    assert [row["fvu_gaussian"] for row in rows] == [None, None]
    assert all(row["r2"] > row["r2_affine"] for row in rows)


def test_twins_of_experts_are_refined_end_to_end_only(saved, tmp_path):
    from surgery.refining.run import refined
    from surgery.refining.settings import RefineSettings, check_refinement

    given = {
        "twin": str(saved / "twin"), "original": str(saved / "base"), "output": str(tmp_path / "out"),
        "tokens": 4096, "window": 32, "validate_tokens": 256, "dtype": "float32", "rate": 3e-3,
    }  # fmt: skip
    record = refined(RefineSettings(**given, train="coefficients"))
    assert record["divergence_after"] < record["divergence_before"]
    for more in ({"objective": "local"}, {"blend": 0.3}):
        with pytest.raises(RecipeError, match="experts cannot be refined block by block"):
            check_refinement(RefineSettings(**given, **more))


@pytest.mark.fresh_process
def test_affine_blocks_whose_first_values_are_given_from_above(tmp_path):
    tiny(LISTED["switch_transformers"], "switch_transformers", causal=False).save_pretrained(tmp_path / "base")
    given = {"input_ids": IDS, "decoder_input_ids": IDS.roll(1, 1)}
    _, report = surgery.convert(tmp_path / "base", output=tmp_path / "twin", text=given, degree=1, window=24)
    assert {row["kind"] for row in report.blocks} == {"plain", "experts"}
