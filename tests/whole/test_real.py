"""A real pretrained model, end to end. `make slow` fetches it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "build" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@pytest.mark.parametrize(("degree", "source", "limit"), [(2, "samples", 0.9), (3, "python", 0.1)])
def test_smollm2_keeps_its_language(degree, source, limit, tmp_path):
    """Few tokens, so the bounds are loose; a twin that lost a block loses several nats."""
    command = [sys.executable, "-m", "surgery", "convert", MODEL, "-o", tmp_path / "twin", "--degree", degree]
    command += ["--tokens", 8192, "--measure", 2048, "--calibration", source]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "twin" / "surgery.json").read_text())
    assert len(report["blocks"]) == 30
    assert report["form"] == ("native" if degree == 2 else "custom")
    assert 0 < report["perplexity"]["nats"] < limit
    assert any(row["sink_units"] for row in report["blocks"])
    assert (tmp_path / "twin" / "chat_template.jinja").exists()
