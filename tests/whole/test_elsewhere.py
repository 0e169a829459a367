"""A twin in a fresh virtual environment that has torch, transformers, peft and lm-eval, and not this package."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

import surgery
from tests import commands, tiny

FULL = """
import sys, torch
from importlib.util import find_spec
assert find_spec("surgery") is None and find_spec("evals") is None
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
name, options = sys.argv[1], {"trust_remote_code": True} if sys.argv[2] == "trust" else {}
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
tokenizer = AutoTokenizer.from_pretrained(name)
ids = torch.arange(3, 19)[None]
with torch.no_grad():
    total = model(input_ids=ids).logits.double().abs().sum().item()
    written = [model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache)[0] for cache in (True, False)]
    assert torch.equal(*written)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(19) > 2).long()[None]
    position = (mask.cumsum(1) - 1).clamp_min(0)
    again = model(input_ids=padded, attention_mask=mask, position_ids=position).logits[:, 3:]
    torch.testing.assert_close(again, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
text = pipeline("text-generation", model=model, tokenizer=tokenizer)("the quick", max_new_tokens=4, do_sample=False)
assert text[0]["generated_text"].startswith("the quick")
half = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, **options)
assert torch.isfinite(half(input_ids=ids).logits).all()
placed = AutoModelForCausalLM.from_pretrained(name, device_map="cpu", **options)
compiled = torch.compile(placed, backend="eager")
assert torch.isfinite(compiled(input_ids=ids).logits).all()
from peft import LoraConfig, get_peft_model
adapted = get_peft_model(placed, LoraConfig(target_modules=["down_proj"], r=2, task_type="CAUSAL_LM"))
adapted(input_ids=ids, labels=ids).loss.backward()
assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
model.save_pretrained(sys.argv[3]); tokenizer.save_pretrained(sys.argv[3])
print(total)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a fresh environment. It sees this one's installed packages, but no editable install."""
    place = tmp_path_factory.mktemp("fresh") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    own = next(place.glob("lib/python*/site-packages"))
    (own / "installed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return place / "bin" / "python"


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Quadratic twins in stock weights and a cubic one with custom code."""
    folder = tmp_path_factory.mktemp("elsewhere")
    settings = {"text": "python", "tokens": 2048, "window": 32, "measure": 0}
    for name, base, degree in (("native", "llama", 2), ("rewritten", "mistral", 2), ("custom", "llama", 3)):
        if not (folder / base).exists():
            tiny.save_with_tokenizer(base, folder / base)
        surgery.convert(folder / base, output=folder / name, degree=degree, **settings)
    return folder


def run(python, home, *arguments):
    """In a folder and with a home of its own: nothing cached, nothing of this package in reach."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    return subprocess.run(
        [python, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=home,
        env=kept | {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(("name", "trust"), [("native", ""), ("rewritten", ""), ("custom", "trust")])
def test_everything_works_without_this_package(python, twins, tmp_path, name, trust):
    pytest.importorskip("peft")
    done = run(python, tmp_path, "-c", FULL, twins / name, trust, tmp_path / "again")
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        here = surgery.load(twins / name)(input_ids=torch.arange(3, 19)[None]).logits.double().abs().sum().item()
    assert float(done.stdout.split()[-1]) == pytest.approx(here, rel=1e-6)
    saved_again = run(python, tmp_path, "-c", FULL, tmp_path / "again", trust, tmp_path / "third")
    assert saved_again.returncode == 0, saved_again.stderr[-3000:]
    assert saved_again.stdout.split()[-1] == done.stdout.split()[-1]


def test_custom_code_without_trust_is_refused_loudly(python, twins, tmp_path):
    done = run(python, tmp_path, "-c", FULL, twins / "custom", "", tmp_path / "again")
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr or "polynomial_twin" in done.stderr


def test_lm_eval_measures_a_twin(python, twins, tmp_path):
    """lm-eval's own command line gives what `surgery eval` gives, here for code that comes with the twin; for stock
    weights see tests/evals/test_harness.py."""
    pytest.importorskip("lm_eval")
    import evals.harness

    for file in ("agreement.yaml", "agreement.py"):
        shutil.copy(evals.harness.OWN_TASKS / file, tmp_path / file)
    task, limit = "polysurgery_agreement", "16"
    done = run(
        python, tmp_path, "-m", "lm_eval", "run", "--model", "hf", "--tasks", task, "--limit", limit, "--model_args",
        f"pretrained={twins / 'custom'},dtype=float32,max_length=64,trust_remote_code=True", "--device", "cpu",
        "--batch_size", "8", "--include_path", tmp_path, "--output_path", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"][task]
    ours = commands.surgery(
        "eval", twins / "custom", "--original", twins / "llama", "--tasks", task, "--limit", limit, "--task-window",
        "64", "--tokens", "512", "--window", "32", "--block-tokens", "64", "--no-speed", "--no-cache", "--json",
    )  # fmt: skip
    assert ours.returncode == 0, ours.stderr[-3000:]
    rows = [row for row in json.loads(ours.stdout)["tasks"] if row["task"] == task]
    assert rows
    assert all(row["twin"] == pytest.approx(theirs[row["metric"]], rel=1e-9) for row in rows)
