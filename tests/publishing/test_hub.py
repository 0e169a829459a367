"""Publishing: the card, the upload through huggingface_hub to a local Hub, and loading back without this package."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import surgery
from surgery.errors import CheckpointError, RecipeError
from surgery.models import loading
from surgery.publishing.hub import plan_push
from tests import commands
from tests.hub_server import Hub, environment

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "surgery" not in sys.modules
name, trust = sys.argv[1], sys.argv[2] == "trust"
options = {"trust_remote_code": True} if trust else {}
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
AutoTokenizer.from_pretrained(name)
ids = torch.arange(3, 19)[None]
with torch.no_grad():
    print(model(input_ids=ids).logits.double().abs().sum().item())
"""


PUSHES = """
import json, os, sys
from tests import commands
for line in sys.stdin:
    token, *arguments = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": token} if token else {})
    done = commands.surgery(*arguments)
    print(json.dumps([done.returncode, done.stdout, done.stderr]), flush=True)
"""
"""Runs one command after another: huggingface_hub reads its address when it is imported, and its token every time."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A local Hub, and a process whose commands go to it."""
    found = Hub()
    here = environment(found, tmp_path_factory.mktemp("home"))
    command = [sys.executable, "-c", PUSHES]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=here, cwd=Path(__file__).parents[2]) as process:
        yield found, process
        process.stdin.close()
    found.shutdown()


@pytest.fixture
def server(hub):
    hub[0].reset()
    return hub[0]


@pytest.fixture
def run(hub, server):
    """`surgery ARGUMENTS`, with the local Hub."""

    def done(*arguments, token="hf_right"):
        process = hub[1]
        process.stdin.write(json.dumps([token, *map(str, arguments)]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"the process that pushes has ended with {process.wait()}"
        return subprocess.CompletedProcess(arguments, *json.loads(line))

    return done


def load_elsewhere(name, server, home, trust=""):
    """What a process without this package gets: the sum of the logits, or the error."""
    code = [sys.executable, "-c", LOAD, str(name), trust]
    return subprocess.run(
        code, capture_output=True, text=True, check=False, cwd=home, env=environment(server, home) | {"PYTHONPATH": ""}
    )


def expected(folder):
    with torch.no_grad():
        return surgery.load(str(folder))(input_ids=torch.arange(3, 19)[None]).logits.double().abs().sum().item()


@pytest.mark.parametrize(("name", "trust"), [("native", ""), ("custom", "trust")])
def test_push_and_load_back(twins, server, tmp_path, name, trust):
    command = "push", twins / name, "me/twin", "--base-model", "them/base", "--license", "mit"
    pushed = commands.process(*command, env=environment(server, tmp_path))
    assert pushed.returncode == 0, pushed.stderr
    files = server.files("me/twin")
    assert files["model.safetensors"] == (twins / name / "model.safetensors").read_bytes()
    front = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert front["base_model"] == "them/base"
    assert front["license"] == "mit"
    assert "hf_right" not in pushed.stdout + pushed.stderr
    assert not any(b"hf_right" in content for content in files.values())
    got = load_elsewhere("me/twin", server, tmp_path, trust)
    assert got.returncode == 0, got.stderr
    assert float(got.stdout.split()[-1]) == pytest.approx(expected(twins / name), rel=1e-6)


def test_a_delta_is_published_and_applied_to_its_original(twins, server, run, tmp_path):
    surgery.convert(
        twins / "base", output=tmp_path / "kept", degree=3, readout="keep", text="python", tokens=2048, window=32
    )
    made = run("export", tmp_path / "kept", "-o", tmp_path / "delta", "--form", "delta", "--original",
               twins / "base")  # fmt: skip
    assert made.returncode == 0, made.stderr
    pushed = run("push", tmp_path / "delta", "me/delta", "--base-model", "them/base", "--license", "mit")
    assert pushed.returncode == 0, pushed.stderr
    assert "delta.safetensors" in server.files("me/delta")
    assert "model.safetensors" not in server.files("me/delta")
    code = "import surgery, sys, torch; m = surgery.load('me/delta', original=sys.argv[1]); "
    code += "print(m(input_ids=torch.arange(3, 19)[None]).logits.double().abs().sum().item())"
    got = subprocess.run(
        [sys.executable, "-c", code, twins / "base"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(server, tmp_path),
    )
    assert got.returncode == 0, got.stderr
    assert float(got.stdout.split()[-1]) == pytest.approx(expected(tmp_path / "kept"), rel=1e-9)


@pytest.mark.parametrize("first", ["import surgery; from transformers import AutoModelForCausalLM as A",
                                   "from transformers import AutoModelForCausalLM as A; import surgery"])  # fmt: skip
def test_with_this_package_imported_no_trust_is_needed(twins, first):
    code = f"{first}; print(type(A.from_pretrained({str(twins / 'custom')!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "PolynomialLlamaForCausalLM", done.stderr


def test_a_custom_twin_refuses_loudly_without_trust(twins, server, tmp_path):
    got = load_elsewhere(twins / "custom", server, tmp_path)
    assert got.returncode != 0
    assert "trust_remote_code" in got.stderr or "polynomial_twin" in got.stderr


def test_an_interrupted_upload_goes_on_and_server_errors_are_retried(twins, server, run):
    server.fail("POST .*/commit/", 500, times=100)
    failed = run("push", twins / "native", "me/twin")
    assert failed.returncode == 2
    assert "push again" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert server.objects, "the weights have landed, the commit has not"
    server.failures.clear()
    server.log.clear()
    server.fail("POST .*/preupload/", 503, times=1)
    again = run("push", twins / "native", "me/twin")
    assert again.returncode == 0, again.stderr
    assert not any(line.startswith("PUT") for line in server.log), "nothing is sent twice"


@pytest.mark.parametrize(
    ("token", "failure", "words"),
    [
        (None, None, "hf auth login"),
        ("hf_wrong", None, "hf auth login"),
        ("hf_right", ("POST /api/repos/create", 403), "write access"),
        ("hf_right", ("POST .*/commit/", 409), "push again"),
        ("hf_right", ("POST .*/commit/", 429), "wait some minutes"),
        ("hf_right", ("POST .*/preupload/", 404), "no such repository"),
        ("hf_right", ("POST .*/commit/", 0), "no network"),
    ],
)
def test_refusals_of_the_hub_are_clear(twins, server, run, token, failure, words):
    if failure:
        server.fail(*failure, times=100)
    refused = run("push", twins / "native", "me/twin", token=token)
    assert refused.returncode == 2, refused.stderr
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr
    assert str(token) not in refused.stderr


def test_what_landed_is_compared(twins, server, run):
    server.corrupt = True
    pushed = run("push", twins / "native", "me/twin")
    assert pushed.returncode == 2
    assert "differs from what was sent" in pushed.stderr


def test_branches_and_pull_requests(twins, server, run):
    assert run("push", twins / "native", "me/twin", "--revision", "v2").returncode == 0
    assert "model.safetensors" in server.files("me/twin", "v2")
    assert "model.safetensors" not in server.files("me/twin")
    asked = run("push", twins / "native", "me/twin", "--create-pr")
    assert asked.returncode == 0, asked.stderr
    assert "discussions/1" in asked.stdout


def test_a_dry_run_touches_nothing(twins, server, run):
    before = sorted(path.name for path in (twins / "custom").iterdir())
    shown = run("push", twins / "custom", "me/twin", "--dry-run", token=None)
    assert shown.returncode == 0, shown.stderr
    assert "modeling_polynomial.py" in shown.stdout
    assert "degree 3" in shown.stdout
    assert "missing from the card" in shown.stderr
    assert not any(line.startswith(("POST", "PUT")) for line in server.log)
    assert sorted(path.name for path in (twins / "custom").iterdir()) == before


@pytest.mark.parametrize("name", ["", " ", "a b", "me/twin/too", "-x", "me/", "me/twin.git", "https://hf.co/me/twin"])
def test_a_name_that_no_repository_can_have_is_refused_before_anything_else(name, twins):
    with pytest.raises(RecipeError, match="as in user/name"):
        plan_push(twins / "native", name)


def test_only_finished_verified_twins_are_pushed(twins, tmp_path):
    import shutil

    with pytest.raises(CheckpointError, match="not a finished twin"):
        plan_push(twins / "base", "me/twin")
    shutil.copytree(twins / "native", tmp_path / "changed")
    report = tmp_path / "changed" / "surgery.json"
    content = bytearray((tmp_path / "changed" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "changed" / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not those that were verified"):
        plan_push(tmp_path / "changed", "me/twin")
    known = json.loads(report.read_text())
    known["verification"]["verified"] = False
    report.write_text(json.dumps(known))
    with pytest.raises(CheckpointError, match="never reloaded"):
        plan_push(tmp_path / "changed", "me/twin")


def test_a_twin_does_what_models_do(twins, ids, tmp_path):
    """generate with a cache, padded batches, bfloat16, gradients, peft, torch's copy and save again."""
    for name in ("native", "custom"):
        twin = surgery.load(str(twins / name))
        prompt = ids[:1, :8]
        cached = twin.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True)
        assert torch.equal(cached, twin.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False))
        mask = torch.ones_like(ids[:2])
        mask[1, :5] = 0
        place = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            padded = twin(input_ids=ids[:2], attention_mask=mask, position_ids=place).logits[1, 5:]
            alone = twin(input_ids=ids[1:2, 5:]).logits[0]
        torch.testing.assert_close(padded, alone, rtol=1e-3, atol=1e-3)
        twin(input_ids=ids[:2], labels=ids[:2]).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in twin.parameters() if p.requires_grad)
        twin.save_pretrained(tmp_path / name)
        again = surgery.load(str(tmp_path / name))
        with torch.no_grad():
            assert torch.equal(again(input_ids=ids[:2]).logits, twin(input_ids=ids[:2]).logits)
        low = surgery.load(str(twins / name), dtype="bfloat16")
        with torch.no_grad():
            close = torch.nn.functional.cosine_similarity(
                low(input_ids=ids[:2]).logits.float(), twin(input_ids=ids[:2]).logits, dim=-1
            )
        assert close.min() > 0.99


@pytest.mark.parametrize("name", ["native", "custom"])
def test_pipelines_device_maps_and_compiling(twins, ids, name):
    import transformers

    twin = loading.loaded(str(twins / name), device_map="auto")
    with torch.no_grad():
        plain = surgery.load(str(twins / name))(input_ids=ids[:2]).logits
        assert torch.equal(twin.model(input_ids=ids[:2]).logits, plain)
        compiled = torch.compile(twin.model, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=ids[:2]).logits, plain)
    write = transformers.pipeline("text-generation", model=twin.model, tokenizer=twin.tokenizer)
    assert write("the quick brown", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("the quick")


@pytest.mark.parametrize("name", ["native", "custom"])
def test_peft_puts_lora_on_a_twin(twins, ids, name):
    peft = pytest.importorskip("peft")
    twin = surgery.load(str(twins / name))
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(twin, config)
    tuned(input_ids=ids[:2], labels=ids[:2]).loss.backward()
    grads = [p.grad for n, p in tuned.named_parameters() if "lora_B" in n]
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_no_place_on_this_machine_is_pushed(twins, server, run, tmp_path):
    shutil.copytree(twins / "native", tmp_path / "twin")
    for name in ("evaluation.json", "page.html"):
        (tmp_path / "twin" / name).write_text(json.dumps({"at": f"{tmp_path}/twin"}))
    about = "--base-model", "them/base", "--license", "mit"
    pushed = run("push", tmp_path / "twin", "me/twin", *about)
    assert pushed.returncode == 0, pushed.stderr
    files = server.files("me/twin")
    assert json.loads(files["evaluation.json"]) == json.loads(files["page.html"]) == {"at": "twin"}
    assert not any(str(tmp_path).encode() in content for content in files.values())
