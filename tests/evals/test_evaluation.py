"""The evaluation: against independent computations, and as a user meets it."""

import json
import math
import subprocess
import sys

import pytest
import torch

import surgery
from evals.block_fidelity import block_rows, block_sums
from evals.evaluation import measure
from evals.fidelity import compare_outputs, compare_tokens
from evals.memo import Memo
from evals.settings import EvalSettings
from evals.text import cut
from evals.uncertainty import bootstrap_ratio, paired_difference
from surgery.blocks.find import survey
from surgery.errors import EvaluationError
from tests import tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny original with a tokenizer, its quadratic twin, and a text file."""
    folder = tmp_path_factory.mktemp("pair")
    tiny.save_with_tokenizer("llama", folder / "base")
    surgery.convert(folder / "base", output=folder / "twin", calibration="python", tokens=4096, length=32, measure=0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "(1,", "2)", "[3:", "4];", "=", "fox."]
    order = torch.randint(len(words), (6000,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "text.txt").write_text(" ".join(words[index] for index in order))
    return folder


def run(*arguments, **more):
    command = [sys.executable, "-m", "surgery", "eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def settings_of(pair, **more):
    given = {"twin": str(pair / "twin"), "original": str(pair / "base"), "text": str(pair / "text.txt")}
    given |= {"tokens": 1024, "window": 32, "block_tokens": 512, "speed": False}
    return EvalSettings(**(given | more))


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


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
def test_every_token_is_predicted_once_whatever_the_stride(stride):
    ids = torch.arange(16 + 5 * stride)
    text = cut(ids, "given", 16, stride)
    predicted = text.windows[:, 1:][text.fresh]
    assert sorted(predicted.tolist()) == sorted(set(predicted.tolist())), "none twice"
    expected = torch.arange(1, 16 + 5 * stride) if stride < 16 else [i for i in range(96) if i % 16]
    assert sorted(predicted.tolist()) == list(expected)


def test_a_stride_gives_context_and_so_other_numbers(pair):
    one = measure(settings_of(pair, stride=8), Memo(None))
    assert one["text"]["tokens"] == 1024 - 1
    assert all(row["from"] >= 1 for row in one["text"]["by_position"])
    assert one["text"]["by_position"][-1]["tokens"] > one["text"]["by_position"][0]["tokens"]


def test_divergence_and_agreement_against_their_definitions(ids):
    one, two = tiny.make("llama"), tiny.make("llama", seed=5)
    found = compare_tokens(one, two, ids[:3])
    with torch.no_grad():
        p, q = (model(input_ids=ids[:3]).logits[:, :-1].double().softmax(-1) for model in (one, two))
    torch.testing.assert_close(found.divergence.double(), (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6)
    assert torch.equal(found.agree, p.argmax(-1) == q.argmax(-1))
    itself = compare_tokens(one, one, ids[:3])
    assert itself.divergence.abs().max() < 1e-6
    assert itself.agree.all()


def test_outputs_of_encoders_are_compared(ids):
    one = tiny.make("bert")
    same = compare_outputs(one, one, {"input_ids": ids[:2]})
    other = compare_outputs(one, tiny.make("bert", seed=9), {"input_ids": ids[:2]})
    assert same["cosine"].min() > 1 - 1e-9
    assert same["relative_error"].max() == 0
    assert other["cosine"].mean() < 0.9
    assert other["relative_error"].mean() > 0.3


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "gpt2"])
def test_block_r2_against_a_direct_computation(name, ids):
    original, twin = tiny.make(name), tiny.make(name)
    twin, _ = surgery.convert(twin, calibration=ids, degree=2)
    blocks = survey(original).blocks
    batches = [{"input_ids": part} for part in ids.split(8)]
    rows = block_rows(original, twin, blocks, block_sums(original, twin, blocks, batches))
    for row in rows:
        assert row["r2"] > row["r2_affine"] - 0.02, "a quadratic is not worse than an affine map"
        assert 0 < row["fvu_gaussian"] < 1
        assert row["tokens"] == ids.numel()
        assert row["fvu"] == pytest.approx(1 - row["r2"])
    if name != "llama":
        return
    seen = {}
    handle = original.model.layers[1].mlp.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        original(input_ids=ids)
        found = twin.model.layers[1].mlp(seen["x"]).flatten(0, 1).double()
    handle.remove()
    truth = seen["y"].flatten(0, 1).double()
    direct = 1 - (truth - found).square().sum() / (truth - truth.mean(0)).square().sum()
    assert rows[1]["r2"] == pytest.approx(float(direct), abs=1e-5)


def test_a_model_against_itself_loses_nothing(pair):
    found = measure(settings_of(pair, twin=str(pair / "base")), Memo(None))
    assert found["text"]["nats_lost"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert all(row["r2"] == 1 for row in found["blocks"])


def test_bootstrap_covers_and_pairing_helps():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(60):
        sample = torch.randn(40, generator=generator)
        found = bootstrap_ratio(sample + 0.5, torch.ones(40), resamples=1000)
        hits += found.low < 0.5 < found.high
    assert 50 <= hits <= 60
    base = torch.randn(200, generator=generator)
    mean, error = paired_difference(base.tolist(), (base + 0.1).tolist())
    assert mean == pytest.approx(0.1, abs=1e-6)
    assert error < 1e-6


def test_finished_pieces_are_kept_and_reused(pair, tmp_path, monkeypatch):
    from evals import evaluation

    first = measure(settings_of(pair), Memo(tmp_path))
    assert first["reused"] == []

    def forbidden(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(evaluation, "compare_tokens", forbidden)
    monkeypatch.setattr(evaluation, "block_sums", forbidden)
    again = measure(settings_of(pair), Memo(tmp_path))
    assert set(again["reused"]) == {"text", "blocks"}
    assert again["text"] == first["text"]
    assert again["blocks"] == first["blocks"]
    with pytest.raises(AssertionError, match="measured again"):
        measure(settings_of(pair, window=16), Memo(tmp_path))


def test_tasks_agree_with_lm_eval_by_hand_and_two_processes_with_one(pair, tmp_path):
    """The same numbers as lm-eval's own command line on the saved checkpoints; documents add up over processes."""
    pytest.importorskip("lm_eval")
    limit, tasks = 31, "polysurgery_agreement,mine"
    (tmp_path / "mine.jsonl").write_text(
        "\n".join(json.dumps({"text": f"the quick {word} jumps over the dog"}) for word in ("fox", "dog", "lazy") * 11)
    )
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'mine.jsonl'}\ntest_split: test\noutput_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: word_perplexity\n'
        "  - metric: bits_per_byte\nmetadata:\n  version: 1.0\n"
    )
    common = [pair / "twin", "--against", pair / "base", "--text", pair / "text.txt", "--tokens", "512"]
    common += ["--window", "32", "--tasks", tasks, "--include-path", tmp_path, "--limit", limit, "--no-cache"]
    common += ["--max-length", "64", "--block-tokens", "256", "--no-speed", "--json"]
    alone = run(*common, "-o", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    one = json.loads(alone.stdout)
    assert (tmp_path / "one" / "report.html").read_text().count("<svg") == 3
    assert "mine" in (tmp_path / "one" / "summary.md").read_text()
    both = run(*common, "--nproc", "2")
    assert both.returncode == 0, both.stderr
    two = json.loads(both.stdout)
    assert two["settings"]["processes"] == 2
    for a, b in zip(one["tasks"], two["tasks"], strict=True):
        assert b["documents_per_process"] == [16, 15]
        assert sum(a["documents_per_process"]) == limit
        for key in ("original", "twin", "difference"):
            assert b[key] == pytest.approx(a[key], rel=1e-6)
        if a["metric"].startswith("acc"):
            assert b["difference_stderr"] == pytest.approx(a["difference_stderr"], rel=1e-6)
    assert two["text"]["nats"]["twin"]["value"] == pytest.approx(one["text"]["nats"]["twin"]["value"], rel=1e-6)
    assert [row["r2"] for row in two["blocks"]] == pytest.approx([row["r2"] for row in one["blocks"]], rel=1e-6)

    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", tasks, "--limit", str(limit)]
    command += ["--model_args", f"pretrained={pair / 'twin'},dtype=float32,max_length=64", "--batch_size", "8"]
    command += ["--include_path", str(tmp_path), "--device", "cpu", "--output_path", str(tmp_path / "lm")]
    import evals.harness

    (tmp_path / "agreement.yaml").write_text((evals.harness.OWN_TASKS / "agreement.yaml").read_text())
    (tmp_path / "agreement.py").write_text((evals.harness.OWN_TASKS / "agreement.py").read_text())
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((tmp_path / "lm").rglob("results*.json")).read_text())["results"]
    checked = 0
    for row in one["tasks"]:
        assert row["twin"] == pytest.approx(results[row["task"]][row["metric"]], rel=1e-9)
        checked += 1
    assert checked == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--tasks": "polysurgery_agreemnt"}, ["no such task", "did you mean 'polysurgery_agreement'"]),
        ({"--tokens": "16"}, ["16 tokens are fewer than one window of 32"]),
        ({"--text": "nowhere.txt"}, ["nowhere.txt"]),
        ({"--stride": "64"}, ["stride"]),
        ({"--against": "missing/"}, ["missing"]),
        ({"--include-path": "nowhere", "--tasks": "mine"}, ["nowhere", "task files"]),
        ({"-o": "twin"}, ["holds a model"]),
    ],
)
def test_bad_input_is_a_clear_error(pair, change, words):
    given = {
        "--against": "base",
        "--text": "text.txt",
        "--window": "32",
        "--tokens": "256",
        "--cache": "cache",
    } | change
    done = run("twin", *(part for item in given.items() for part in item), cwd=pair)
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
    done = run(pair / "twin", "--against", pair / "base", "--dry-run", "-o", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert "python: 16384 tokens after 4096" in done.stdout, "what the fit has seen is passed over"
    assert not (tmp_path / "report").exists()


def test_speed_is_a_ratio_that_a_machine_that_slows_down_does_not_change(pair, monkeypatch):
    from evals import speed

    one, two = (surgery.load(str(pair / name)) for name in ("base", "twin"))
    rounds = []

    def one_round(model, prompt):
        """Each round takes twice as long as the one before; the twin takes 4/5 of the original's time, at last 2/5."""
        rounds.append(model)
        slow = 2.0 ** ((len(rounds) - 1) // 2)
        share = 1.0 if model is one else 0.4 if len(rounds) >= 8 else 0.8
        return slow * share, 10 * slow * share

    monkeypatch.setattr(speed, "_one_round", one_round)
    found = speed.compare_speed(one, two, rounds=3)
    assert rounds == [one, two] * 4, "in turn, after one round that does not count"
    for kind in ("prefill", "decode"):
        rate = found[f"{kind}_tokens_per_second"]
        assert (rate["ratio"], rate["ratio_low"], rate["ratio_high"]) == pytest.approx((1.25, 1.25, 2.5))
    assert found["parameters"]["twin"] > found["parameters"]["original"]
    assert 0.9 < found["flops_per_token"]["ratio"] < 1.1


def test_encoders_are_evaluated_by_their_outputs(tmp_path, ids):
    from safetensors.torch import save_file

    tiny.make("bert").save_pretrained(tmp_path / "base")
    surgery.convert(tmp_path / "base", calibration=ids, output=tmp_path / "twin")
    save_file({"input_ids": ids[:16], "attention_mask": torch.ones_like(ids[:16])}, tmp_path / "inputs.safetensors")
    given = {"text": str(tmp_path / "inputs.safetensors"), "window": 32}
    settings = EvalSettings(twin=str(tmp_path / "twin"), original=str(tmp_path / "base"), **given)
    found = measure(settings, Memo(None))
    assert found["outputs"]["vectors"] == 16 * 32
    assert 0.9 < found["outputs"]["cosine"]["mean"] < 1
    assert len(found["blocks"]) == 2
