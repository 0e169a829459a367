"""The shell recipes, as far as they go without a GPU and a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import surgery
from tests import tiny

RECIPES = Path(__file__).parents[2] / "recipes"


def run(*arguments, recipe="refine.sh", **variables):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["sh", RECIPES / recipe, *map(str, arguments)], capture_output=True, text=True, check=False,
        cwd=RECIPES.parent, env={**os.environ, "PATH": path, **variables},
    )  # fmt: skip


@pytest.mark.parametrize(("which", "base"), [("tinyllama", "llama"), ("pythia", "gpt_neox")])
def test_every_command_of_the_refinement_recipes_is_one(tmp_path, which, base):
    """A dry run with a tiny model in the place of the one named; every option is parsed and checked."""
    tiny.save_with_tokenizer(base, tmp_path / "base")
    settings = {"calibration": "python", "tokens": 1024, "length": 32, "measure": 0}
    surgery.convert(tmp_path / "base", output=tmp_path / "out" / "closed-form", **settings)
    given = {"DRY_RUN": "1", "MODEL": str(tmp_path / "base"), "TEXT": "python", "LENGTH": "64"}
    done = run(which, tmp_path / "out", **given)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{4_000_000 // (32 * 64):,} steps of 2,048 tokens" in done.stdout
    assert not (tmp_path / "out" / "refined").exists()


def test_from_a_model_to_a_refined_twin_that_is_measured_on_kinds_it_has_not_seen(tmp_path):
    tiny.save_with_tokenizer("llama", tmp_path / "base")
    for name in ("novels", "drama"):
        (tmp_path / f"{name}.txt").write_text(f"{name} are told in words, one after another, for hours. " * 1500)
    given = {"KINDS": f"drama={tmp_path}/drama.txt", "TOKENS": "8192", "CONVERT_TOKENS": "8192", "LENGTH": "64"}
    done = run(tmp_path / "base", tmp_path / "out", f"{tmp_path}/novels.txt=2", "code", recipe="refined.sh", **given)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("over 2 unseen kinds") == 2, "drama and the manual; the code was seen"
    for twin in ("closed-form", "refined"):
        found = json.loads((tmp_path / "out" / twin / "evaluation" / "texts.json").read_text())
        assert {row["kind"]: row["seen"] for row in found["kinds"]} == {"manual": "no", "code": "text", "drama": "no"}


def test_an_unknown_recipe_says_what_there_is():
    done = run("gpt5")
    assert done.returncode == 2
    assert "smollm2|pythia|tinyllama|qwen3" in done.stderr


def test_the_accelerate_configurations_are_read_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    for name, processes in (("one_gpu", 1), ("eight_gpus", 8)):
        file = RECIPES / "accelerate" / f"{name}.yaml"
        assert load_config_from_file(str(file)).num_processes == processes
        assert yaml.safe_load(file.read_text())["mixed_precision"] == "no"
