"""Suspended forward passes: what a block sees, and that nothing is left behind."""

import pytest
import torch

from surgery.blocks.find import survey
from surgery.blocks.verify import verify_all
from surgery.calibration.arrivals import first_token_size
from surgery.calibration.passes import Passes
from surgery.closed_form import sinks
from surgery.errors import CalibrationError
from tests import tiny


def prepared(name, ids):
    model = tiny.make(name)
    with torch.no_grad():
        blocks = verify_all(model, survey(model).blocks, lambda: model(input_ids=ids[:2]))
    return model, blocks


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "bert"])
def test_inputs_and_outputs_are_those_of_a_plain_forward_pass(name, ids):
    """With nothing replaced, what arrives is what hooks see in an ordinary pass, in the original stream too."""
    model, blocks = prepared(name, ids)
    seen = {}
    hooks = [
        model.get_submodule(block.entry).register_forward_pre_hook(
            lambda _, args, path=block.path: seen.setdefault(path, []).append(args[0].flatten(0, -2))
        )
        for block in blocks
    ]
    batches = [{"input_ids": part} for part in ids.split(16)]
    with torch.no_grad():
        before = [model(**batch).logits for batch in batches]
    for hook in hooks:
        hook.remove()
    with Passes(model, batches, blocks, follow_original=True) as stream:
        for station in stream:
            for number, arrival in enumerate(station.twin):
                torch.testing.assert_close(arrival.x, seen[station.block.path][number], rtol=0, atol=0)
                torch.testing.assert_close(station.original[number].x, arrival.x, rtol=0, atol=0)
                assert (arrival.residual is not None) or station.block.residual is None
    with torch.no_grad():
        for batch, logits in zip(batches, before, strict=True):
            torch.testing.assert_close(model(**batch).logits, logits, rtol=0, atol=0)


def test_later_blocks_see_earlier_replacements_and_the_original_stream_does_not(ids):
    model, blocks = prepared("llama", ids)

    class Nothing(torch.nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    with Passes(model, [{"input_ids": ids[:4]}], blocks, follow_original=True) as stream:
        for station in stream:
            if station.block is blocks[0]:
                stream.replace({station.block.path: Nothing()})
            else:
                gap = station.twin[0].residual - station.original[0].residual
                assert gap.abs().max() > 1e-3
    assert isinstance(model.model.layers[0].mlp, Nothing)
    assert type(model.model.layers[1].mlp).__name__ == "LlamaMLP"


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "bert"])
def test_products_in_bfloat16_end_where_a_pass_waits(name, ids):
    """What arrives is float32 and near the exact pass's; what is fitted in between is multiplied exactly."""
    model, blocks = prepared(name, ids)
    batches = [{"input_ids": part} for part in ids.split(32)]
    with Passes(model, batches, blocks, follow_original=True) as stream:
        exact = [station.twin[1].x.clone() for station in stream]
    with Passes(model, batches, blocks, follow_original=True, matmul="bfloat16") as stream:
        for station, expected in zip(stream, exact, strict=True):
            assert not torch.is_autocast_enabled("cpu")
            for arrival in (station.twin[1], station.original[1]):
                assert arrival.x.dtype == torch.float32
                assert arrival.residual is None or arrival.residual.dtype == torch.float32
                assert float((arrival.x - expected).norm() / expected.norm()) < 0.02
    assert float((station.twin[1].x - exact[-1]).norm()) > 0, "it was not rounded at all"
    assert not torch.is_autocast_enabled("cpu")


def test_gradients_are_on_again_afterwards(ids):
    """Finished, interrupted or failed: the passes are dropped in the middle of a forward pass."""
    model, blocks = prepared("llama", ids)
    for stop in (0, 1, None):
        with Passes(model, [{"input_ids": ids[:4]}, {"input_ids": ids[4:8]}], blocks, follow_original=True) as stream:
            for number, _ in enumerate(stream):
                assert not torch.is_grad_enabled()
                if number == stop:
                    break
        assert torch.is_grad_enabled()


def test_an_interrupted_stream_puts_the_model_back(ids):
    model, blocks = prepared("opt", ids)
    before = {name: type(module) for name, module in model.named_modules()}
    with Passes(model, [{"input_ids": ids[:4]}], blocks) as stream:
        next(iter(stream))  # and no further
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_padding_is_masked_out(name, ids):
    model, blocks = prepared(name, ids)
    mask = torch.ones_like(ids[:4])
    mask[:2, :10] = 0
    with Passes(model, [{"input_ids": ids[:4], "attention_mask": mask}], blocks) as stream:
        station = next(iter(stream))
    assert int(station.twin[0].keep.sum()) == int(mask.sum())


def test_values_that_are_not_finite_are_an_error(ids):
    model, blocks = prepared("llama", ids)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    with (
        pytest.raises(CalibrationError, match="NaN"),
        Passes(model, [{"input_ids": torch.full((1, 4), 5)}], blocks) as stream,
    ):
        next(iter(stream))


def test_a_first_token_that_turns_massive_is_known_from_the_first_block_on(ids):
    model, blocks = prepared("llama", ids)
    assert first_token_size(model, {"input_ids": ids[:2]}, blocks) <= sinks.MASSIVE
    last = model.model.layers[1].mlp.down_proj

    def massive(_, __, output):
        output[:, 0] *= 1000
        return output

    handle = last.register_forward_hook(massive)
    assert first_token_size(model, {"input_ids": ids[:2]}, blocks) > sinks.MASSIVE
    handle.remove()
    mask = torch.ones_like(ids[:4])
    mask[:2, :10] = 0
    batch = {"input_ids": ids[:4], "attention_mask": mask}
    with Passes(model, [batch], blocks, first_is_sink=True) as stream:
        known = next(iter(stream)).twin[0].known_sink.view(4, -1)
    assert known.nonzero().tolist() == [[0, 10], [1, 10], [2, 0], [3, 0]]


def test_what_has_taken_a_block_s_place_is_not_rounded_on_the_way(ids):
    """Its maps may carry offsets that cancel; the model's own are multiplied in bfloat16."""
    model, blocks = prepared("llama", ids)
    seen = {}

    class Watched(torch.nn.Linear):
        def forward(self, x):
            written = super().forward(x)
            seen["twin"] = (x.dtype, written.dtype)
            return written

    own = model.model.layers[1].self_attn.o_proj
    hook = own.register_forward_hook(lambda _, __, output: seen.update(own=output.dtype))
    with Passes(model, [{"input_ids": ids}], blocks[:2], matmul="bfloat16") as passes:
        for station in passes:
            passes.replace({station.block.path: Watched(tiny.WIDTH, tiny.WIDTH)})
    hook.remove()
    assert seen == {"twin": (torch.float32, torch.float32), "own": torch.bfloat16}
