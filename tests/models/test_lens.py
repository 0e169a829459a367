"""Twins in the tools of interpretability: TransformerLens, nnsight, and the pipelines of transformers."""

import logging
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import pytest
import torch
import transformers as T

import surgery
from surgery.models import registration
from tests import tiny

NATIVE = {"llama": "llama native", "gemma": "gemma native"}
TWINS = {"llama": 3, "phi3": 2, "gpt2": 2, "gpt_neox": 2, "gemma2": 3, "partial": 3}  # custom, and the degree of each
IDS = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place, made = tmp_path_factory.mktemp("tools"), {}
    settings = {"text": "python", "tokens": 1024, "window": 32, "measure": 0, "epochs": 0}
    for name, degree in TWINS.items():
        base = "llama" if name == "partial" else name
        if not (place / base).exists():
            tiny.save_with_tokenizer(base, place / base)
        more = {"blocks": "1"} if name == "partial" else {}
        made[name] = str(place / f"{name}-twin")
        surgery.convert(str(place / base), output=made[name], form="custom", degree=degree, **more, **settings)
    for base, name in NATIVE.items():
        if not (place / base).exists():
            tiny.save_with_tokenizer(base, place / base)
        made[name] = str(place / f"{base}-native")
        surgery.convert(str(place / base), output=made[name], form="native", **settings)
    return made


def bridged(folder):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)


def told(model, ids=IDS):
    with torch.no_grad():
        out = model(ids)
    return (out if isinstance(out, torch.Tensor) else out.logits).log_softmax(-1)


@pytest.mark.parametrize("name", [*TWINS, *NATIVE.values()])
def test_transformerlens_gives_transformers_logits(name, folders):
    """With all hooks, and with norms folded into the weights, where it computes gated blocks by itself."""
    pytest.importorskip("transformer_lens")
    model, wanted = bridged(folders[name]), told(surgery.load(folders[name]))
    torch.testing.assert_close(told(model), wanted, rtol=0, atol=1e-4)
    _, cache = model.run_with_cache(IDS)
    assert cache["blocks.1.mlp.hook_out"].shape == (2, 16, tiny.WIDTH)
    without = model.run_with_hooks(IDS, fwd_hooks=[("blocks.1.mlp.hook_out", lambda value, hook: 0 * value)])
    assert (without.log_softmax(-1) - wanted).abs().max() > 0.01, "hooks change what the model does"
    model.enable_compatibility_mode()
    torch.testing.assert_close(told(model), wanted, rtol=0, atol=1e-4)
    _, cache = model.run_with_cache(IDS)
    assert any(name.startswith("blocks.1.mlp") and name.endswith("hook_post") for name in cache)


def test_without_being_told_transformerlens_takes_linear_for_silu(folders, monkeypatch):
    """The control of the test above; where this fails, TransformerLens knows `linear` and needs no telling."""
    gated = pytest.importorskip("transformer_lens.model_bridge.generalized_components.gated_mlp")
    monkeypatch.setattr(gated, "resolve_activation_fn", gated.resolve_activation_fn.others)
    model = bridged(folders["llama native"])
    model.enable_compatibility_mode()
    assert (told(model) - told(surgery.load(folders["llama native"]))).abs().max() > 0.1


def test_a_transformerlens_built_otherwise_still_imports(monkeypatch):
    pytest.importorskip("transformer_lens")
    monkeypatch.setattr("surgery.models.lens.LISTS", "transformer_lens.nowhere")
    with pytest.warns(UserWarning, match="takes no custom twins"):
        registration.WHEN[registration.LENS_MODULE]()


@pytest.fixture(scope="module")
def elsewhere():
    """A process of its own: in one that imported nnsight every object has a `save`, which ends ONNX and tenseal."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(
    ("name", "layers"), [("llama", "model.layers"), ("gpt2", "transformer.h"), ("llama native", "model.layers")]
)
def test_nnsight_traces_twins(name, layers, folders, elsewhere):
    if find_spec("nnsight") is None:
        pytest.skip("nnsight is not installed")
    elsewhere.submit(_traced, folders[name], layers).result()
    assert "nnsight" not in sys.modules


def _traced(folder, layers):
    import nnsight

    twin = surgery.load(folder)
    model = nnsight.NNsight(twin)
    block = model
    for part in layers.split("."):
        block = getattr(block, part)
    with model.trace(IDS):
        written = block[1].mlp.output.save()
        logits = model.output.logits.save()
    torch.testing.assert_close(logits.log_softmax(-1), told(twin), rtol=0, atol=1e-4)
    assert written.shape == (2, 16, tiny.WIDTH)
    with model.trace(IDS):
        block[1].mlp.output[:] = 0
        without = model.output.logits.save()
    assert (without.log_softmax(-1) - told(twin)).abs().max() > 0.01


def test_pipelines_take_custom_twins_without_a_word(folders, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        made = T.pipeline("text-generation", model=folders["llama"], dtype=torch.float32)
        with caplog.at_level(logging.WARNING):
            said = made("the quick", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    finally:
        logger.removeHandler(caplog.handler)
    assert said.startswith("the quick")
    assert "is not supported for" not in caplog.text
    twin = surgery.load(folders["llama"])
    names = T.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert names[type(twin).__name__] == type(twin).__name__
    assert T.AutoConfig.for_model("llama").model_type == "llama" and "llama" in names
