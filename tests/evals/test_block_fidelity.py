"""R² of blocks."""

import pytest
import torch

import surgery
from evals.block_fidelity import block_rows, block_sums
from surgery.blocks.find import survey
from tests import tiny


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "gpt2"])
def test_block_r2_against_a_direct_computation(name, ids):
    original, twin = tiny.make(name), tiny.make(name)
    twin, _ = surgery.convert(twin, text=ids, degree=2)
    blocks = survey(original).blocks
    batches = [{"input_ids": part} for part in ids.split(8)]
    rows = block_rows(original, twin, blocks, block_sums(original, twin, blocks, batches))
    for row in rows:
        assert row["r2"] > row["r2_affine"] - 0.02, "a quadratic is not worse than an affine map"
        assert 0 < row["fvu_gaussian"] < 1
        assert row["tokens"] == ids.numel()
        assert row["fvu"] == pytest.approx(1 - row["r2"])
    if name != "llama":
        return
    seen = {}
    handle = original.model.layers[1].mlp.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        original(input_ids=ids)
        found = twin.model.layers[1].mlp(seen["x"]).flatten(0, 1).double()
    handle.remove()
    truth = seen["y"].flatten(0, 1).double()
    direct = 1 - (truth - found).square().sum() / (truth - truth.mean(0)).square().sum()
    assert rows[1]["r2"] == pytest.approx(float(direct), abs=1e-5)
