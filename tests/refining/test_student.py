"""What the student keeps in memory, and what is trained of it."""

import json

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.refining.run import refined
from surgery.refining.student import checkpoint_activations
from tests.refining.support import settings_of


@pytest.mark.parametrize("name", ["native", "custom", "plain"])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(place, name):
    """Dropout stays off, though transformers checkpoints training layers alone."""

    def run(checkpointing):
        twin = surgery.load(place / name)
        if checkpointing:
            checkpoint_activations(twin)
        kept = []
        ids = torch.arange(3, 67).view(2, 32)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = twin(ids, labels=ids).loss
        loss.backward()
        return sum(kept), {key: value.grad for key, value in twin.named_parameters()}

    (whole, ours), (less, theirs) = run(False), run(True)
    assert less < 0.6 * whole
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-6)


def test_lora_is_merged_and_a_native_twin_stays_native(place, tmp_path):
    record = refined(settings_of(place, tmp_path / "out", train="lora", lora_rank=4, rate=1e-2))
    assert record["divergence_after"] < 0.9 * record["divergence_before"]
    assert record["trained_parameters"] < 20_000

    before, after = (load_file(folder / "model.safetensors") for folder in (place / "native", tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("self_attn" in name for name in changed)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
