"""lm-eval's tasks."""

import json
import subprocess
import sys

import pytest

from surgery.errors import EvaluationError
from surgery.models import loading
from tests.commands import process
from tests.evals.support import run


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
    common = [pair / "twin", "--original", pair / "base", "--text", pair / "text.txt", "--tokens", "512"]
    common += ["--window", "32", "--tasks", tasks, "--include-path", tmp_path, "--limit", limit, "--no-cache"]
    common += ["--task-window", "64", "--block-tokens", "256", "--no-speed", "--json"]
    alone = run(*common, "-o", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    one = json.loads(alone.stdout)
    assert (tmp_path / "one" / "report.html").read_text().count("<svg") == 3
    assert "mine" in (tmp_path / "one" / "summary.md").read_text()
    both = process("eval", *common, "--nproc", 2)
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
    for name in ("r2", "r2_affine"):
        assert [row[name] for row in two["blocks"]] == pytest.approx([row[name] for row in one["blocks"]], rel=1e-6)

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


def test_questions_go_into_the_chat_template_behind_the_system_message(pair, tmp_path):
    pytest.importorskip("lm_eval")
    from evals.harness import TaskSettings, language_model, run_task, task_manager

    rows = [{"question": "the quick fox", "choices": [" jumps", " over"], "answer": 0}] * 3
    (tmp_path / "mc.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mc.yaml").write_text(
        "task: mc\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'mc.jsonl'}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\nmetadata:\n  version: 1.0\n'
    )
    loaded, manager = loading.loaded(str(pair / "base")), task_manager([str(tmp_path)])

    def asked(**settings):
        lm = language_model(loaded.model, loaded.tokenizer, TaskSettings(**settings))
        seen, answer = [], lm.loglikelihood
        lm.loglikelihood = lambda requests, **more: (
            seen.extend(r.args[0] for r in requests),
            answer(requests, **more),
        )[1]
        assert run_task(lm, "mc", manager, TaskSettings(**settings)) is not None
        return set(seen)

    assert asked() == {"the quick fox"}
    loaded.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert asked(apply_chat_template=True, system_instruction="be brief") == {"<system>be brief<user>the quick fox"}
    assert asked(apply_chat_template=True) == {"<user>the quick fox"}
    loaded.tokenizer.chat_template = None
    with pytest.raises(EvaluationError, match="no such chat template"):
        asked(apply_chat_template=True)
