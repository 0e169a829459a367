"""The evaluation: against independent computations, and as a user meets it."""

import math
from dataclasses import replace

import pytest
import torch

import surgery
from evals import pair as pairs
from evals.evaluation import measure
from evals.memo import Memo
from evals.settings import EvalSettings
from surgery.errors import EvaluationError
from surgery.saving.report import read_report
from tests import tiny
from tests.evals.support import run, settings_of


@pytest.fixture(scope="module")
def report(pair):
    return measure(settings_of(pair), Memo(None))


def test_perplexity_agrees_with_an_independent_computation(pair, report):
    """Window by window through the model's own loss, from the saved checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (pair / "text.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(pair / "twin")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])[:1024]
    for name, folder in (("original", "base"), ("twin", "twin")):
        model = AutoModelForCausalLM.from_pretrained(pair / folder, dtype=torch.float32).eval()
        with torch.no_grad():
            losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids.view(-1, 32)]
        mean = sum(losses) / len(losses)
        assert report["text"]["nats"][name]["value"] == pytest.approx(mean, rel=1e-4)
        assert report["text"]["perplexity"][name] == pytest.approx(math.exp(mean), rel=1e-4)
    lost = report["text"]["nats_lost"]
    assert lost["low"] < lost["value"] < lost["high"]


def test_bits_per_byte_counts_the_bytes_that_were_predicted(pair, report):
    from transformers import AutoTokenizer

    found = report["text"]
    tokenizer = AutoTokenizer.from_pretrained(pair / "base")
    ids = torch.tensor(tokenizer((pair / "text.txt").read_text(), add_special_tokens=False)["input_ids"])[:1024]
    size = len(tokenizer.decode(ids.view(-1, 32)[:, 1:].flatten()).encode())
    nats = found["nats"]["twin"]["value"] * found["tokens"]
    assert found["bits_per_byte"]["twin"] == pytest.approx(nats / math.log(2) / size, rel=1e-9)


def test_a_model_against_itself_loses_nothing(pair):
    found = measure(settings_of(pair, twin=str(pair / "base")), Memo(None))
    assert found["text"]["nats_lost"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert all(row["r2"] == 1 for row in found["blocks"])


def test_finished_pieces_are_kept_and_reused(pair, tmp_path, monkeypatch):
    from evals import evaluation

    first = measure(settings_of(pair), Memo(tmp_path))
    assert first["reused"] == []

    def forbidden(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(pairs, "compare_tokens", forbidden)
    monkeypatch.setattr(evaluation, "block_sums", forbidden)
    again = measure(settings_of(pair), Memo(tmp_path))
    assert set(again["reused"]) == {"text", "blocks"}
    assert again["text"] == first["text"]
    assert again["blocks"] == first["blocks"]
    with pytest.raises(AssertionError, match="measured again"):
        measure(settings_of(pair, window=16), Memo(tmp_path))


def test_a_kind_of_the_text_that_is_measured_anyway_is_not_run_again(pair, tmp_path, monkeypatch):
    runs, compared = [], pairs.compare_tokens
    monkeypatch.setattr(pairs, "compare_tokens", lambda *given: runs.append(len(given[2])) or compared(*given))
    settings = settings_of(pair)
    same = replace(settings, kind=(("same", settings.text),), kind_tokens=settings.tokens)
    found = measure(same, Memo(tmp_path))
    assert sum(runs) == found["text"]["windows"]
    assert found["kinds"]["kinds"][0]["nats_lost"] == found["text"]["nats_lost"]
    assert found["reused"] == [], "of this run, not of an earlier one"
    measure(replace(same, kind_tokens=settings.tokens // 2), Memo(tmp_path))
    assert sum(runs) == 1.5 * found["text"]["windows"], "less of it is other text"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--tasks": "polysurgery_agreemnt"}, ["no such task", "did you mean 'polysurgery_agreement'"]),
        ({"--tokens": "16"}, ["16 tokens are fewer than one window of 32"]),
        ({"--text": "nowhere.txt"}, ["nowhere.txt"]),
        ({"--stride": "64"}, ["stride"]),
        ({"--original": "missing/"}, ["missing"]),
        ({"--include-path": "nowhere", "--tasks": "mine"}, ["nowhere", "task files"]),
        ({"-o": "twin"}, ["holds a model"]),
    ],
)
def test_bad_input_is_a_clear_error(pair, change, words, monkeypatch):
    monkeypatch.chdir(pair)
    given = {
        "--original": "base",
        "--text": "text.txt",
        "--window": "32",
        "--tokens": "256",
        "--cache": "cache",
    } | change
    done = run("twin", *(part for item in given.items() for part in item))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_models_of_different_tokenizers_are_refused(pair, tmp_path):
    from transformers import AutoTokenizer

    surgery.load(str(pair / "base")).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(pair / "base")
    tokenizer.add_tokens(["novel"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(EvaluationError, match="different tokenizers"):
        measure(settings_of(pair, original=str(tmp_path)), Memo(None))


def test_a_dry_run_runs_nothing_and_names_everything(pair, tmp_path):
    done = run(pair / "twin", "--original", pair / "base", "--dry-run", "-o", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    (part,) = read_report(str(pair / "twin"))["calibration"]["parts"]
    assert part["end"] > 4096
    assert f"python: 16384 tokens after {part['end']}" in done.stdout, "what the fit may have seen is passed over"
    assert not (tmp_path / "report").exists()


def test_encoders_are_evaluated_by_their_outputs(tmp_path, ids):
    from safetensors.torch import save_file

    tiny.make("bert").save_pretrained(tmp_path / "base")
    surgery.convert(tmp_path / "base", text=ids, output=tmp_path / "twin")
    save_file({"input_ids": ids[:16], "attention_mask": torch.ones_like(ids[:16])}, tmp_path / "inputs.safetensors")
    given = {"text": str(tmp_path / "inputs.safetensors"), "window": 32}
    settings = EvalSettings(twin=str(tmp_path / "twin"), original=str(tmp_path / "base"), **given)
    found = measure(settings, Memo(None))
    assert found["outputs"]["vectors"] == 16 * 32
    assert 0.9 < found["outputs"]["cosine"]["mean"] < 1
    assert len(found["blocks"]) == 2
