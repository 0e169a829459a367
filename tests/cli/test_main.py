"""The command line as a user meets it: exit codes, no tracebacks; where it matters in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.commands import KILLED_AT_THE_SECOND_BLOCK, process, surgery


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama with a tokenizer, as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    tiny.save_with_tokenizer("llama", folder)
    return folder


def test_inspect_shows_the_blocks(llama):
    shown = surgery("inspect", llama)
    assert shown.returncode == 0, shown.stderr
    for word in ("model.layers.0.mlp", "gated", "silu", "32 → 64 → 32", "native, custom"):
        assert word in shown.stdout
    told = json.loads(surgery("inspect", llama, "--json").stdout)
    assert told["blocks"][1]["path"] == "model.layers.1.mlp"
    assert told["blocks"][0]["parameters"] == 3 * 32 * 64


def test_inspect_reads_no_weights(llama, tmp_path):
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    assert surgery("inspect", tmp_path).returncode == 0


def test_a_device_that_is_not_here_is_an_error(llama, tmp_path):
    done = surgery("convert", llama, "-o", tmp_path / "twin", "--tokens", 4096, "--window", 32, "--device", "nowhere")
    assert done.returncode == 2
    assert "no device 'nowhere'" in done.stderr and "cpu, cuda" in done.stderr
    assert not (tmp_path / "twin").exists()


def test_convert_prints_perplexity_and_keeps_the_companions(llama, tmp_path):
    arguments = ["convert", llama, "--tokens", 4096, "--window", 32, "--measure", 512]
    done = process(*arguments, "-o", tmp_path / "twin")
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert "native form, reloaded in a fresh process" in done.stdout
    assert "left" in done.stderr, "time left"
    names = {path.name for path in (tmp_path / "twin").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "surgery.json"} <= names
    assert "generation_config.json" in names
    assert "modeling_polynomial.py" not in names
    report = json.loads((tmp_path / "twin" / "surgery.json").read_text())
    assert report["perplexity"]["tokens"] >= 400
    assert report["calibration"]["source"] == report["recipe"]["text"] == "samples", "there is no network"
    assert "files of broad cannot be fetched" in done.stderr and "--text" in report["calibration"]["note"]
    assert report["recipe"]["output"] == "twin", "no path of this machine travels with the checkpoint"
    assert report["recipe"]["model"] == "model"
    again = surgery(*arguments, "-o", tmp_path / "twin")
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    as_json = surgery(*arguments, "-o", tmp_path / "twin", "--overwrite", "--json")
    assert as_json.returncode == 0, as_json.stderr
    held = [row["r2_held"] for row in report["blocks"]]
    assert [row["r2_held"] for row in json.loads(as_json.stdout)["blocks"]] == pytest.approx(held)


def test_texts_come_with_shares_and_what_was_read_of_each_is_passed_over(llama, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} word after another, and so on. " * 900)
    texts = [str(tmp_path / "one.txt=3"), str(tmp_path / "two.txt")]
    given = [word for text in texts for word in ("--text", text)]
    settings = ["--tokens", 2048, "--window", 32, "--measure", 512]
    done = surgery("convert", llama, "-o", tmp_path / "twin", *given, *settings)
    assert done.returncode == 0, done.stderr
    assert "2,048 tokens of one.txt + two.txt" in done.stdout
    report = json.loads((tmp_path / "twin" / "surgery.json").read_text())
    assert report["recipe"]["text"] == ["one.txt=3", "two.txt"], "no path of this machine"
    parts = {part["source"]: part for part in report["calibration"]["parts"]}
    assert [part["tokens"] for part in parts.values()] == pytest.approx([1536, 512], abs=64)
    for name, part in parts.items():
        planned = surgery("eval", tmp_path / "twin", "--original", llama, "--text", tmp_path / name, "--dry-run")
        assert f"tokens after {part['end']}" in planned.stdout
    other = surgery("eval", tmp_path / "twin", "--original", llama, "--text", "code", "--dry-run")
    assert "tokens after 0" in other.stdout


def test_dry_run_writes_nothing(llama, tmp_path):
    done = surgery("convert", llama, "-o", tmp_path / "twin", "--dry-run", "--degree", 3)
    assert done.returncode == 0, done.stderr
    assert "custom" in done.stdout
    assert list(tmp_path.iterdir()) == []


def broken(kind, llama, tmp_path):
    folder = tmp_path / kind
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if kind == "truncated":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    if kind == "missing":
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if kind == "unknown":
        config = json.loads((folder / "config.json").read_text())
        config["model_type"] = "no-such-thing"
        (folder / "config.json").write_text(json.dumps(config))
    if kind == "activation":
        config = json.loads((folder / "config.json").read_text())
        config["hidden_act"] = "silly"
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["truncated", "missing", "unknown", "activation"])
def test_broken_models_are_clear_errors(kind, llama, tmp_path):
    done = surgery("convert", broken(kind, llama, tmp_path), "-o", tmp_path / "twin", "--tokens", 2048, "--window", 32)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "twin").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["convert", "./nowhere", "-o", "x"], "no such file or folder"),
        (["convert", "-o", "x"], "no model was named"),
        (["convert", "-o", "x", "--nproc", "2"], "no model was named"),
        (["convert", "--dry-run"], "no model was named"),
        (["convert", "MODEL", "--text", "pyton", "--dry-run"], "did you mean 'python'"),
        (["eval", "MODEL", "--original", "MODEL", "--tokens", "1"], "tokens is 1, but must be at least 2"),
        (["eval", "MODEL", "--original", "MODEL", "--skip", "-1"], "skip is -1"),
        (["trace", "MODEL", "--tokens", "0"], "tokens is 0"),
        (["convert", "MODEL", "--dry-run", "--device", "banana"], "no device 'banana'"),
        (["convert", "MODEL", "--dry-run", "-o", "MODEL"], "was not made by this tool"),
        (["explain", "MODEL", "--block", "9"], "block 9 was asked for, but the model has blocks 0 to 1"),
        (["explain", "MODEL", "--block", "0", "--fit", "2", "--direction", "tokn: a"], "did you mean 'token'"),
        (["explain", "MODEL", "--block", "0", "--tokens", "0"], "tokens is 0"),
        (["convert", "MODEL"], "no output folder"),
        (["convert", "MODEL", "-o", "x", "--degree", "12"], "degree"),
        (["convert", "MODEL", "-o", "x", "--text", "pyton"], "did you mean 'python'"),
        (["convert", "MODEL", "-o", "x", "--recipe", "none.yaml"], "cannot be read"),
        (["convert", "MODEL", "-o", "x", "--blocks", "7"], "blocks 0 to 1"),
        (["convert", "MODEL", "-o", "x", "--nonsense"], "No such option"),
        (["inspect", "."], "no config.json"),
    ],
)
def test_bad_input_exits_with_2_and_says_what_to_do(arguments, text, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = surgery(*(llama if a == "MODEL" else a for a in arguments))
    assert done.returncode == 2, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_process_ends_with_the_code_and_no_traceback(tmp_path):
    done = process("convert", "./nowhere", "-o", "x", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: ./nowhere: there is no such file or folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_a_clear_error_and_finished_blocks_are_kept(llama, tmp_path):
    """Files may grow to 60 kB here: a finished block fits, the checkpoint does not."""

    def small_files():
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    command = ["convert", llama, "-o", tmp_path / "twin", "--tokens", 2048, "--window", 32, "--measure", 0]
    done = process(*command, preexec_fn=small_files)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["twin.partial"]
    assert surgery(*command).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["twin"]


def test_help_loads_nothing_heavy():
    code = "import sys, surgery.cli.main; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "pydantic", "rich", "numpy", "greenlet"} & set(loaded)
    assert surgery("--help").returncode == 0


def test_killed_half_way_it_leaves_no_checkpoint_and_goes_on_from_the_finished_block(llama, tmp_path):
    command = ["convert", llama, "-o", tmp_path / "twin", "--tokens", 2048, "--window", 32, "--measure", 0]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_THE_SECOND_BLOCK, *map(str, command)], capture_output=True, check=False
    )
    assert killed.returncode == -9
    assert not (tmp_path / "twin").exists()
    first = tmp_path / "twin.partial" / "model.layers.0.mlp.safetensors"
    with safe_open(first, framework="pt") as file:
        kept = file.metadata()
    row = json.loads(kept["row"]) | {"seconds": 12345.0}  # a mark: fitted anew the block would not have it
    save_file(load_file(first), tmp_path / "marked", metadata={**kept, "row": json.dumps(row)})
    os.replace(tmp_path / "marked", first)
    done = surgery(*command)
    assert done.returncode == 0, done.stderr
    seconds = [row["seconds"] for row in json.loads((tmp_path / "twin" / "surgery.json").read_text())["blocks"]]
    assert seconds[0] == 12345.0
    assert seconds[1] < 12345.0
    assert [path.name for path in tmp_path.iterdir()] == ["twin"]
