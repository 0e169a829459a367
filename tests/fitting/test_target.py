"""What a block aims at, by the shape of its layer: only the right target undoes a drift of the earlier stream."""

from dataclasses import replace

import pytest
import torch
import transformers as T

import surgery
from evals.architectures.tiny_models import tiny as build
from surgery.blocks.find import survey
from surgery.blocks.parts import layer_of
from surgery.blocks.residual import INPUT, LAYER, NORM, OUTPUT, SUM, Residual, stream_of
from surgery.blocks.verify import verify_all, verify_each
from surgery.closed_form.normalisation import Normalisation
from surgery.conversion import preparation, replacement
from surgery.fitting import either
from surgery.models.modeling_polynomial import install
from surgery.runtime.hooks import hooked
from surgery.saving.modules import modules_for
from tests import tiny

IDS = torch.randint(3, 96, (96, 24), generator=torch.Generator().manual_seed(11))
SHARED = {**tiny.COMMON, "num_hidden_layers": 4, "num_hidden_groups": 2}
MORE = {
    "olmo2": lambda: T.Olmo2ForCausalLM(T.Olmo2Config(**tiny.COMMON)),
    "gemma3": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**tiny.COMMON, num_key_value_heads=2, head_dim=8)),
    "openai-gpt": lambda: T.OpenAIGPTLMHeadModel(
        T.OpenAIGPTConfig(vocab_size=96, n_embd=tiny.WIDTH, n_layer=2, n_head=4, n_positions=128)
    ),
    "granite": lambda: T.GraniteForCausalLM(T.GraniteConfig(**tiny.COMMON, residual_multiplier=0.3)),
    "albert": lambda: T.AlbertModel(T.AlbertConfig(**SHARED, embedding_size=16)),
    "qwen2_moe": lambda: build(T.Qwen2MoeForCausalLM, "qwen2_moe"),
    "deepseek_v3": lambda: build(T.DeepseekV3ForCausalLM, "deepseek_v3"),
}


def make(name):
    if name in tiny.MAKERS:
        return tiny.make(name)
    torch.manual_seed(0)
    model = MORE[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def confirmed(model):
    with torch.no_grad():
        return verify_all(model, survey(model).blocks, lambda: model(input_ids=IDS[:2]))


@pytest.mark.parametrize(
    ("name", "base", "normed"),
    [
        ("llama", NORM, ""),
        ("granite", NORM, ""),
        ("gpt_neox", LAYER, ""),
        ("phi", LAYER, ""),
        ("gemma2", NORM, OUTPUT),
        ("gemma3", NORM, OUTPUT),
        ("olmo2", INPUT, OUTPUT),
        ("bert", INPUT, SUM),
        ("albert", INPUT, SUM),
        ("openai-gpt", INPUT, SUM),
    ],
)
def test_how_a_block_joins_its_stream_is_seen_in_a_run(name, base, normed):
    blocks = confirmed(make(name))
    assert {(block.residual.base, block.residual.normed) for block in blocks} == {(base, normed)}
    assert all(block.residual.scale == pytest.approx(0.3 if name == "granite" else 1, rel=1e-3) for block in blocks)
    assert all(bool(block.residual.norm) == bool(normed) for block in blocks)


def test_what_joins_in_no_known_way_is_said_so():
    model = make("llama")
    layer = model.model.layers[1]
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: plain(*args, **kwargs).tanh()
    assert [block.residual is None for block in confirmed(model)] == [False, True]


class Drifting(torch.nn.Module):
    """Some module, and a constant beside it."""

    def __init__(self, module, drift):
        super().__init__()
        self.module, self.drift = module, drift

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs) + self.drift


def left(monkeypatch, name, told=lambda block: block):
    """What is left of a drift in the model's stream once its last block has been fitted.

    The drift is a constant beside the first block's output; `told` changes what the last block knows of its layer.
    """
    model = make(name)
    first, *_, last = confirmed(model)
    drift = 0.5 * torch.randn(first.out, generator=torch.Generator().manual_seed(2))
    exit_ = model.get_submodule(first.exit)
    whole = stream(model, last)
    drifting = {first.exit: Drifting(exit_, drift)}
    put(model, drifting)
    gone = stream(model, last) - whole
    put(model, {first.exit: exit_})

    def seen(*given):
        good, bad = verify_each(*given)
        return tuple(told(block) if block.path == last.path else block for block in good), bad

    def modules(block, *given):
        entry, found = modules_for(block, *given)
        return entry, drifting if block.block.path == first.path else found

    def fitted(*given):
        found = either.fit(*given)
        return found if found.block.routed else replace(found, outputs=())  # passes compute them, with the drift

    monkeypatch.setattr(preparation, "verify_each", seen)
    monkeypatch.setattr(replacement, "fit", fitted)
    monkeypatch.setattr(replacement, "modules_for", modules)
    numbers = [block.path for block in survey(model).blocks]
    chosen = f"{numbers.index(first.path)},{numbers.index(last.path)}"
    twin, _ = surgery.convert(model, text=IDS, degree=3, window=24, blocks=chosen, form="custom")
    return float((stream(twin, last) - whole).norm() / gone.norm())


def put(model, modules):
    for path, module in modules.items():
        install(model, path, module)


def stream(model, block):
    """What the block's layer writes in the end."""
    found = []
    handle = model.get_submodule(layer_of(block.path)).register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad(), hooked([handle]):
        model(input_ids=IDS[:16])
    return stream_of(found[-1])


def own(block):
    return replace(block, residual=None)


# What is left of the drift with the target of the layer's shape at most, and with the block's own output at least.
SHAPES = {
    "llama": (0.5, 0.8),
    "granite": (0.6, 0.9),
    "gpt_neox": (0.3, 0.8),
    "phi": (0.4, 0.85),
    "gemma2": (0.65, 0.85),
    "gemma3": (0.65, 0.85),
    "olmo2": (0.65, 0.85),
    "bert": (0.2, 0.8),
    "albert": (0.2, 0.65),
    "qwen2_moe": (0.6, 0.9),
    "deepseek_v3": (0.8, 0.9),
}


@pytest.mark.parametrize("name", SHAPES)
def test_only_the_target_of_its_shape_undoes_a_drift(name, monkeypatch):
    most, least = SHAPES[name]
    with monkeypatch.context() as patch:
        assert left(patch, name) < most
    assert left(monkeypatch, name, own) > least


@pytest.mark.parametrize(
    ("name", "wrong"), [("gpt_neox", Residual(NORM)), ("gemma2", Residual(NORM)), ("bert", Residual(INPUT, scale=5.0))]
)
def test_the_target_of_another_shape_undoes_less(name, wrong, monkeypatch):
    """The negative control: told that the attention beside it is not there, the norm after it, or the scale of one."""
    with monkeypatch.context() as patch:
        right = left(patch, name)
    assert left(monkeypatch, name, lambda block: replace(block, residual=wrong)) > 1.05 * right


def test_through_a_norm_of_another_form_nothing_is_aimed(monkeypatch):
    """Taken for no norm at all, its block would aim at something of another length."""
    monkeypatch.setattr(Normalisation, "of", staticmethod(lambda *_: None))
    assert left(monkeypatch, "gemma2") > SHAPES["gemma2"][1]
