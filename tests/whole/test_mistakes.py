"""What users do that a conversion must survive or refuse: it never goes on silently with something wrong."""

import copy
import json

import pytest
import torch
import transformers as T
from torch import nn

import surgery
from surgery.calibration.arrivals import first_token_size
from surgery.calibration.held_out import fitted_sequences
from surgery.closed_form import sinks
from surgery.closed_form.moments import GaussianMixture, InputMoments, Preactivations, from_data
from surgery.closed_form.sinks import directions
from surgery.errors import CalibrationError, CheckpointError, ModelError, RecipeError, SurgeryError
from surgery.fitting import either
from surgery.models.modeling_polynomial import install
from tests import tiny


def stopped_after_one_block(model, monkeypatch, **settings):
    """A conversion that is interrupted at its second block."""
    real, calls = either.fit_block, []

    def fit_block(station, *rest):
        calls.append(station)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(station, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(either, "fit_block", fit_block)
        with pytest.raises(KeyboardInterrupt):
            surgery.convert(model, **settings)


def test_finished_blocks_of_another_model_are_not_used(ids, tmp_path, monkeypatch):
    settings = {"text": ids, "output": tmp_path / "twin"}
    stopped_after_one_block(tiny.make("phi"), monkeypatch, **settings)
    with pytest.raises(CheckpointError, match="of another model"):
        surgery.convert(tiny.make("phi", seed=9), **settings)
    surgery.convert(tiny.make("phi"), **settings)  # the control: of the same model they are


def test_finished_blocks_are_not_used_once_the_checkpoint_was_written_anew(ids, tmp_path, monkeypatch):
    settings = {"text": ids, "output": tmp_path / "twin"}
    tiny.make("llama").save_pretrained(tmp_path / "base")
    stopped_after_one_block(tmp_path / "base", monkeypatch, **settings)
    tiny.make("llama", seed=9).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="of another model"):
        surgery.convert(tmp_path / "base", **settings)


def test_finished_blocks_are_not_used_under_other_moments(ids, tmp_path, monkeypatch):
    def moments(mean):
        given = GaussianMixture(torch.ones(1), torch.full((1, tiny.WIDTH), mean), torch.eye(tiny.WIDTH)[None])
        return {f"model.layers.{n}.mlp": given for n in range(tiny.LAYERS)}

    settings = {"text": ids, "output": tmp_path / "twin", "assume": "gaussian"}
    stopped_after_one_block(tiny.make("llama"), monkeypatch, **settings, moments=moments(0.0))
    with pytest.raises(CheckpointError, match="of another model, or with other settings"):
        surgery.convert(tiny.make("llama"), **settings, moments=moments(1.0))


@pytest.mark.parametrize(
    ("rows", "fitted"),
    [
        ([16], [14]),
        ([1, 1], [1, 0]),
        ([2], [1]),
        ([8, 8], [8, 6]),
    ],
)
def test_an_eighth_of_one_length_is_held_out(rows, fitted):
    assert fitted_sequences([{"input_ids": torch.ones(n, 12)} for n in rows]) == fitted


def test_with_as_many_lengths_as_sequences_an_eighth_is_held_out():
    fitted = fitted_sequences([{"input_ids": torch.ones(1, 10 + n)} for n in range(20)])
    assert sum(fitted) == 18 and fitted[-2:] == [0, 0]


def test_sequences_of_all_lengths_are_fitted_on(ids):
    batches = [{"input_ids": ids[n : n + 1, : 13 + n % 19]} for n in range(60)]
    _, report = surgery.convert(tiny.make("llama"), text=batches)
    assert min(row["r2_held"] for row in report.blocks) > 0.5


@pytest.mark.parametrize("when", ["saving", "measuring"])
def test_an_error_after_the_last_block_leaves_the_model_as_it_was(ids, tmp_path, monkeypatch, when):
    from surgery.conversion import pipeline

    def failing(*_, **__):
        raise CheckpointError("no space")

    for name in ("llama", "gpt2"):  # native, and custom code
        model = tiny.make(name)
        kind, config, state = type(model), copy.deepcopy(model.config), copy.deepcopy(model.state_dict())
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "save" if when == "saving" else "compared", failing)
            with pytest.raises(CheckpointError, match="no space"):
                surgery.convert(model, text=ids, output=tmp_path / name)
        assert type(model) is kind
        assert model.config.to_dict() == config.to_dict()
        assert model.base_model.config is model.config
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_class_of_ones_own_is_refused(ids):
    class Mine(T.PhiForCausalLM):
        pass

    with pytest.raises(ModelError, match="no such model class"):
        surgery.convert(Mine(T.PhiConfig(**tiny.COMMON)), text=ids)


def test_a_hook_on_a_block_is_refused(ids):
    model = tiny.make("llama")
    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        surgery.convert(model, text=ids)
    handle.remove()
    surgery.convert(model, text=ids)


def test_moments_of_half_precision_are_those_of_the_same_numbers_in_single():
    """A covariance rounded to bfloat16 has negative eigenvalues, and u⁶ in float16 overflows."""
    generator = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(4096, 16, generator=generator) @ torch.randn(16, 16, generator=generator) * 0.05
    rough = x.bfloat16()
    assert torch.linalg.eigvalsh(InputMoments.of(rough).covariance).min() > 0
    torch.testing.assert_close(InputMoments.of(rough).covariance, InputMoments.of(rough.float()).covariance)
    from surgery.closed_form.activations import ACTIVATIONS

    half = (x * 20).half()
    at = Preactivations(*(torch.full((16,), value, dtype=torch.float64) for value in (0.0, 1.0)))
    for part in (half, half.float()):
        sums = from_data(ACTIVATIONS["gelu"], at, part, None, 3)
        assert torch.isfinite(sums.u).all()


def test_the_direction_of_a_sink_is_found_in_bfloat16():
    """It needs a covariance that is positive: sums of bfloat16 products are not, and have no Cholesky factor."""
    generator = torch.Generator().manual_seed(0)
    x = (3 + 0.2 * torch.randn(4096, 16, generator=generator)).bfloat16()
    sink = 50 * torch.ones(1, 16).bfloat16()
    found = directions(InputMoments.of(x), sink)
    answer = nn.functional.linear(sink.double(), found.weight, found.bias)
    torch.testing.assert_close(answer, torch.ones_like(answer), rtol=1e-6, atol=1e-6)


def test_a_bfloat16_model_with_sinks_is_converted_to_finite_weights(ids):
    model = tiny.make("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight += 2.0
        model.model.embed_tokens.weight[1] *= 400  # the start token's residual stream is massive
        model.model.layers[0].mlp.down_proj.weight *= 60
    long = torch.cat([torch.ones(64, 1, dtype=torch.long), ids, ids.flip(0)], dim=1)
    twin, report = surgery.convert(model.bfloat16(), text=long, window=65)
    assert report.blocks[0]["sink_tokens"] > 0
    assert all(torch.isfinite(value).all() for value in twin.state_dict().values())


def test_what_a_collator_gives_is_calibrated_on(ids, tmp_path):
    ids = torch.cat([ids, ids[:, :8]], dim=1)  # longer than the probe
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "position_ids": torch.arange(40).expand(64, -1),
    }
    twin, _ = surgery.convert(tiny.make("llama"), text=batch, output=tmp_path / "twin")
    plain, _ = surgery.convert(tiny.make("llama"), text={"input_ids": ids})
    with torch.no_grad():
        torch.testing.assert_close(twin(ids[:2]).logits, plain(ids[:2]).logits, rtol=1e-3, atol=1e-3)


def test_a_replacement_stands_where_the_original_stood():
    model = nn.Module()
    model.block = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3), nn.LayerNorm(3))
    install(model, "block.0", nn.Identity())
    assert [type(part).__name__ for part in model.block] == ["Identity", "GELU", "Linear", "LayerNorm"]


def test_a_twins_configuration_is_one_object(ids):
    twin, _ = surgery.convert(tiny.make("gpt2"), text=ids)
    twin.config.output_hidden_states = True
    with torch.no_grad():
        assert twin(ids[:1]).hidden_states is not None


def test_reports_hold_no_local_paths(tmp_path, ids):
    tiny.save_with_tokenizer("llama", tmp_path / "base")
    (tmp_path / "own.txt").write_text("the quick brown fox jumps over the lazy dog " * 400)
    surgery.convert(tmp_path / "base", text=str(tmp_path / "own.txt"), output=tmp_path / "twin", window=32, measure=64)
    text = (tmp_path / "twin" / "surgery.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["calibration"]["source"] == "own.txt"


def test_an_output_inside_the_models_folder_does_not_make_it_another_model(ids, tmp_path, monkeypatch):
    tiny.make("llama").save_pretrained(tmp_path / "base")
    settings = {"text": ids, "output": tmp_path / "base" / "twin"}
    stopped_after_one_block(tmp_path / "base", monkeypatch, **settings)
    surgery.convert(tmp_path / "base", **settings)


def test_samples_are_kept_beside_the_folder_one_is_in(tmp_path, monkeypatch):
    tiny.save_with_tokenizer("llama", tmp_path / "base")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    surgery.convert(tmp_path / "base", output=".", text="samples", tokens=2048, window=32, measure=64)
    report = json.loads((tmp_path / "here" / "surgery.json").read_text())
    assert report["recipe"]["output"] == "here"


def test_the_folder_one_is_in_can_be_the_output(ids, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    surgery.convert(tiny.make("llama"), text=ids, output=".")
    assert (tmp_path / "here" / "config.json").is_file()


def test_a_file_in_the_way_of_the_output_is_a_clear_error(ids, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file blocks the path"):
        surgery.convert(tiny.make("llama"), text=ids, output=tmp_path / "file" / "twin")


def test_ids_beyond_the_vocabulary_are_a_clear_error(ids):
    with pytest.raises(CalibrationError, match="vocabulary"):
        surgery.convert(tiny.make("llama"), text=ids + 90)


def test_words_are_a_clear_error():
    with pytest.raises(RecipeError, match=r"(?s)no text source 'the quick brown fox'.*token ids"):
        surgery.convert(tiny.make("llama"), text=["the quick brown fox"])


def test_block_numbers_beyond_reason_are_refused_at_once():
    with pytest.raises(RecipeError, match="no model has as many"):
        surgery.convert(tiny.make("llama"), blocks="0-20000000")


def test_the_first_token_is_the_first_that_is_real(ids):
    """Padded on the left, position 0 is no token."""
    model = tiny.make("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= 1000
    ids = torch.cat([torch.ones(4, 1, dtype=torch.long), ids[:4]], dim=1)
    padded = torch.cat([torch.zeros(4, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand(4, -1)
    from surgery.blocks.find import survey

    blocks = survey(model).blocks
    assert first_token_size(model, {"input_ids": ids}, blocks) > sinks.MASSIVE
    assert first_token_size(model, {"input_ids": padded, "attention_mask": mask}, blocks) > sinks.MASSIVE
    assert first_token_size(model, {"input_ids": ids[:, 1:]}, blocks) <= sinks.MASSIVE


def test_a_wrong_block_number_is_told_before_any_weight_is_read(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"blocks 0 to 1(.|\n)*surgery inspect"):
        surgery.convert(tmp_path / "base", text="python", blocks="5")


def test_what_is_neither_here_nor_on_the_hub_is_told_so():
    with pytest.raises(ModelError, match="no such file or folder here"):
        surgery.convert("nosuchfolder", text="python")


def test_a_wrong_text_is_told_before_the_missing_original(ids, tmp_path):
    from evals import evaluate

    surgery.convert(tiny.make("llama"), text=ids, output=tmp_path / "twin")
    with pytest.raises(RecipeError, match=r"nosuch\.txt"):
        evaluate(tmp_path / "twin", text="nosuch.txt")
    with pytest.raises(SurgeryError, match="not on the Hub"):
        evaluate(tmp_path / "twin", text="python")
