"""Whole conversions at tiny size: every architecture, saved, reloaded in a fresh process and compared."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import surgery
from surgery.closed_form.moments import GaussianMixture
from surgery.errors import CalibrationError, CheckpointError, ModelError, RecipeError, SurgeryError
from tests import tiny


def outputs(model, name, ids):
    with torch.no_grad():
        if name == "vit":
            return model(pixel_values=tiny.inputs_for("vit", ids)["pixel_values"][:4]).logits
        extra = {"decoder_input_ids": ids[:4]} if name.startswith("t5") else {}
        return model(input_ids=ids[:4], **extra).logits


@pytest.mark.parametrize("name", sorted(tiny.MAKERS))
def test_saved_twins_give_the_same_outputs_in_a_fresh_process(name, ids, tmp_path):
    """`convert` reloads what it saved in another process, without this package, and compares keys and outputs."""
    model = tiny.make(name)
    before = outputs(model, name, ids)
    model.save_pretrained(tmp_path / "base")  # loading may rename weights, which a twin must not rename again
    twin, report = surgery.convert(
        tmp_path / "base", calibration=tiny.inputs_for(name, ids), output=tmp_path / "twin", batch=16
    )
    saved = json.loads((tmp_path / "twin" / "surgery.json").read_text())
    assert saved["verification"]["verified"] is True
    assert saved["verification"]["difference"] < 1e-4
    assert report.form == ("native" if name in ("llama", "mistral", "qwen2", "gemma") else "custom")
    assert len(saved["blocks"]) == tiny.BLOCKS.get(name, tiny.LAYERS)
    assert all(row["r2_held"] > 0.5 for row in saved["blocks"])
    after = outputs(twin, name, ids)
    assert 1e-3 < (after - before).norm() / before.norm() < 0.8, "changed, and not beyond recognition"
    again = surgery.load(str(tmp_path / "twin"))
    torch.testing.assert_close(outputs(again, name, ids), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("degree", [1, 3, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_other_degrees_save_and_load(name, degree, ids, tmp_path):
    _, report = surgery.convert(tiny.make(name), calibration=ids, output=tmp_path / "twin", degree=degree)
    assert report.form == "custom"
    assert json.loads((tmp_path / "twin" / "surgery.json").read_text())["verification"]["verified"]


def test_higher_degrees_come_closer(ids):
    model = tiny.make("llama")
    before = outputs(model, "llama", ids)
    errors = [
        float(
            (outputs(surgery.convert(copy.deepcopy(model), calibration=ids, degree=d)[0], "llama", ids) - before).norm()
        )
        for d in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_the_stream_target_and_the_refit_both_help(ids):
    model = tiny.make("llama")
    before = outputs(model, "llama", ids)

    def error(**settings):
        twin, _ = surgery.convert(copy.deepcopy(model), calibration=ids, **settings)
        return float((outputs(twin, "llama", ids) - before).norm())

    kept = error(readout="keep")
    assert error(target="block") < kept
    assert error(target="stream") < kept


def test_a_relative_output_folder_works(ids, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    surgery.convert(tiny.make("llama"), calibration=ids, output="build/twin")
    assert (tmp_path / "build" / "twin" / "surgery.json").is_file()


def test_native_equals_custom(ids):
    model = tiny.make("llama")
    native, report = surgery.convert(copy.deepcopy(model), calibration=ids)
    custom, other = surgery.convert(copy.deepcopy(model), calibration=ids, form="custom")
    assert (report.form, other.form) == ("native", "custom")
    assert native.config.hidden_act == "linear"
    assert native.config.mlp_bias
    a, b = outputs(native, "llama", ids), outputs(custom, "llama", ids)
    # The guard moves ill-conditioned units a little; all else is rounding.
    assert (a - b).norm() < 2e-2 * b.norm()


def test_same_seed_same_file(ids, tmp_path):
    for place in ("one", "two"):
        surgery.convert(tiny.make("llama"), calibration=ids, output=tmp_path / place)
    one, two = (load_file(tmp_path / place / "model.safetensors") for place in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_padding_never_counts(ids):
    """The same tokens, with and without padding on the left, give the same twin."""
    model = tiny.make("llama")
    plain = ids[:, :24]
    padded = torch.cat([torch.zeros(len(ids), 8, dtype=torch.long), plain], dim=1)
    mask = (torch.arange(32) >= 8).long().expand(len(ids), -1)
    one, _ = surgery.convert(copy.deepcopy(model), calibration=plain)
    two, _ = surgery.convert(copy.deepcopy(model), calibration={"input_ids": padded, "attention_mask": mask})
    a, b = outputs(one, "llama", ids), outputs(two, "llama", ids)
    assert (a - b).norm() < 1e-3 * a.norm()
    three, _ = surgery.convert(copy.deepcopy(model), calibration=padded)  # negative control: the padding counted
    assert (outputs(three, "llama", ids) - a).norm() > 1e-2 * a.norm()


def test_some_blocks_only(ids, tmp_path):
    model = tiny.make("llama")
    first = model.model.layers[0].mlp
    twin, report = surgery.convert(model, calibration=ids, blocks="1", output=tmp_path / "twin")
    assert twin.model.layers[0].mlp is first
    assert [row["path"] for row in report.blocks] == ["model.layers.1.mlp"]
    assert report.form == "custom"


def test_gaussian_standard_and_given_moments(ids, tmp_path):
    model = tiny.make("llama")
    for settings in ({"assume": "gaussian"}, {"assume": "standard"}):
        _, report = surgery.convert(copy.deepcopy(model), calibration=ids, **settings)
        assert report.recipe["readout"] == "keep"
    d = tiny.WIDTH
    paths = [f"model.layers.{i}.mlp" for i in range(tiny.LAYERS)]
    given = {path: GaussianMixture(torch.ones(1), torch.zeros(1, d), torch.eye(d)[None]) for path in paths}
    a, _ = surgery.convert(copy.deepcopy(model), calibration=ids, moments=given, assume="gaussian")
    b, _ = surgery.convert(copy.deepcopy(model), calibration=ids, assume="standard")
    torch.testing.assert_close(outputs(a, "llama", ids), outputs(b, "llama", ids))
    file = tmp_path / "moments.safetensors"
    save_file({f"{p}.mean": torch.zeros(d) for p in paths} | {f"{p}.covariance": torch.eye(d) for p in paths}, file)
    c, _ = surgery.convert(copy.deepcopy(model), calibration=ids, assume="gaussian", **{"moments": None})
    from surgery.conversion.recipe import Recipe

    recipe = Recipe(assume="gaussian", moments=str(file))
    e, _ = surgery.convert(copy.deepcopy(model), calibration=ids, recipe=recipe)
    torch.testing.assert_close(outputs(e, "llama", ids), outputs(b, "llama", ids))
    assert (outputs(c, "llama", ids) - outputs(b, "llama", ids)).abs().max() > 1e-4


def test_a_mixture_can_be_given(ids):
    d = tiny.WIDTH
    two = GaussianMixture(
        torch.tensor([0.5, 0.5]), torch.stack([-torch.ones(d), torch.ones(d)]), torch.eye(d).repeat(2, 1, 1)
    )
    given = {f"model.layers.{i}.mlp": two for i in range(tiny.LAYERS)}
    _, report = surgery.convert(tiny.make("llama"), calibration=ids, moments=given, assume="gaussian")
    assert len(report.blocks) == tiny.LAYERS


def test_dtype_and_ties_are_kept(ids, tmp_path):
    config = transformers.LlamaConfig(**tiny.COMMON, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    surgery.convert(str(tmp_path / "model"), calibration=ids, output=tmp_path / "twin", measure=0)
    tensors = load_file(tmp_path / "twin" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twin")
    assert plain.dtype == torch.bfloat16
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_a_custom_twin_refuses_loudly_without_trust(ids, tmp_path):
    import subprocess
    import sys

    surgery.convert(tiny.make("gpt2"), calibration=ids, output=tmp_path / "twin")
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "twin")], capture_output=True, text=True, input="n\n", check=False
    )
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr


def test_twins_generate_and_save_again(ids, tmp_path):
    twin, _ = surgery.convert(tiny.make("gpt2"), calibration=ids, output=tmp_path / "twin")
    long = twin.generate(ids[:2, :5], max_new_tokens=8, do_sample=False, attention_mask=torch.ones(2, 5).long())
    again = surgery.load(str(tmp_path / "twin"))
    again.save_pretrained(tmp_path / "again")
    surgery.register()
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    short = third.generate(ids[:2, :5], max_new_tokens=8, do_sample=False, attention_mask=torch.ones(2, 5).long())
    assert torch.equal(long, short)


def test_a_partial_twin_can_be_converted_further(ids, tmp_path):
    surgery.convert(tiny.make("llama"), calibration=ids, output=tmp_path / "half", blocks="1")
    half = surgery.load(str(tmp_path / "half"))
    _, report = surgery.convert(half, calibration=ids, output=tmp_path / "whole", degree=3)
    assert [row["path"] for row in report.blocks] == ["model.layers.0.mlp"]
    whole = surgery.load(str(tmp_path / "whole"))
    assert {entry["path"]: entry["degree"] for entry in whole.config.polynomial_blocks} == {
        "model.layers.1.mlp": 2,
        "model.layers.0.mlp": 3,
    }


def test_samples_are_not_drawn_again_after_an_interruption(tmp_path, monkeypatch):
    from surgery.calibration import windows
    from surgery.fitting import either

    tiny.save_with_tokenizer("llama", tmp_path / "model")
    settings = {"output": tmp_path / "twin", "tokens": 2048, "length": 32, "measure": 64}

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(either, "fit_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            surgery.convert(tmp_path / "model", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(windows, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):  # negative control: other settings need other samples
            surgery.convert(tmp_path / "model", **settings, seed=1)
        _, report = surgery.convert(tmp_path / "model", **settings)
    assert report.calibration["source"] == "samples"
    assert report.perplexity["tokens"] == 62
    assert not (tmp_path / "twin.partial").exists()


def test_interrupted_runs_resume_and_do_not_redo_finished_blocks(ids, tmp_path, monkeypatch):
    from surgery.conversion import pipeline
    from surgery.fitting import either

    real, calls = either.fit_block, []

    def counting(station, *rest):
        calls.append(station.block.path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(station, *rest)

    model = tiny.make("llama")
    state = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(either, "fit_block", counting)
    with pytest.raises(KeyboardInterrupt):
        surgery.convert(model, calibration=ids, output=tmp_path / "twin")
    assert not (tmp_path / "twin").exists()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items()), "put back as it was"
    with pytest.raises(CheckpointError, match="other settings"):
        surgery.convert(model, calibration=ids, output=tmp_path / "twin", degree=3)
    surgery.convert(model, calibration=ids, output=tmp_path / "twin")
    assert calls == ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.1.mlp"]
    assert not (tmp_path / "twin.partial").exists()
    monkeypatch.undo()

    def failing(*_, **__):
        raise CheckpointError("no space")

    monkeypatch.setattr(pipeline, "save", failing)
    with pytest.raises(CheckpointError, match="no space"):
        surgery.convert(tiny.make("llama"), calibration=ids, output=tmp_path / "late")
    monkeypatch.undo()
    monkeypatch.setattr(either, "fit_block", None)  # all blocks are done: only saving is left
    surgery.convert(tiny.make("llama"), calibration=ids, output=tmp_path / "late")
    monkeypatch.undo()
    surgery.convert(tiny.make("llama"), calibration=ids, output=tmp_path / "straight")
    one, two = (load_file(tmp_path / place / "model.safetensors") for place in ("twin", "straight"))
    three = load_file(tmp_path / "late" / "model.safetensors")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(three[key], two[key], rtol=0, atol=0)


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
        ({"calibration": torch.ones(1, 32, dtype=torch.long)}, CalibrationError, "sequences"),
        ({"calibration": torch.ones(40, dtype=torch.long), "length": 64}, CalibrationError, "fewer than two"),
        ({"calibration": torch.ones(2, 8, dtype=torch.long)}, CalibrationError, "too few"),
        ({"calibration": "python"}, CalibrationError, "tokenizer"),
    ],
)
def test_wrong_settings_are_clear_errors_and_leave_the_model_alone(settings, error, text, ids):
    model = tiny.make("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        surgery.convert(model, **{"calibration": ids, **settings})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"


def test_nan_in_weights_is_an_error(ids):
    model = tiny.make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(SurgeryError, match=r"layers\.1"):
        surgery.convert(model, calibration=ids)


def test_nothing_to_convert_is_an_error(ids):
    config = transformers.JetMoeConfig(
        **tiny.COMMON, num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2
    )
    with pytest.raises(ModelError, match="mixture of experts"):
        surgery.convert(transformers.JetMoeForCausalLM(config), calibration=ids)


def test_a_foreign_folder_is_not_overwritten(ids, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="not made by this tool"):
            surgery.convert(tiny.make("llama"), calibration=ids, output=tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_a_damaged_save_is_noticed_and_leaves_nothing(ids, tmp_path, monkeypatch):
    """Negative control of the verification: a weight changed on its way to disk must not pass."""
    from surgery.saving import checkpoint
    from surgery.saving.checkpoint import _write

    real = _write

    def damaging(model, tokenizer, folder, dtype):
        real(model, tokenizer, folder, dtype)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"].mul_(1.5)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(checkpoint, "_write", damaging)
    with pytest.raises(CheckpointError, match="differs"):
        surgery.convert(tiny.make("llama"), calibration=ids, output=tmp_path / "twin")
    assert [p.name for p in tmp_path.iterdir()] == ["twin.partial"]


def test_half_the_units_stay_a_native_twin_of_half_the_width(ids, tmp_path):
    whole, _ = surgery.convert(tiny.make("llama"), calibration=ids, length=24)
    half, report = surgery.convert(tiny.make("llama"), calibration=ids, length=24, units=0.5, output=tmp_path / "half")
    assert report.form == "native"
    assert whole.config.intermediate_size == tiny.HIDDEN
    assert half.config.intermediate_size == tiny.HIDDEN // 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    with torch.no_grad():
        original, mine, theirs = (model(ids[:8]).logits for model in (tiny.make("llama"), half, whole))
        assert torch.allclose(again(ids[:8]).logits, mine, atol=1e-5)
    assert (mine - original).norm() >= 0.999 * (theirs - original).norm()


def test_the_units_kept_are_better_than_others(ids):
    """Negative control: the same number of units, drawn at random."""
    kept, _ = surgery.convert(tiny.make("llama"), calibration=ids, length=24, units=0.25)

    def drawn(fit, prior, count, free=1):
        order = torch.randperm(len(prior) - free, generator=torch.Generator().manual_seed(1))[:count]
        return torch.cat([order.sort().values, torch.arange(len(prior) - free, len(prior))])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.fitting.readout.most_useful", drawn)
        random, _ = surgery.convert(tiny.make("llama"), calibration=ids, length=24, units=0.25)
    with torch.no_grad():
        original, mine, theirs = (model(ids[:16]).logits for model in (tiny.make("llama"), kept, random))
    assert (mine - original).norm() < 0.95 * (theirs - original).norm()
