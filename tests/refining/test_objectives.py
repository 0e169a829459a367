"""What a step makes smaller."""

import pytest
import torch

import surgery
from surgery.refining.packing import PackedWindows
from surgery.refining.run import refined
from tests import tiny
from tests.refining.support import BASES, settings_of


@pytest.mark.parametrize(
    ("twin", "more"),
    [
        ("native", {"objective": "local"}), ("plain", {"objective": "local", "rate": 1e-3}), ("custom", {"match": 0.5}),
        ("plain", {"match": 0.5, "rate": 5e-4}), ("native", {"checkpointing": True}),
        ("native", {"text": ("samples",)}), ("native", {"blend": 0.5}), ("plain", {"blend": 0.5, "rate": 5e-4}),
        ("native", {"dtype": "bfloat16"}), ("native", {"blend": 0.5, "checkpointing": True}),
        ("native", {"train": "lora", "match": 0.5, "blend": 0.3, "rate": 1e-2}),
        ("custom", {"train": "lora", "match": 0.5, "rate": 1e-2}),
        ("kin", {}), ("custom", {"train": "coefficients", "rate": 1e-2}),
    ],
)  # fmt: skip
def test_every_way_of_refining_comes_nearer(place, tmp_path, twin, more):
    record = refined(settings_of(place, tmp_path / "out", twin, **more))
    assert record["divergence_after"] < 0.9 * record["divergence_before"]
    assert (tmp_path / "out" / "refinement.png").read_bytes()[:4] == b"\x89PNG"


def test_local_gradients_are_those_of_each_block_alone(place):
    """Against the blocks' errors written out, on inputs taken from the twin and goals from the original."""
    from accelerate import Accelerator

    from surgery.refining.objectives import Local, block_error
    from surgery.refining.parameters import named_trainable, twin_block_paths

    twin, teacher = surgery.load(place / "native"), surgery.load(place / "llama")
    trainable = named_trainable(twin, "block")
    blocks = [paths for paths, _ in twin_block_paths(twin)]
    part = PackedWindows(torch.arange(3, 67).view(2, 32), torch.cat([torch.arange(20), torch.arange(12)]).expand(2, -1))
    loss = Local(Accelerator(cpu=True), teacher, lambda: torch.autocast("cpu", enabled=False), twin, blocks)(part)
    found = {name: value.grad.clone() for name, value in trainable.items()}
    twin.zero_grad()
    seen, goals, handles = {}, {}, []
    for index in range(tiny.LAYERS):
        handles += [
            twin.model.layers[index].mlp.register_forward_pre_hook(
                lambda _, x, i=index: seen.update({i: x[0].detach()})
            ),
            teacher.model.layers[index].mlp.register_forward_hook(lambda _, __, y, i=index: goals.update({i: y})),
        ]
    with torch.no_grad():
        for model in (twin, teacher):
            model(**part.inputs("cpu"), use_cache=False)  # documents apart
    for handle in handles:
        handle.remove()
    errors = [block_error(twin.model.layers[i].mlp(seen[i]), goals[i]) for i in range(tiny.LAYERS)]
    expected = torch.stack(errors).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, value in trainable.items():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["native", "plain"])
def test_blending_goes_from_the_original_to_the_twin(place, name):
    from surgery.refining.objectives import _mixed
    from surgery.refining.parameters import twin_block_paths
    from surgery.runtime.hooks import hooked

    twin, original = surgery.load(place / name), surgery.load(place / BASES[name])
    ids = torch.arange(3, 35)[None]
    blocks = [paths for paths, _ in twin_block_paths(twin)]

    def logits(share):
        with torch.no_grad(), hooked(_mixed(twin, original, blocks, share)):
            return twin(ids).logits

    with torch.no_grad():
        theirs, ours = original(ids).logits, twin(ids).logits
    torch.testing.assert_close(logits(0.0), theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(1.0), ours, rtol=1e-4, atol=1e-4)
    assert 0 < (logits(0.5) - theirs).norm() < (ours - theirs).norm()
