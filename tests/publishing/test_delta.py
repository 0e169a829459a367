"""A twin as what it adds to its original."""

import subprocess
import sys

import pytest
import torch

import surgery
from surgery.errors import ModelError
from surgery.models import delta
from surgery.publishing.delta import export_delta, export_full
from tests import commands, tiny


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Twins of two shapes of block whose readout was kept, in the precisions that are stored."""
    folder = tmp_path_factory.mktemp("kept")
    for kind, dtype in (("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32"), ("phi3", "float32")):
        base = folder / f"{kind}-{dtype}"
        tiny.make(kind).to(getattr(torch, dtype)).save_pretrained(base)
        texts = [
            {"input_ids": torch.randint(3, 60, (4, 32), generator=torch.Generator().manual_seed(n))} for n in range(8)
        ]
        surgery.convert(base, text=texts, output=f"{base}-twin", degree=3, readout="keep", form="custom", measure=0)
    return folder


@pytest.mark.parametrize("name", ["llama-float32", "llama-bfloat16", "gpt2-float32", "phi3-float32"])
def test_a_delta_is_small_and_gives_every_bit_of_the_twin(kept, tmp_path, name):
    twin, base, out = kept / f"{name}-twin", kept / name, tmp_path / "delta"
    done = commands.surgery("export", twin, "-o", out, "--form", "delta", "--original", base)
    assert done.returncode == 0, done.stderr
    assert (out / "delta.safetensors").stat().st_size < (twin / "model.safetensors").stat().st_size / 5
    assert not list(out.glob("model*.safetensors"))
    again = commands.surgery("export", out, "-o", tmp_path / "full", "--form", "full", "--original", base)
    assert again.returncode == 0, again.stderr
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (twin, tmp_path / "full"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert (twin / "config.json").read_text() == (tmp_path / "full" / "config.json").read_text()


def test_a_delta_stores_whole_what_training_changed(kept, tmp_path, ids):
    twin = surgery.load(kept / "llama-float32-twin")
    with torch.no_grad():
        twin.model.layers[0].self_attn.q_proj.weight.mul_(1.1)
        twin.model.layers[1].mlp.down_proj.weight.add_(0.01)
    found = delta.difference(twin, surgery.load(kept / "llama-float32"))
    whole = {key for key in found.tensors if key.startswith("full:") and key.endswith("weight")}
    assert whole == {"full:model.layers.0.self_attn.q_proj.weight", "full:model.layers.1.mlp.down_proj.weight"}


def test_what_a_delta_refuses(kept, exported, tmp_path, ids):
    base, out = kept / "llama-float32", tmp_path / "delta"
    export_delta(kept / "llama-float32-twin", out, str(base))
    with torch.no_grad():
        assert torch.equal(surgery.load(out, original=str(base))(ids).logits, surgery.load(f"{base}-twin")(ids).logits)
    with pytest.raises(ModelError, match="not on the Hub"):
        surgery.load(out)
    changed = tiny.make("llama")
    with torch.no_grad():
        changed.model.norm.weight[0].add_(1e-3)
    changed.save_pretrained(tmp_path / "changed")
    with pytest.raises(ModelError, match="not those this delta was taken from"):
        surgery.load(out, original=str(tmp_path / "changed"))
    with pytest.raises(ModelError, match="--form custom"):
        export_delta(exported / "native", tmp_path / "none", str(exported / "base"))
    with pytest.raises(ModelError, match="not a delta"):
        export_full(exported / "native", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    plain = (
        f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(out)!r}, trust_remote_code=True)"
    )
    done = subprocess.run([sys.executable, "-c", plain, out], capture_output=True, text=True, check=False)
    assert "surgery export" in done.stderr
