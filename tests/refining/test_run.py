"""Refinement by distillation, at tiny size."""

import json
import subprocess
import sys

import pytest
import torch

import surgery
from surgery.errors import CheckpointError, ModelError, RecipeError
from surgery.refining.losses import kl
from surgery.refining.parameters import named_trainable, names_inside, twin_block_paths
from surgery.refining.run import refined
from surgery.refining.settings import RefineSettings
from surgery.refining.student import share_tensors
from surgery.refining.training import Training
from tests import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny original, a rough quadratic twin of it (few tokens), and a cubic one with custom code."""
    folder = tmp_path_factory.mktemp("refine")
    tiny.save_with_tokenizer("llama", folder / "base")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "(1,", "2)", "[3:", "4];", "=", "fox."]
    order = torch.randint(len(words), (6000,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "text.txt").write_text(" ".join(words[index] for index in order))
    for name, degree in (("twin", 2), ("cubic", 3)):
        surgery.convert(
            folder / "base", output=folder / name, tokens=1024, length=32, measure=0, degree=degree, readout="keep"
        )
    return folder


def settings_of(place, out, **more):
    given = {"twin": str(place / "twin"), "teacher": str(place / "base"), "output": str(out)}
    given |= {"text": (str(place / "text.txt"),), "tokens": 4096, "length": 32, "batch": 8, "accumulate": 1}
    given |= {"validate_tokens": 512, "precision": "float32", "average": 0.5}
    return RefineSettings(**(given | {"rate": 3e-3, "validate_every": 4} | more))


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_divergence_is_zero_for_equal_logits_and_has_the_right_value(ids):
    g = torch.Generator().manual_seed(0)
    one, two = torch.randn(3, 5, 7, generator=g), torch.randn(3, 5, 7, generator=g)
    assert kl(one, one).abs() < 1e-6
    p, q = one.double().softmax(-1), two.double().softmax(-1)
    assert kl(one, two).item() == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_and_its_gradient_are_torchs_own(temperature, monkeypatch):
    from surgery.refining import losses

    monkeypatch.setattr(losses, "PIECE", 4)  # three uneven pieces
    g = torch.Generator().manual_seed(1)
    goal, found = torch.randn(2, 5, 11, generator=g), torch.randn(2, 5, 11, generator=g)
    ours, theirs = found.clone().requires_grad_(), found.clone().requires_grad_()
    p, q = (x.flatten(0, 1).div(temperature).log_softmax(-1) for x in (goal, theirs))
    expected = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2
    loss = kl(goal, ours, temperature)
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_distillation_lowers_the_loss_and_a_native_twin_stays_native(place, tmp_path):
    record = refined(settings_of(place, tmp_path / "out"))
    assert record["divergence_after"] < 0.7 * record["divergence_before"]
    assert record["divergence_after"] == min(row["divergence"] for row in record["curve"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_act"] == "linear"
    assert config == json.loads((place / "twin" / "config.json").read_text())
    report = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert report["refinement"]["tokens_seen"] == 4096
    assert report["verification"]["verified"]
    before, after = weights(place / "twin"), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".mlp." in name for name in changed), "only the blocks were trained"


@pytest.mark.parametrize("which", ["coefficients", "readout", "block", "all"])
def test_what_is_trained_is_what_was_asked_for(place, which):
    twin = surgery.load(str(place / "cubic"))
    chosen = named_trainable(twin, which)
    assert {name for name, p in twin.named_parameters() if p.requires_grad} == set(chosen)
    expected = {
        "coefficients": lambda name: name.endswith("coefficients"),
        "readout": lambda name: "down_proj" in name,
        "block": lambda name: ".mlp." in name,
        "all": lambda name: True,
    }[which]
    assert set(chosen) == {name for name, _ in twin.named_parameters() if expected(name)}


def test_a_native_twin_has_no_coefficients_to_train(place):
    with pytest.raises(RecipeError, match="no coefficients"):
        named_trainable(surgery.load(str(place / "twin")), "coefficients")
    with pytest.raises(RecipeError, match="did you mean 'readout'"):
        named_trainable(surgery.load(str(place / "twin")), "readouts")


def test_one_model_in_memory(place):
    """Every tensor that is not trained is shared; the teacher's outputs are the original's all the same."""
    twin, teacher, original = (surgery.load(str(place / name)) for name in ("twin", "base", "base"))
    trained = set(named_trainable(twin, "block"))
    saved = share_tensors(twin, teacher, trained, names_inside(twin_block_paths(twin)))
    ours = {p.data_ptr() for p in twin.parameters()}
    shared = [p for p in teacher.parameters() if p.data_ptr() in ours]
    assert saved == sum(p.numel() * 4 for p in shared)
    assert all(".mlp." in name for name, p in teacher.named_parameters() if p.data_ptr() not in ours)
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.equal(teacher(input_ids=ids).logits, original(input_ids=ids).logits)


def test_another_teacher_is_refused(place):
    twin = surgery.load(str(place / "twin"))
    trained = set(named_trainable(twin, "block"))
    with pytest.raises(ModelError, match="differs between the teacher and the twin"):
        share_tensors(twin, tiny.make("llama", seed=7), trained, names_inside(twin_block_paths(twin)))


def test_a_killed_run_goes_on_exactly(place, tmp_path, monkeypatch):
    whole = refined(settings_of(place, tmp_path / "whole"))
    settings = settings_of(place, tmp_path / "cut")
    real, looks = Training.keep, []

    def stop(self, folder):
        real(self, folder)
        looks.append(self.step)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "keep", stop)
    with pytest.raises(KeyboardInterrupt):
        refined(settings)
    monkeypatch.undo()
    assert not (tmp_path / "cut").exists()
    with pytest.raises(CheckpointError, match="other settings"):
        refined(settings_of(place, tmp_path / "cut", rate=1e-3))
    again = refined(settings)
    assert again["losses"] == whole["losses"]
    assert [row["nats"] for row in again["curve"]] == [row["nats"] for row in whole["curve"]]
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (tmp_path / "cut.refining").exists()


def test_a_run_that_gains_nothing_keeps_the_start_and_says_so(place, tmp_path):
    record = refined(settings_of(place, tmp_path / "out", rate=3.0, clip=1e9))
    assert record["divergence_after"] == record["divergence_before"]
    before, after = weights(place / "twin"), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert record["best_step"] == 0


def test_steps_that_are_not_finite_are_skipped_and_then_an_error(place, tmp_path, monkeypatch):
    from surgery.refining import objectives

    monkeypatch.setattr(objectives, "kl", lambda goal, found, temperature=1.0: found.float().sum() * float("nan"))
    with pytest.raises(surgery.SurgeryError, match="not finite"):
        refined(settings_of(place, tmp_path / "out", validate_every=1000))
    assert not (tmp_path / "out").exists()


def command(place, out, **more):
    options = {"--teacher": place / "base", "-o": out, "--text": place / "text.txt", "--tokens": 2048, "--length": 32}
    options |= {"--validate-tokens": 512, "--rate": 0.003, "--validate-every": 4, "--accumulate": 1}
    options |= {"--precision": "float32"} | more
    return ["-m", "surgery", "refine", str(place / "twin"), *(str(part) for item in options.items() for part in item)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--tokens": 64, "--validate-tokens": 64, "--batch": 64}, ["too few"]),
        ({"--tokens": "many"}, ["no number of tokens"]),
        ({"--objective": "locl"}, ["did you mean 'local'"]),
        ({"--train": "lora", "--lora-modules": "nowhere"}, ["nowhere"]),
        ({"--report-to": "tensorboard2"}, ["tensorboard2", "not installed"]),
        ({"--average": 1}, ["--average"]),
        ({"--train": "blok"}, ["did you mean 'block'"]),
        ({"--rate": -1}, ["--rate", "not positive"]),
        ({"--teacher": "nowhere/"}, ["nowhere"]),
    ],
)
def test_bad_input_is_a_clear_error(place, tmp_path, change, words):
    done = subprocess.run(
        [sys.executable, *command(place, tmp_path / "out", **change)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "out").exists()
