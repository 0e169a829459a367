"""Approximants of a block, attacks on its input, and both through training."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from surgery.blocks.weights import BlockWeights
from surgery.cli.main import cli
from surgery.closed_form.activations import ACTIVATIONS
from surgery.closed_form.block_polynomial import BlockPolynomial
from surgery.closed_form.forms import Affine
from surgery.closed_form.moments import InputMoments
from surgery.errors import ModelError, SurgeryError
from surgery.reading import trace as tracing
from surgery.reading.ablation import linear_directions, project_out, quadratic_directions
from surgery.reading.approximation import approximations, r_squared, under_gaussian, under_mixture
from surgery.reading.trace import TrainingStep, checked_degrees, measure, trace, training_steps
from tests import tiny
from tests.blocks.of_experts import IDS, model_of


def network(activation="relu", width=5, hidden=7, out=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return BlockWeights(
        ACTIVATIONS[activation], (draw(hidden, width), draw(hidden)), None, (draw(out, hidden), draw(out))
    )


def test_one_relu_under_a_standard_normal_is_the_textbook_case():
    """Var ReLU(U) = ½ − 1/2π; the linear part explains ¼ of it, the quadratic one 1/4π more."""
    one = torch.ones(1, 1, dtype=torch.float64)
    block = BlockWeights(ACTIVATIONS["relu"], (one, None), None, (one, None))
    moments = InputMoments.gaussian(torch.zeros(1), torch.eye(1))
    x = moments.sample(200_000)
    whole = 0.5 - 1 / (2 * math.pi)
    for degree, explained in ((1, 0.25), (2, 0.25 + 1 / (4 * math.pi))):
        found = r_squared(block, under_gaussian(block, moments, degree), x)
        assert found == pytest.approx(explained / whole, abs=0.01)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), activation=st.sampled_from(["relu", "gelu", "silu"]))
def test_higher_degrees_explain_more_of_what_they_are_for(seed, activation):
    block = network(activation, seed=seed)
    moments = InputMoments.gaussian(torch.zeros(5), torch.eye(5))
    x = moments.sample(20_000)
    polynomials = [under_gaussian(block, moments, degree) for degree in (1, 2, 3)]
    found = [r_squared(block, polynomial, x) for polynomial in polynomials]
    assert found[0] < found[1] + 0.01
    assert found[1] < found[2] + 0.01
    truth = block(x)
    for explained, polynomial in zip(found, polynomials, strict=True):
        # The best polynomial's error is orthogonal to it, so what it explains is its own share of the variance.
        share = polynomial(x).var(0).sum() / truth.var(0).sum()
        assert explained == pytest.approx(float(share), abs=0.02)


def test_an_affine_block_is_explained_by_degree_one():
    block = network("linear")
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = approximations(block, x[:200], x[200:], (1,))["1"]
    assert all(value == pytest.approx(1) for value in found.values())


def test_a_mixture_of_one_is_its_gaussian_and_of_two_is_neither():
    block, moments = network(), InputMoments.gaussian(torch.zeros(5), torch.eye(5))
    other = InputMoments.gaussian(torch.ones(5), 2 * torch.eye(5))
    alone = under_gaussian(block, moments, 2)
    torch.testing.assert_close(under_mixture(block, moments, [(1.0, moments)], 2).a, alone.a)
    assert (under_mixture(block, moments, [(0.5, moments), (0.5, other)], 2).a - alone.a).abs().max() > 1e-3


def test_attacks_take_out_what_the_coefficients_say():
    """x ↦ 3 x₀² − 2 x₁² + x₂: the eigenvectors are e₀, e₁, the linear direction is e₂."""
    eye, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    a = torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 1, 0]], dtype=torch.float64)
    down = Affine(torch.tensor([[3.0, -2.0, 1.0]], dtype=torch.float64), zero[:1])
    expansion = BlockPolynomial(Affine(eye, zero), None, a, None, down).expand()
    found = quadratic_directions(expansion, torch.ones(1, 1, dtype=torch.float64))
    torch.testing.assert_close(found[:, :2].abs(), eye[:, :2])
    torch.testing.assert_close(linear_directions(expansion).abs(), eye[:, 2:])


@settings(max_examples=25)
@given(seed=st.integers(0, 99), k=st.integers(0, 4))
def test_projecting_out_is_a_projection(seed, k):
    block = network(seed=seed)
    poly = under_gaussian(block, InputMoments.gaussian(torch.zeros(5), torch.eye(5)), 2)
    columns = quadratic_directions(poly.expand(), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(columns.T @ columns, torch.eye(5, dtype=torch.float64))
    x = torch.randn(6, 5, dtype=torch.float64)
    once = project_out(x, columns[:, :k])
    torch.testing.assert_close(project_out(once, columns[:, :k]), once)
    assert (once @ columns[:, :k]).abs().sum() < 1e-12
    assert project_out(x, columns).abs().max() < 1e-12


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """Two checkpoints of one model, as folders."""
    place = tmp_path_factory.mktemp("trace")
    tiny.save_with_tokenizer("llama", place / "step0")
    tiny.save_with_tokenizer("llama", place / "step1000")
    return [str(place / "step0"), str(place / "step1000")]


ARGUMENTS = ["--tokens", "1024", "--window", "32"]


def test_a_trace_is_kept_and_goes_on(moments, tmp_path, monkeypatch):
    out = tmp_path / "trace"
    first = CliRunner().invoke(cli, ["trace", moments[0], *ARGUMENTS, "-o", str(out)])
    assert first.exit_code == 0, first.output
    measured = []
    monkeypatch.setattr(tracing, "measure", lambda step, s: measured.append(step.label) or measure(step, s))
    again = CliRunner().invoke(cli, ["trace", *moments, *ARGUMENTS, "-o", str(out)])
    assert again.exit_code == 0, again.output
    assert measured == ["step1000"], "step0 was kept"
    report = json.loads((out / "trace.json").read_text())
    assert [row["step"] for row in report["checkpoints"]] == [0, 1000]
    assert report["others"] == []
    for row in report["checkpoints"]:
        assert [block["path"] for block in row["blocks"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
        for block in row["blocks"]:
            assert block["r2"]["1"]["gaussian_on_gaussian"] < block["r2"]["2"]["gaussian_on_gaussian"] <= 1
    assert (out / "trace.png").read_bytes().startswith(b"\x89PNG")
    assert "quadratic" in again.output
    only = CliRunner().invoke(cli, ["trace", moments[0], *ARGUMENTS, "-o", str(out), "--json"])
    assert [row["label"] for row in json.loads(only.stdout)["checkpoints"]] == ["step0"]
    assert [row["label"] for row in json.loads((out / "trace.json").read_text())["others"]] == ["step1000"]
    assert measured == ["step1000"]
    with pytest.raises(SurgeryError, match="other settings"):
        trace(moments, output=out, tokens=512, window=32)


def test_a_changed_checkpoint_is_measured_again(tmp_path):
    tiny.save_with_tokenizer("llama", tmp_path / "step5")
    before = TrainingStep(str(tmp_path / "step5"), None).key
    (tmp_path / "step5" / "model.safetensors").write_bytes(b"other")
    assert TrainingStep(str(tmp_path / "step5"), None).key != before


def test_mixtures_are_left_out_and_said_to_be(tmp_path):
    """DeepSeek: the shared experts are blocks like any other, the routed ones are no single function."""
    model_of("deepseek_v3").save_pretrained(tmp_path / "mixed")
    save_file({"input_ids": IDS}, tmp_path / "ids.safetensors")
    settings = {"text": str(tmp_path / "ids.safetensors"), "tokens": 256, "window": 16}
    report = trace(tmp_path / "mixed", degrees="1", **settings)
    row = report["checkpoints"][0]
    assert row["left_out"] and all(path.endswith("experts") for path in row["left_out"])
    assert row["blocks"] and not {block["path"] for block in row["blocks"]} & set(row["left_out"])
    assert "left out, as mixtures of experts" in tracing.lines(report)[-1]
    model_of("mixtral").save_pretrained(tmp_path / "all")
    with pytest.raises(ModelError, match="one function of its input"):
        trace(tmp_path / "all", degrees="1", **settings)


def test_checkpoints_and_degrees_are_checked():
    assert [m.step for m in training_steps(["EleutherAI/pythia-160m"], "step0,step143000")] == [0, 143000]
    assert TrainingStep("run/final", None).step is None
    with pytest.raises(SurgeryError, match="one model"):
        training_steps(["a", "b"], "step0")
    with pytest.raises(SurgeryError, match="1 to 9"):
        checked_degrees("1,x")


@pytest.mark.parametrize("data", ["digits", pytest.param("mnist5k", marks=pytest.mark.slow)])
def test_the_digits_recipe_shows_the_shape_of_the_paper(data, tmp_path):
    """Short training: quadratic beats linear at every step, and the attacks beat random directions."""
    pytest.importorskip("sklearn")
    recipe = Path(__file__).parents[2] / "recipes" / "digits.py"
    command = [sys.executable, str(recipe), "--data", data, "--steps", "64", "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "digits.json").read_text())
    for moment in report["history"]:
        for linear, quadratic in zip(moment["rows"][::2], moment["rows"][1::2], strict=True):
            assert quadratic["on_samples"] is None or quadratic["on_samples"] < linear["on_samples"]
    assert report["accuracy"]["network"] > 0.85
    by_name = report["attacks"]
    for name in ("SVD of the linear part", "eigenvectors of the quadratic part"):
        assert by_name[name][0] == report["accuracy"]["network"]
        assert by_name[name][-1] < by_name["random directions"][-1] - 0.3
    for picture in ("digits.png", "eigenvectors.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
