"""A saved twin is what was in memory, and loads elsewhere."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import CheckpointError
from surgery.saving import reload
from tests import tiny
from tests.conversion.support import outputs


def test_saved_twins_give_the_same_outputs_in_a_fresh_process(ids, tmp_path, monkeypatch):
    """Every kind of model, loaded in one process without this package: keys and outputs, as `convert` compares them."""
    checks, verified = [], reload.verified

    def noted(folder, probe, expected, dtype, form):
        place = tmp_path / name
        reload.write_probe(place / "probe.safetensors", probe, expected.float())
        checks.append((place / "twin", place / "probe.safetensors", form))
        return verified(folder, probe, expected, dtype, form)

    monkeypatch.setattr(reload, "verified", noted)
    for name in sorted(tiny.MAKERS):
        twin_keeps_what_it_is(name, ids, tmp_path / name)
    assert len(checks) == len(tiny.MAKERS)
    for (folder, *_), seen in zip(checks, reload.reload_elsewhere(checks), strict=True):
        assert seen.keys() == {"missing", "unexpected", "difference"}, (folder, seen)
        assert seen["missing"] == seen["unexpected"] == [] and seen["difference"] < 1e-4, (folder, seen)


def twin_keeps_what_it_is(name, ids, place):
    model = tiny.make(name)
    before = outputs(model, name, ids)
    model.save_pretrained(place / "base")  # loading may rename weights, which a twin must not rename again
    twin, report = surgery.convert(place / "base", text=tiny.inputs_for(name, ids), output=place / "twin", batch=16)
    saved = json.loads((place / "twin" / "surgery.json").read_text())
    assert saved["verification"]["verified"] is True, name
    assert saved["verification"]["difference"] < 1e-4, name
    assert report.form == ("native" if name in ("llama", "mistral", "qwen2", "gemma") else "custom"), name
    assert len(saved["blocks"]) == tiny.BLOCKS.get(name, tiny.LAYERS), name
    assert all(row["r2_held"] > 0.5 for row in saved["blocks"]), name
    after = outputs(twin, name, ids)
    change = (after - before).norm() / before.norm()
    assert 1e-3 < change < 0.8, f"{name}: changed, and not beyond recognition"
    again = surgery.load(str(place / "twin"))
    torch.testing.assert_close(outputs(again, name, ids), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("degree", [1, 3, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_other_degrees_save_and_load(name, degree, ids, tmp_path):
    _, report = surgery.convert(tiny.make(name), text=ids, output=tmp_path / "twin", degree=degree)
    assert report.form == "custom"
    assert json.loads((tmp_path / "twin" / "surgery.json").read_text())["verification"]["verified"]


def test_same_seed_same_file(ids, tmp_path):
    for place in ("one", "two"):
        surgery.convert(tiny.make("llama"), text=ids, output=tmp_path / place)
    one, two = (load_file(tmp_path / place / "model.safetensors") for place in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_dtype_and_ties_are_kept(ids, tmp_path):
    config = transformers.LlamaConfig(**tiny.COMMON, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    surgery.convert(str(tmp_path / "model"), text=ids, output=tmp_path / "twin", measure=0)
    tensors = load_file(tmp_path / "twin" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twin")
    assert plain.dtype == torch.bfloat16
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_a_custom_twin_refuses_loudly_without_trust(ids, tmp_path):
    import subprocess
    import sys

    surgery.convert(tiny.make("gpt2"), text=ids, output=tmp_path / "twin")
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "twin")], capture_output=True, text=True, input="n\n", check=False
    )
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr


def test_twins_generate_and_save_again(ids, tmp_path):
    twin, _ = surgery.convert(tiny.make("gpt2"), text=ids, output=tmp_path / "twin")
    long = twin.generate(ids[:2, :5], max_new_tokens=8, do_sample=False, attention_mask=torch.ones(2, 5).long())
    again = surgery.load(str(tmp_path / "twin"))
    again.save_pretrained(tmp_path / "again")
    surgery.register()
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    short = third.generate(ids[:2, :5], max_new_tokens=8, do_sample=False, attention_mask=torch.ones(2, 5).long())
    assert torch.equal(long, short)


def test_a_foreign_folder_is_not_overwritten(ids, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="not made by this tool"):
            surgery.convert(tiny.make("llama"), text=ids, output=tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.fresh_process
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
        surgery.convert(tiny.make("llama"), text=ids, output=tmp_path / "twin")
    assert [p.name for p in tmp_path.iterdir()] == ["twin.partial"]
