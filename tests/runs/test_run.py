"""A whole run of a tiny model: what is made, what is kept, what continues after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

import surgery
from surgery.errors import RecipeError
from surgery.runs.run import plan_run, run
from tests import commands, tiny
from tests.hub_server import Hub, environment

RECIPE = """
model: {model}
output: {out}
convert: {{degree: [2, 3], text: {text}, tokens: 4k, window: 32, measure: 512}}
refine: {{text: {text}, tokens: 2048, window: 32, validate_tokens: 256, rate: 1e-3}}
eval: {{text: python, tokens: 512, window: 32, block_tokens: 256, speed: false, kind_tokens: 512,
  kind: {{manual: python, own: {text}}}}}
card: {{license: apache-2.0}}
"""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny.save_with_tokenizer("llama", folder / "model")
    (folder / "text.txt").write_text("one word after another, and so on, until the end of the line. " * 900)
    text = RECIPE.format(model=folder / "model", out=folder / "out", text=folder / "text.txt")
    (folder / "recipe.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def done(place):
    return commands.surgery("run", place / "recipe.yaml")


def reasons(place, *sets):
    """Why each stage would be done."""
    rows = plan_run(place / "recipe.yaml", sets=sets)["stages"]
    return {f"{row['stage']} {row['label']}": row["why"] for row in rows}


def test_everything_is_made_and_told(done, place):
    assert done.returncode == 0, done.stderr
    out = place / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {"degree-2", "degree-3", "refined", "run.json", "run.md", "run.html", "run.png"}
    measured = {}
    for twin in ("degree-2", "degree-3", "refined"):
        found = json.loads((out / twin / "evaluation" / "evaluation.json").read_text())
        assert {row["kind"]: row["seen"] for row in found["kinds"]["kinds"]} == {"manual": "no", "own": "text"}
        measured[twin] = [row["fingerprint"] for row in (found["text"], *found["kinds"]["kinds"])]
    assert measured["degree-2"] == measured["degree-3"] == measured["refined"], "the same tokens"
    assert (out / "refined" / "README.md").read_text().startswith("---\nlibrary_name")
    told = (out / "run.md").read_text()
    for word in ("degree 2, refined", "degree 3", "run.png", "refinement.png", "calibrated on", "surgery explain"):
        assert word in told
    assert told.count("![") == (out / "run.html").read_text().count("data:image/png;base64")
    assert str(place) not in told.split("## Next")[0], "no path of this machine"
    assert str(out / "run.png") in done.stdout and "next:" in done.stdout
    assert "[1/7] convert: degree 2" in done.stderr
    assert surgery.load(out / "refined").config.architectures == ["LlamaForCausalLM"]


def test_the_second_time_nothing_is_done_again(done, place):
    before = {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*.safetensors")}
    assert set(reasons(place).values()) == {""}
    again = commands.surgery("run", place / "recipe.yaml")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("(already done)") == 7
    assert before == {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*.safetensors")}
    table = [line for line in again.stdout.splitlines() if "degree" in line]
    assert table == [line for line in done.stdout.splitlines() if "degree" in line]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("refine.tokens=4096", {"refine", "eval", "card"}),
        ("eval.tokens=256", {"eval", "card"}),
        ("convert.tokens=2048", {"convert", "refine", "eval", "card"}),
        ("card.license=mit", {"card"}),
        ("device=cpu", set()),
    ],
)
def test_what_depends_on_a_change_is_done_again_and_nothing_else(change, again, done, place):
    for stage, why in reasons(place, change).items():
        assert bool(why) == any(stage.startswith(name) for name in again), stage


def test_a_text_that_changed_is_noticed(done, place):
    kept = (place / "text.txt").read_text()
    (place / "text.txt").write_text(kept + "one more line")
    try:
        assert all(reasons(place).values())
    finally:
        (place / "text.txt").write_text(kept)


def test_a_twin_that_somebody_else_wrote_is_not_taken_for_the_runs_own(done, place, tmp_path):
    small = ["--text", "python", "--tokens", 2048, "--window", 32, "--measure", 0]
    commands.surgery("convert", place / "model", "-o", tmp_path / "out" / "degree-2", *small)
    with pytest.raises(RecipeError, match="did not make"):
        run(place / "recipe.yaml", output=tmp_path / "out")


KILLED = """
import os, signal, sys
from surgery.runs import run as runs
def refined(*given, **more):
    os.kill(os.getpid(), signal.SIGKILL)
runs.refined = refined
from surgery.cli.main import main
main()
"""


def test_after_a_kill_the_same_command_goes_on(done, place, tmp_path):
    command = ["run", str(place / "recipe.yaml"), "-o", str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, check=False, env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert list(record["stages"]) == ["convert degree-2", "convert degree-3"]
    finished = commands.surgery(*command)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("(already done)") == 2
    one, two = (json.loads((folder / "out" / "run.json").read_text())["stages"] for folder in (place, tmp_path))
    assert [one[name]["weights"] for name in one if "weights" in one[name]] == [
        two[name]["weights"] for name in two if "weights" in two[name]
    ], "the undisturbed result, byte for byte"


@pytest.mark.parametrize("change", [(), ("--set", "convert.tokens=2048")])
def test_a_stage_killed_half_way_is_gone_on_with_unless_its_settings_changed(change, done, place, tmp_path):
    command = [
        "run",
        str(place / "recipe.yaml"),
        "-o",
        str(tmp_path / "out"),
        "--set",
        "refine=false",
        "--set",
        "eval=false",
    ]
    killed = subprocess.run(
        [sys.executable, "-c", commands.KILLED_AT_THE_SECOND_BLOCK, *command],
        capture_output=True,
        check=False,
        env=os.environ,
    )
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "degree-2.partial").is_dir()
    again = commands.surgery(*command, *change)
    assert again.returncode == 0, again.stderr
    assert not (tmp_path / "out" / "degree-2.partial").exists()
    tokens = json.loads((tmp_path / "out" / "degree-2" / "surgery.json").read_text())["calibration"]["tokens"]
    assert tokens == pytest.approx(2048 if change else 4000, abs=64)


def test_the_plan_and_the_result_are_json_for_scripts(done, place):
    planned = json.loads(commands.surgery("run", place / "recipe.yaml", "--dry-run", "--json").stdout)
    assert [row["stage"] for row in planned["stages"]] == ["convert"] * 2 + ["refine"] + ["eval"] * 3 + ["card"]
    found = json.loads(commands.surgery("run", place / "recipe.yaml", "--json").stdout)
    assert found["twin"] == str(place / "out" / "refined")
    assert len(found["pages"]) == 3


def test_a_run_ends_on_the_hub_and_publishes_once(done, place, tmp_path):
    server = Hub()
    try:
        shutil.copytree(place / "out", tmp_path / "out")
        command = [sys.executable, "-m", "surgery", "run", str(place / "recipe.yaml"), "-o", str(tmp_path / "out")]
        command += ["--set", "push.repository=me/twin"]
        here = environment(server, tmp_path)
        first = subprocess.run(command, capture_output=True, text=True, check=False, env=here)
        assert first.returncode == 0, first.stderr
        assert first.stderr.count("(already done)") == 7, "all but the push"
        weights = (tmp_path / "out" / "refined" / "model.safetensors").read_bytes()
        assert server.files("me/twin")["model.safetensors"] == weights
        address = json.loads((tmp_path / "out" / "run.json").read_text())["stages"]["push refined"]["address"]
        assert address in (tmp_path / "out" / "run.md").read_text()
        server.log.clear()
        again = subprocess.run(command, capture_output=True, text=True, check=False, env=here)
        assert again.stderr.count("(already done)") == 8
        assert not any(line.startswith(("POST", "PUT")) for line in server.log), "nothing is sent twice"
    finally:
        server.shutdown()


def test_a_broken_record_is_said(done, place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{")
    failed = commands.surgery("run", place / "recipe.yaml", "-o", tmp_path / "out")
    assert failed.returncode == 2
    assert "run.json cannot be read" in failed.stderr
