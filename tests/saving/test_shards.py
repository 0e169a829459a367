"""Models larger than memory: weights stay on disk, and the twin is the one made in memory."""

import gc
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import surgery
from evals.architectures.tiny_models import tiny as tiny_of
from surgery.errors import ModelError, RecipeError
from surgery.models import loading
from surgery.runtime import weights_on_disk
from surgery.saving import shards
from tests import tiny

SETTINGS = {"text": "python", "tokens": 4096, "window": 32, "measure": 0}


def tensors_of(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("offload")
    for name in ("llama", "gpt2"):
        tiny.save_with_tokenizer(name, place / name)
    return place


@pytest.mark.parametrize(("name", "form"), [("llama", "native"), ("llama", "custom"), ("gpt2", "custom")])
def test_the_twin_is_the_one_made_in_memory(folder, name, form, tmp_path, monkeypatch):
    monkeypatch.setattr("surgery.saving.shards.SHARD", "40KB")
    surgery.convert(folder / name, output=tmp_path / "memory", form=form, **SETTINGS)
    twin, report = surgery.convert(folder / name, output=tmp_path / "disk", form=form, offload=True, **SETTINGS)
    assert report.form == form
    assert len(list((tmp_path / "disk").glob("*.safetensors"))) > 1
    assert not (tmp_path / "disk.partial").exists()
    one, two = tensors_of(tmp_path / "memory"), tensors_of(tmp_path / "disk")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(parameter.is_meta for parameter in twin.parameters())
    ids = torch.randint(3, 90, (2, 16))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "disk", trust_remote_code=form == "custom")
    with torch.no_grad():
        assert torch.allclose(twin(ids).logits, again(ids).logits, atol=1e-5)
    assert json.loads((tmp_path / "disk" / "surgery.json").read_text())["verification"]["verified"]


def test_finished_blocks_and_shards_are_not_redone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("surgery.saving.shards.SHARD", "40KB")
    written, later = [], []
    real = shards.save_file

    def noting(tensors, file, **more):
        later.append(sorted(tensors))
        real(tensors, file, **more)

    def stopping(tensors, file, **more):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(sorted(tensors))
        real(tensors, file, **more)

    given = {"output": tmp_path / "twin", "offload": True, **SETTINGS}
    with monkeypatch.context() as patch:
        patch.setattr("surgery.saving.shards.save_file", stopping)
        with pytest.raises(KeyboardInterrupt):
            surgery.convert(folder / "llama", **given)
    assert not (tmp_path / "twin").exists()

    def never(*_):
        raise AssertionError("a finished block was fitted again")

    monkeypatch.setattr("surgery.fitting.either.fit_block", never)
    monkeypatch.setattr("surgery.saving.shards.save_file", noting)
    surgery.convert(folder / "llama", **given)
    assert written[0] not in later
    assert later


def test_hidden_states_wait_in_files(folder, tmp_path, monkeypatch):
    from surgery.fitting import either

    real, seen = either.fit_block, []

    def looking(station, *rest):
        for arrival in (*station.twin, *station.original):
            seen.append([arrival.x.untyped_storage().filename, arrival.residual.untyped_storage().filename])
        return real(station, *rest)

    monkeypatch.setattr(either, "fit_block", looking)
    surgery.convert(folder / "llama", output=tmp_path / "memory", **SETTINGS)
    assert {name for names in seen for name in names} == {None}
    seen.clear()
    surgery.convert(folder / "llama", output=tmp_path / "disk", offload=True, **SETTINGS)
    assert seen
    assert all(name is not None for names in seen for name in names)


IDS = torch.randint(4, 100, (64, 24), generator=torch.Generator().manual_seed(0))


def same_both_ways(place, **more):
    """The tensors of the twin made from disk, which are those of the one made in memory."""
    given = {"text": IDS, "window": 24, "measure": 0, **more}
    twin, report = surgery.convert(place / "original", **given)
    surgery.convert(place / "original", output=place / "disk", offload=True, **given)
    assert not (place / "disk.partial").exists()
    found = tensors_of(place / "disk")
    stored = getattr(torch, report.source["dtype"])
    expected = {name: value.to(stored) for name, value in twin.state_dict().items()}
    assert expected.keys() - found.keys() == set(twin.all_tied_weights_keys)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    return found


RENAMED = {"mixtral": "Mixtral", "gpt_oss": "GptOss", "deepseek_v3": "DeepseekV3", "gpt_neox": "GPTNeoX"}


@pytest.mark.parametrize("name", RENAMED)
def test_weights_that_are_put_together_or_renamed_on_loading(name, tmp_path):
    """Experts stand one by one in the checkpoint and in one tensor in the model; GPT-NeoX's head has two names."""
    tiny_of(getattr(transformers, f"{RENAMED[name]}ForCausalLM"), name).save_pretrained(tmp_path / "original")
    assert same_both_ways(tmp_path)


def test_experts_left_as_they_are_are_copied(tmp_path, monkeypatch):
    tiny_of(transformers.MixtralForCausalLM, "mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "original")
    before = tensors_of(tmp_path / "original")
    monkeypatch.setattr("surgery.saving.shards.SHARD", "40KB")
    found = same_both_ways(tmp_path, blocks="0")
    last = [before[f"model.layers.1.block_sparse_moe.experts.{number}.w2.weight"] for number in range(4)]
    assert torch.equal(found["model.layers.1.mlp.experts.down_proj"], torch.stack(last))


def test_what_was_put_together_is_removed_when_the_conversion_fails(tmp_path, monkeypatch):
    tiny_of(transformers.MixtralForCausalLM, "mixtral").save_pretrained(tmp_path / "original")

    def fails(*_, **__):
        assert list((tmp_path / "twin.partial" / "merged").glob("*/*experts*"))
        raise ModelError("no")

    monkeypatch.setattr("surgery.conversion.pipeline.prepared", fails)
    with pytest.raises(ModelError):
        surgery.convert(tmp_path / "original", output=tmp_path / "twin", offload=True, text=IDS, window=24)
    gc.collect()
    assert not (tmp_path / "twin.partial").exists()


def test_a_model_that_is_gone_removes_only_its_own(tmp_path):
    tiny_of(transformers.MixtralForCausalLM, "mixtral").save_pretrained(tmp_path / "original")
    merged = tmp_path / "twin.partial" / "merged"
    given = {"name": str(tmp_path / "original"), "device_map": weights_on_disk.ON_DISK, "merged": merged}
    first, second = loading.loaded(**given).model, loading.loaded(**given).model
    assert len(list(merged.iterdir())) == 2
    del first
    gc.collect()
    with torch.no_grad():
        assert torch.isfinite(second(IDS[:2]).logits).all()
    del second
    gc.collect()
    assert not merged.parent.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_was_being_put_together_is_removed(error, tmp_path, monkeypatch):
    tiny_of(transformers.MixtralForCausalLM, "mixtral").save_pretrained(tmp_path / "original")

    def breaks(*_, offload_folder, **__):
        (offload_folder / "half.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(transformers.MixtralForCausalLM, "from_pretrained", breaks)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ModelError) as caught:
        surgery.convert(tmp_path / "original", output=tmp_path / "twin", offload=True, text=IDS, window=24)
    assert not (tmp_path / "twin.partial").exists()
    assert isinstance(error, KeyboardInterrupt) or "as much room again" in str(caught.value)


def test_a_damaged_shard_is_noticed(folder, tmp_path, monkeypatch):
    """Negative control: what was copied wrongly must not pass."""
    real = shards.save_file

    def damaged(tensors, file, **more):
        changed = {name: value * 1.5 if "down_proj" in name else value for name, value in tensors.items()}
        real(changed, file, **more)

    monkeypatch.setattr(shards, "save_file", damaged)
    with pytest.raises(surgery.SurgeryError, match="differs from the one in memory"):
        surgery.convert(folder / "llama", output=tmp_path / "twin", offload=True, **SETTINGS)
    assert not (tmp_path / "twin").exists()


def test_what_cannot_stay_on_disk_is_said(folder, tmp_path):
    with pytest.raises(RecipeError, match="needs an output folder"):
        surgery.convert(folder / "llama", offload=True, **SETTINGS)
    with pytest.raises(ModelError, match="can stay on disk"):
        surgery.convert(tiny.make("llama"), output=tmp_path / "a", offload=True, text=torch.ones(8, 8).long())


@pytest.mark.parametrize(("name", "architecture"), [("dbrx", "Dbrx"), ("longcat_flash", "LongcatFlash")])
def test_weights_used_by_another_module_than_the_one_that_holds_them(name, architecture, tmp_path):
    """DBRX raises then; a matrix product of LongCat's router would be of whatever is in memory."""
    tiny_of(getattr(transformers, f"{architecture}ForCausalLM"), name).save_pretrained(tmp_path / "original")
    with pytest.raises(ModelError, match="without --offload"):
        surgery.convert(tmp_path / "original", output=tmp_path / "twin", offload=True, text=IDS, window=24)


def test_a_module_for_each_expert(tmp_path):
    """Weights in parts of the module that is replaced."""
    tiny_of(transformers.NllbMoeForConditionalGeneration, "nllb-moe", False).save_pretrained(tmp_path / "original")
    assert same_both_ways(tmp_path, text={"input_ids": IDS, "decoder_input_ids": IDS.roll(1, 1)})


def test_a_model_that_does_not_fit_into_memory_is_told_so(folder, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("unable to mmap 494962032 bytes from file <model.safetensors>: Cannot allocate memory (12)")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", fails)
    with pytest.raises(ModelError, match=r"more memory than there is\s.*\s.*--offload"):
        loading.loaded(str(folder / "llama"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_it_cost_is_measured_with_both_models_on_disk(folder, name, tmp_path):
    """The same numbers as in memory; no speed, which would be the disk's."""
    from evals.evaluation import measure
    from evals.memo import Memo
    from evals.settings import EvalSettings

    surgery.convert(folder / name, output=tmp_path / "twin", offload=True, **SETTINGS)

    def measured(device_map):
        settings = EvalSettings(
            str(tmp_path / "twin"), str(folder / name), tokens=256, window=32, block_tokens=256, device_map=device_map
        )
        return measure(settings, Memo(None))

    memory, disk = measured(None), measured("disk")
    assert "speed" in memory and "speed" not in disk
    for key in ("nats_lost", "divergence"):
        assert disk["text"][key]["value"] == pytest.approx(memory["text"][key]["value"], abs=1e-5)
    for one, two in zip(memory["blocks"], disk["blocks"], strict=True):
        assert two["r2"] == pytest.approx(one["r2"], abs=1e-5)


def test_tasks_are_refused_with_weights_on_disk(folder):
    from evals.settings import EvalSettings, check_evaluation
    from surgery.errors import EvaluationError

    with pytest.raises(EvaluationError, match="need the models in memory"):
        check_evaluation(
            EvalSettings(str(folder / "llama"), str(folder / "llama"), tasks=("any",), device_map="disk"), None
        )
