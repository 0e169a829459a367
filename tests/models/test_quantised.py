"""Quantised checkpoints."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import ModelError
from surgery.models import loading
from tests import tiny

IDS = torch.randint(3, 96, (64, 32), generator=torch.Generator().manual_seed(3))
BLOCK = 16
REFUSED = {
    "gptq": {"bits": 4, "group_size": 128},
    "awq": {"bits": 4, "group_size": 128},
    "bitsandbytes": {"load_in_4bit": True},
    "bitsandbytes_8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "aqlm": {},
    "hqq": {},
    "quanto": {"weights": "int8"},
    "eetq": {},
    "torchao": {"quant_type": "int8_weight_only"},
    "never-heard-of": {},
    "compressed-tensors": {"format": "nonsense", "config_groups": {"a": 3}},
}


def described(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.fixture
def fp8(tmp_path):
    """A checkpoint in blocks of FP8, as DeepSeek's are."""
    folder = tmp_path / "fp8"
    tiny.make("llama").save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "proj.weight" in name]:
        rows, columns = tensors[name].shape
        tiles = tensors[name].view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = tiles.abs().amax((1, 3)) / 448
        tensors[name] = (tiles / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, file, metadata={"format": "pt"})
    described(folder, quant_method="fp8", weight_block_size=[BLOCK, BLOCK], activation_scheme="dynamic")
    return folder


@pytest.mark.fresh_process
@pytest.mark.parametrize("degree", [2, 3])
def test_fp8_weights_are_made_whole_and_the_twin_is_not_quantised(degree, fp8, tmp_path):
    found, whole = loading.loaded(str(fp8)).model.state_dict(), tiny.make("llama").state_dict()
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=0.07, atol=0.01)
    _, report = surgery.convert(fp8, text=IDS, degree=degree, output=tmp_path / "twin")
    assert "quantization_config" not in json.loads((tmp_path / "twin" / "config.json").read_text())
    assert not any("scale" in name for name in load_file(tmp_path / "twin" / "model.safetensors"))
    assert report.form == ("native" if degree == 2 else "custom")
    with pytest.raises(ModelError, match="cannot stay on disk"):
        surgery.convert(fp8, text=IDS, degree=degree, output=tmp_path / "other", offload=True)


@pytest.mark.parametrize("method", REFUSED)
def test_other_kinds_are_refused_at_once_by_every_command_alike(method, tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "model")
    described(tmp_path / "model", **{"quant_method": method, **REFUSED[method]})
    (tmp_path / "model" / "model.safetensors").write_bytes(b"nobody reads this")
    named = method.removesuffix("_8bit")
    for attempt in (
        lambda: surgery.inspect(str(tmp_path / "model")),
        lambda: surgery.convert(tmp_path / "model", text=IDS, output=tmp_path / "twin"),
    ):
        with pytest.raises(ModelError, match=f"quantised \\({named}\\)") as refused:
            attempt()
        assert refused.value.fix and "nobody" not in str(refused.value)


def test_the_command_line_says_it_in_a_line_or_two(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "model")
    described(tmp_path / "model", quant_method="gptq", bits=4)
    done = subprocess.run(
        [sys.executable, "-m", "surgery", "inspect", str(tmp_path / "model")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "quantised (gptq)" in done.stderr and "Traceback" not in done.stderr


def test_a_quantised_model_in_memory_is_refused():
    model = tiny.make("llama")
    model.is_quantized = True
    with pytest.raises(ModelError, match="quantised"):
        surgery.convert(model, text=IDS)
