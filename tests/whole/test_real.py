"""A real pretrained model, end to end. `make slow` fetches it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import surgery

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "build" / "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = ROOT / "build" / "gemma-3-270m-q4_k_m.gguf"
ANTIBERTY = ROOT / "build" / "antiberty"
HEAVY = "EVQLVQSGPEVKKPGTSVKVSCKASGFTFMSSAVQWVRQARGQRLEWIGWIVIGSGNTNYAQKFQERVTITRDMSTSTAYMELSSLRSEDTAVYYCAAPYCSS"
HEAVY += "ISCNDGFDIWGQGTMVTVS"
LIGHT = (
    "DVVMTQTPFSLPVSLGDQASISCRSSQSLVHSNGNTYLHWYLQKPGQSPKLLIYKVSNRFSGVPDRFSGSGSGTDFTLKISRVEAEDLGVYFCSQSTHVPYTFGGGTKLEIK"
)


@pytest.mark.slow
@pytest.mark.parametrize(("degree", "source", "limit"), [(2, "samples", 0.9), (3, "python", 0.1)])
def test_smollm2_keeps_its_language(degree, source, limit, tmp_path):
    """Few tokens, so the bounds are loose; a twin that lost a block loses several nats."""
    command = [sys.executable, "-m", "surgery", "convert", MODEL, "-o", tmp_path / "twin", "--degree", degree]
    command += ["--tokens", 8192, "--measure", 2048, "--text", source]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "twin" / "surgery.json").read_text())
    assert len(report["blocks"]) == 30
    assert report["form"] == ("native" if degree == 2 else "custom")
    assert 0 < report["perplexity"]["nats"] < limit
    assert any(row["sink_units"] for row in report["blocks"])
    assert (tmp_path / "twin" / "chat_template.jinja").exists()


@pytest.mark.slow
def test_gemma_keeps_its_language_and_its_sinks(tmp_path):
    """Norms after its blocks, and sinks that four blocks write, less than 20 times as large as other tokens."""
    command = [sys.executable, "-m", "surgery", "convert", GEMMA, "-o", tmp_path / "twin", "--degree", 3]
    command += ["--tokens", 8192, "--measure", 2048, "--text", "python"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "twin" / "surgery.json").read_text())
    assert len(report["blocks"]) == 18
    assert 0 < report["perplexity"]["nats"] < 0.2
    assert sum(row["sink_units"] > 0 for row in report["blocks"]) >= 4


@pytest.mark.slow
def test_antiberty_is_a_masked_model_and_keeps_its_predictions(tmp_path):
    """Its configuration names a class of its authors' own."""
    command = [
        sys.executable,
        "benchmarks/degrees.py",
        ANTIBERTY,
        "--vocabulary",
        ANTIBERTY / "vocab.txt",
        "--rows",
        64,
    ]
    command += ["--sequences", HEAVY, LIGHT, "--degrees", 2, "--json", tmp_path / "rows.json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "by its weights it is a BertForMaskedLM" in done.stdout
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert abs(row["nats"]) < 0.05
    assert min(block["r2_held"] for block in row["blocks"]) > 0.8


@pytest.fixture(scope="module")
def quadratic(tmp_path_factory):
    """A quadratic twin of SmolLM2, of few tokens and the closed form alone."""
    place = tmp_path_factory.mktemp("quadratic")
    command = [sys.executable, "-m", "surgery", "convert", MODEL, "-o", place / "twin", "--epochs", 0]
    command += ["--tokens", 8192, "--measure", 2048, "--text", "python"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return place / "twin"


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "most"), [("f32", 1e-3), ("f16", 2e-3), ("q8_0", 0.02)])
def test_llama_cpp_loses_no_more_than_the_twin(quadratic, weights, most, tmp_path):
    pytest.importorskip("xllamacpp")
    out = tmp_path / "gguf"
    seen = surgery.export(quadratic, out, form="gguf", weights=weights, original=str(MODEL))
    assert seen["same_tokens"]
    command = ["benchmarks/llama_cpp.py", quadratic, out / seen["file"], "--original", MODEL, "--tokens", 2048]
    done = subprocess.run(
        [sys.executable, *(str(part) for part in command)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    here, there = (float(re.search(rf"{name} ([\d.]+)", done.stdout)[1]) for name in ("llama.cpp", "transformers"))
    assert abs(here - there) < most


@pytest.mark.slow
def test_a_real_block_computes_on_encrypted_numbers(quadratic, tmp_path):
    pytest.importorskip("tenseal")
    seen = surgery.export(quadratic, tmp_path / "encrypted", form="encrypted", tokens=4096)
    assert seen["difference"] < 1e-3
    assert seen["margin"] > 10
    command = [sys.executable, "recipes/encrypted.py", tmp_path / "encrypted", quadratic, "--block", "8"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "model.layers.8.mlp" in done.stdout
    assert float(re.search(r"relative error (\S+)", done.stdout)[1]) < 1e-3


@pytest.mark.slow
def test_a_block_of_smollm2_is_read_in_dictionaries_trained_on_it(tmp_path):
    """Small dictionaries on little text: they describe the block, and their features tell its output on other text."""
    pytest.importorskip("sae_lens")
    surgery.convert(str(MODEL), output=tmp_path / "twin", text="python", tokens=8192, epochs=0, measure=0)
    recipe = [sys.executable, ROOT / "recipes" / "dictionaries.py", tmp_path / "twin", "--block", 12]
    recipe += ["-o", tmp_path / "of", "--tokens", 32768, "--features", 1024, "--quiet"]
    done = subprocess.run([str(part) for part in recipe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [float(share) > 0.3 for share in re.findall(r"R² (\S+) on", done.stdout)] == [True, True], done.stdout
    given = {"features": str(tmp_path / "of" / "input"), "output_features": str(tmp_path / "of" / "output")}
    listed = surgery.explain(tmp_path / "twin", 12, **given)["features"]
    assert listed["input"]["site"] == "input" and listed["output"]["site"] == "output"
    best = listed["list"][0]
    assert best["r2"] > 0.5
    found = surgery.explain(tmp_path / "twin", 12, direction=best["name"], output=tmp_path / "page", **given)[
        "features"
    ]
    assert found["whole"]["r2"] > 0.5
    by_number = {row["terms"]: row["r2"] for row in found["curve"]}
    assert by_number[1] < by_number[100] < found["whole"]["r2"] + 0.1
    assert (tmp_path / "page" / "features.png").stat().st_size > 10_000
