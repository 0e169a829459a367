"""Whole conversions at tiny size: every architecture, saved, reloaded in a fresh process and compared."""

import copy
from contextlib import contextmanager

import pytest
import torch
import transformers
from safetensors.torch import save_file

import surgery
from surgery.closed_form.moments import GaussianMixture
from surgery.conversion import replacement
from surgery.errors import CalibrationError, ModelError, RecipeError, SurgeryError
from surgery.fitting.features import RoundedHidden
from surgery.runtime import precision
from tests import tiny
from tests.conversion.support import outputs


def test_higher_degrees_come_closer(ids):
    model = tiny.make("llama")
    before = outputs(model, "llama", ids)
    errors = [
        float((outputs(surgery.convert(copy.deepcopy(model), text=ids, degree=d)[0], "llama", ids) - before).norm())
        for d in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_the_stream_target_and_the_refit_both_help(ids):
    model = tiny.make("llama")
    before = outputs(model, "llama", ids)

    def error(**settings):
        twin, _ = surgery.convert(copy.deepcopy(model), text=ids, **settings)
        return float((outputs(twin, "llama", ids) - before).norm())

    kept = error(readout="keep")
    assert error(target="block") < kept
    assert error(target="stream") < kept


@pytest.mark.parametrize("degree", [2, 3])
def test_products_in_bfloat16_change_little_and_are_recorded(ids, degree, monkeypatch):
    model, rounded, of = tiny.make("llama"), [], RoundedHidden.of
    monkeypatch.setattr(RoundedHidden, "of", staticmethod(lambda *given: rounded.append(given[2]) or of(*given)))
    before = outputs(model, "llama", ids)
    found = {}
    for matmul in ("float32", "bfloat16"):
        twin, report = surgery.convert(copy.deepcopy(model), text=ids, degree=degree, matmul=matmul)
        assert report.recipe["matmul"] == matmul
        assert len(rounded) >= len(report.blocks) if matmul == "bfloat16" else not rounded
        assert {p.dtype for p in twin.parameters()} == {torch.float32}
        found[matmul] = outputs(twin, "llama", ids)
    lost = (found["float32"] - before).norm()
    apart = (found["bfloat16"] - found["float32"]).norm()
    assert 0 < apart < 0.3 * lost
    assert (found["bfloat16"] - before).norm() < 1.1 * lost


def test_a_model_that_mixes_precisions_is_multiplied_in_float32(monkeypatch):
    """DBRX adds what its experts write to a tensor of its input's precision."""
    from tests.blocks.of_experts import IDS, model_of

    monkeypatch.setattr(precision, "fast_bf16", lambda device: True)
    _, report = surgery.convert(model_of("dbrx"), text=IDS, window=24, degree=1)
    assert report.recipe["matmul"] == "float32"
    with pytest.raises(ModelError, match="does not run with products in bfloat16"):
        surgery.convert(model_of("dbrx"), text=IDS, window=24, degree=1, matmul="bfloat16")
    _, report = surgery.convert(model_of("mixtral"), text=IDS, window=24, degree=1)
    assert report.recipe["matmul"] == "bfloat16"


def test_passes_of_other_precisions_stay_as_they_are(ids, monkeypatch):
    """What is fitted is float32 whatever the weights are in."""
    seen = []

    def noted(dtype, device, cached=False):
        seen.append(dtype)
        return torch.autocast(device.type, enabled=False)

    monkeypatch.setattr("surgery.calibration.passes.autocast", noted)
    monkeypatch.setattr("surgery.runtime.precision.autocast", noted)
    for dtype, expected in ((torch.bfloat16, {"float32"}), (torch.float32, {"bfloat16"})):
        _, report = surgery.convert(tiny.make("llama").to(dtype), text=ids, degree=1, matmul="bfloat16")
        assert set(seen) == expected
        assert report.recipe["matmul"] == "bfloat16"
        seen.clear()


@contextmanager
def interrupted_after_a_block(monkeypatch):
    """Inside, a conversion fits its first block and is interrupted at the second."""
    fit, done = replacement.fit, []

    def first_alone(*given):
        if done:
            raise KeyboardInterrupt
        done.append(fit(*given))
        return done[0]

    with monkeypatch.context() as patched:
        patched.setattr(replacement, "fit", first_alone)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("matmul", ["float32", "bfloat16"])
def test_a_run_that_goes_on_makes_the_twin_of_an_unbroken_one(ids, tmp_path, monkeypatch, matmul):
    """But for rounding: what finished blocks write is computed by themselves then, in float32."""
    model, how = tiny.make("llama"), {"text": ids, "epochs": 0, "matmul": matmul}
    whole, _ = surgery.convert(copy.deepcopy(model), **how)
    with interrupted_after_a_block(monkeypatch):
        surgery.convert(copy.deepcopy(model), **how, output=tmp_path / "twin")
    resumed, _ = surgery.convert(copy.deepcopy(model), **how, output=tmp_path / "twin")
    before, one, two = (outputs(network, "llama", ids) for network in (model, whole, resumed))
    apart = (one - two).norm() / (one - before).norm()
    assert apart < {"float32": 1e-5, "bfloat16": 0.02}[matmul]


def test_an_interrupted_run_goes_on_whatever_is_faster_now(ids, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "fast_bf16", lambda device: True)
    with interrupted_after_a_block(monkeypatch):
        surgery.convert(tiny.make("llama"), text=ids, output=tmp_path / "twin")
    monkeypatch.setattr(precision, "fast_bf16", lambda device: False)
    with pytest.raises(SurgeryError, match="with other settings"):
        surgery.convert(tiny.make("llama"), text=ids, output=tmp_path / "twin", matmul="bfloat16")
    _, report = surgery.convert(tiny.make("llama"), text=ids, output=tmp_path / "twin")
    assert report.recipe["matmul"] == "float32"


def test_a_relative_output_folder_works(ids, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    surgery.convert(tiny.make("llama"), text=ids, output="build/twin")
    assert (tmp_path / "build" / "twin" / "surgery.json").is_file()


def test_native_equals_custom(ids):
    model = tiny.make("llama")
    native, report = surgery.convert(copy.deepcopy(model), text=ids)
    custom, other = surgery.convert(copy.deepcopy(model), text=ids, form="custom")
    assert (report.form, other.form) == ("native", "custom")
    assert native.config.hidden_act == "linear"
    assert native.config.mlp_bias
    a, b = outputs(native, "llama", ids), outputs(custom, "llama", ids)
    # The guard moves ill-conditioned units a little; all else is rounding.
    assert (a - b).norm() < 2e-2 * b.norm()


def test_padding_never_counts(ids):
    """The same tokens, with and without padding on the left, give the same twin (the closed form in float32 does:
    bfloat16 makes much of where rows lie, and so does descent)."""
    model = tiny.make("llama")
    plain = ids[:, :24]
    padded = torch.cat([torch.zeros(len(ids), 8, dtype=torch.long), plain], dim=1)
    mask = (torch.arange(32) >= 8).long().expand(len(ids), -1)
    exact = {"epochs": 0, "matmul": "float32"}
    one, _ = surgery.convert(copy.deepcopy(model), text=plain, **exact)
    two, _ = surgery.convert(copy.deepcopy(model), text={"input_ids": padded, "attention_mask": mask}, **exact)
    a, b = outputs(one, "llama", ids), outputs(two, "llama", ids)
    assert (a - b).norm() < 1e-3 * a.norm()
    three, _ = surgery.convert(copy.deepcopy(model), text=padded, epochs=0)  # negative control: the padding counted
    assert (outputs(three, "llama", ids) - a).norm() > 1e-2 * a.norm()


def test_some_blocks_only(ids, tmp_path):
    model = tiny.make("llama")
    first = model.model.layers[0].mlp
    twin, report = surgery.convert(model, text=ids, blocks="1", output=tmp_path / "twin")
    assert twin.model.layers[0].mlp is first
    assert [row["path"] for row in report.blocks] == ["model.layers.1.mlp"]
    assert report.form == "custom"


def test_gaussian_standard_and_given_moments(ids, tmp_path):
    model = tiny.make("llama")
    for settings in ({"assume": "gaussian"}, {"assume": "standard"}):
        _, report = surgery.convert(copy.deepcopy(model), text=ids, **settings)
        assert report.recipe["readout"] == "keep"
    d = tiny.WIDTH
    paths = [f"model.layers.{i}.mlp" for i in range(tiny.LAYERS)]
    given = {path: GaussianMixture(torch.ones(1), torch.zeros(1, d), torch.eye(d)[None]) for path in paths}
    a, _ = surgery.convert(copy.deepcopy(model), text=ids, moments=given, assume="gaussian")
    b, _ = surgery.convert(copy.deepcopy(model), text=ids, assume="standard")
    torch.testing.assert_close(outputs(a, "llama", ids), outputs(b, "llama", ids))
    file = tmp_path / "moments.safetensors"
    save_file({f"{p}.mean": torch.zeros(d) for p in paths} | {f"{p}.covariance": torch.eye(d) for p in paths}, file)
    c, _ = surgery.convert(copy.deepcopy(model), text=ids, assume="gaussian", **{"moments": None})
    from surgery.conversion.recipe import Recipe

    recipe = Recipe(assume="gaussian", moments=str(file))
    e, _ = surgery.convert(copy.deepcopy(model), text=ids, recipe=recipe)
    torch.testing.assert_close(outputs(e, "llama", ids), outputs(b, "llama", ids))
    assert (outputs(c, "llama", ids) - outputs(b, "llama", ids)).abs().max() > 1e-4


def test_a_mixture_can_be_given(ids):
    d = tiny.WIDTH
    two = GaussianMixture(
        torch.tensor([0.5, 0.5]), torch.stack([-torch.ones(d), torch.ones(d)]), torch.eye(d).repeat(2, 1, 1)
    )
    given = {f"model.layers.{i}.mlp": two for i in range(tiny.LAYERS)}
    _, report = surgery.convert(tiny.make("llama"), text=ids, moments=given, assume="gaussian")
    assert len(report.blocks) == tiny.LAYERS


def test_a_partial_twin_can_be_converted_further(ids, tmp_path):
    surgery.convert(tiny.make("llama"), text=ids, output=tmp_path / "half", blocks="1")
    half = surgery.load(str(tmp_path / "half"))
    _, report = surgery.convert(half, text=ids, output=tmp_path / "whole", degree=3)
    assert [row["path"] for row in report.blocks] == ["model.layers.0.mlp"]
    whole = surgery.load(str(tmp_path / "whole"))
    assert {entry["path"]: entry["degree"] for entry in whole.config.polynomial_blocks} == {
        "model.layers.1.mlp": 2,
        "model.layers.0.mlp": 3,
    }


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"degree": 0}, RecipeError, "degree"),
        ({"degree": 99}, RecipeError, "degree"),
        ({"assume": "dat"}, RecipeError, "assume"),
        ({"blocks": "5"}, RecipeError, "blocks 0 to 1"),
        ({"blocks": "3-1"}, RecipeError, "backwards"),
        ({"form": "native", "degree": 3}, RecipeError, "native"),
        ({"readoutt": "keep"}, RecipeError, "did you mean 'readout'"),
        ({"text": torch.ones(1, 32, dtype=torch.long)}, CalibrationError, "sequences"),
        ({"text": torch.ones(40, dtype=torch.long), "window": 64}, CalibrationError, "fewer than two"),
        ({"text": torch.ones(2, 8, dtype=torch.long)}, CalibrationError, "too few"),
        ({"text": "python"}, CalibrationError, "tokenizer"),
    ],
)
def test_wrong_settings_are_clear_errors_and_leave_the_model_alone(settings, error, text, ids):
    model = tiny.make("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        surgery.convert(model, **{"text": ids, **settings})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"


def test_nan_in_weights_is_an_error(ids):
    model = tiny.make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(SurgeryError, match=r"layers\.1"):
        surgery.convert(model, text=ids)


def test_nothing_to_convert_is_an_error(ids):
    config = transformers.JetMoeConfig(
        **tiny.COMMON, num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2
    )
    with pytest.raises(ModelError, match="mixture of experts"):
        surgery.convert(transformers.JetMoeForCausalLM(config), text=ids)
