"""Models that the caller holds."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

import surgery
from surgery.errors import ModelError
from surgery.models import loading
from tests import tiny
from tests.hub_server import Hub, environment

IDS = torch.randint(3, 96, (64, 32), generator=torch.Generator().manual_seed(3))
LORA = peft.LoraConfig(r=2, target_modules=["q_proj"])


def convert(model):
    return surgery.convert(model, text=IDS, degree=3)[0]


@pytest.fixture(scope="module")
def expected():
    return convert(tiny.make("llama"))(IDS[:2]).logits


def compiled_in_place():
    model = tiny.make("llama")
    model.compile()
    model.model.layers[0].compile()
    return model


class Distributed(nn.parallel.DistributedDataParallel):
    """Without a group."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda: torch.compile(tiny.make("llama")),
        compiled_in_place,
        lambda: nn.DataParallel(tiny.make("llama")),
        lambda: Distributed(tiny.make("llama")),
        lambda: torch.compile(Distributed(tiny.make("llama"))),
    ],
    ids=["compiled", "compiled in place", "data parallel", "distributed", "both"],
)
def test_what_wraps_a_model_is_taken_off(wrapped, expected):
    twin = convert(wrapped())
    assert type(twin).__name__ == "PolynomialLlamaForCausalLM"
    assert all(getattr(part, "_compiled_call_impl", None) is None for part in twin.modules())
    torch.testing.assert_close(twin(IDS[:2]).logits, expected)


def with_adapter():
    model = tiny.make("llama")
    model.add_adapter(LORA)
    return model


def on_meta():
    model = tiny.make("llama")
    model.model.layers[1].to("meta")
    return model


def offloaded(tmp_path):
    model = tiny.make("llama")
    disk_offload(model, tmp_path)
    return model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda _: None, "NoneType is not a transformers model"),
        (lambda _: 3, "int is not a transformers model"),
        (lambda _: nn.Linear(3, 3), "Linear is not a transformers model"),
        (lambda _: tiny.make("llama").model.layers[0].mlp, "LlamaMLP"),
        (lambda _: tiny.make("llama").state_dict(), "is not a transformers model"),
        (lambda _: peft.get_peft_model(tiny.make("llama"), LORA), "adapters"),
        (lambda _: peft.get_peft_model(tiny.make("llama"), LORA).base_model.model, "adapters"),
        (lambda _: with_adapter(), "adapters"),
        (lambda _: on_meta(), r"not in memory, first model\.layers\.1\."),
        (offloaded, "not in memory"),
        (lambda _: cpu_offload(tiny.make("llama"), "cpu"), "not in memory"),
    ],
)
def test_what_is_no_whole_model_in_memory_is_refused(given, message, tmp_path):
    model = given(tmp_path)
    with pytest.raises(ModelError, match=message) as refused:
        convert(model)
    assert refused.value.fix


def test_an_adapters_folder_says_how_to_merge_it(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "base")
    peft.get_peft_model(tiny.make("llama"), LORA).save_pretrained(tmp_path / "adapter")
    peft.get_peft_model(tiny.make("llama"), LORA).save_pretrained(tmp_path / "base")  # beside the model it is for
    for folder in ("adapter", "base"):
        for attempt in (loading.load_meta, loading.loaded):
            with pytest.raises(ModelError, match="merge_and_unload"):
                attempt(str(tmp_path / folder))


def test_an_adapter_on_the_hub_says_so_too(tmp_path):
    server = Hub()
    try:
        server.repositories["me/adapter"] = {"main": {"adapter_config.json": json.dumps({}).encode()}}
        done = subprocess.run(
            [sys.executable, "-m", "surgery", "inspect", "me/adapter"],
            capture_output=True, text=True, check=False, env=environment(server, tmp_path),
        )  # fmt: skip
    finally:
        server.shutdown()
    assert done.returncode == 2 and "merge_and_unload" in done.stderr
