"""What engines built on transformers ask of a custom twin, as transformers and vLLM document it.

vLLM's and SGLang's transformers backends take the model without a head through `auto_map`, put their own attention
under transformers' interface, and divide layers among processes by the configuration's plan.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import surgery
from surgery.models import modeling_polynomial
from tests import tiny

TYPES = {"llama": 3, "gpt_neox": 2, "mixtral": 3}
"""Model types (gated, plain, experts) and the degrees of their twins."""


def mixtral():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = T.MixtralConfig(vocab_size=96, num_key_value_heads=2, num_local_experts=2, **shape)
    return T.MixtralForCausalLM(config).eval()


@pytest.fixture(scope="module", params=TYPES)
def twin(request, tmp_path_factory):
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    (mixtral() if name == "mixtral" else tiny.make(name)).save_pretrained(folder / "base")
    text = torch.randint(96, (64, 32), generator=torch.Generator().manual_seed(0))
    settings = {"degree": TYPES[name], "form": "custom", "measure": 0, "epochs": 0}
    surgery.convert(str(folder / "base"), text=text, output=folder / "twin", **settings)
    return folder / "twin"


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 21).view(2, 8), use_cache=False, **more).logits


def test_the_model_without_a_head_is_in_auto_map_and_fits_the_backend(twin):
    config = json.loads((twin / "config.json").read_text())
    assert config["auto_map"]["AutoModel"].startswith("modeling_polynomial.")
    bare = T.AutoModel.from_pretrained(twin, trust_remote_code=True)
    base = type(bare).__mro__[1]
    assert base.__module__.startswith("transformers.models.")
    assert bare.is_backend_compatible() == base.is_backend_compatible()
    assert bare.is_backend_compatible()


def test_attention_goes_through_the_interface_with_what_is_passed_down(twin):
    model = T.AutoModelForCausalLM.from_pretrained(twin, trust_remote_code=True)
    plain, seen = logits(model), []

    def engine(module, query, key, value, attention_mask, marker=None, **kwargs):
        seen.append((module.layer_idx, marker))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("engine", engine)
    T.AttentionMaskInterface.register("engine", T.masking_utils.sdpa_mask)
    model.set_attn_implementation("engine")
    found = logits(model, marker="passed")
    assert seen == [(number, "passed") for number in range(model.config.num_hidden_layers)]
    assert torch.allclose(found, plain, atol=1e-5)


@pytest.mark.parametrize("twin", ["llama"], indirect=True)
def test_importing_the_file_changes_nothing(twin):
    """A fresh process: transformers knows no more types after the import than before. The file is in every twin."""
    code = (
        "import sys, transformers; from transformers.models.auto.configuration_auto import CONFIG_MAPPING as known\n"
        "before = set(known.keys()); import torch\n"
        "state = torch.random.get_rng_state(); threads = torch.get_num_threads(); grad = torch.is_grad_enabled()\n"
        f"sys.path.insert(0, {str(twin)!r}); import modeling_polynomial\n"
        "assert set(known.keys()) == before and 'polynomial_twin' not in known\n"
        "assert torch.equal(state, torch.random.get_rng_state()) and threads == torch.get_num_threads()\n"
        "assert grad == torch.is_grad_enabled() and not torch.distributed.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert modeling_polynomial.MODEL_TYPE in CONFIG_MAPPING, "the control: this process has registered it"


def test_every_matrix_of_a_block_is_a_linear_layer(twin):
    """An engine puts its own linear layers in their places."""
    model = surgery.load(str(twin))
    for block in model.config.polynomial_blocks:
        if block["kind"] == "experts":
            continue
        for name, module in model.get_submodule(block["path"]).named_modules():
            own = dict(module.named_parameters(recurse=False))
            matrices = {key for key in own if "coefficients" not in key and own[key].dim() > 1}
            assert not matrices or isinstance(module, torch.nn.Linear), name


DIVIDED = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM
ids = torch.arange(5, 21).view(2, 8)
def logits(**how):
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **how)
        found = model(input_ids=ids, use_cache=False).logits
    return model, found.full_tensor() if hasattr(found, "full_tensor") else found
_, whole = logits()
model, divided = logits(tp_plan="auto")
if torch.distributed.get_rank() == 0:
    print("divided", sum(hasattr(value, "to_local") for value in model.parameters()))
    print("difference", float((divided - whole).norm() / whole.norm()))
"""


def divided_among_two(folder):
    """Tensors that are divided, and the relative difference of the logits, by transformers' own tensor parallelism."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    script = folder.parent / "divided.py"
    script.write_text(DIVIDED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder.parent)
    said = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("divided", "difference")))
    return int(said.get("divided", 0)), float(said.get("difference", "nan")), done.stderr


@pytest.mark.fresh_process
def test_two_processes_share_the_layers(twin):
    number, difference, said = divided_among_two(twin)
    assert difference < 1e-5, said
    assert number > 0


@pytest.mark.fresh_process
def test_with_the_original_s_plan_a_block_with_coefficients_does_not_run(tmp_path):
    """The control: why the plan leaves such blocks whole."""
    tiny.make("llama").save_pretrained(tmp_path / "base")
    text = torch.randint(96, (64, 32), generator=torch.Generator().manual_seed(0))
    surgery.convert(str(tmp_path / "base"), text=text, output=tmp_path / "twin", degree=3, measure=0, epochs=0)
    file = Path(tmp_path / "twin" / "modeling_polynomial.py")
    file.write_text(file.read_text().replace("if plan and blocks:", "if False:"))
    _, difference, said = divided_among_two(tmp_path / "twin")
    assert math.isnan(difference)
    assert "must match the size" in said


@pytest.mark.fresh_process
def test_bilinear_blocks_are_divided_as_the_plan_says(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "base")
    text = torch.randint(96, (64, 32), generator=torch.Generator().manual_seed(0))
    surgery.convert(str(tmp_path / "base"), text=text, output=tmp_path / "twin", degree=2, measure=0, epochs=0)
    number, difference, said = divided_among_two(tmp_path / "twin")
    assert difference < 1e-5, said
    assert number >= 10 * tiny.LAYERS  # of attention four, of a block three weights and their biases
