"""What somebody types first."""

import os
import re

import pytest

from surgery.version import __version__
from tests import tiny
from tests.commands import process, surgery


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "surgery convert HuggingFaceTB/SmolLM2-135M -o twin"),
        ("model.gguf", "surgery --help"),
        ("recipes/demo.yaml", "surgery run recipes/demo.yaml"),
        ("convrt", "did you mean 'convert'"),
    ],
)
def test_whoever_leaves_the_verb_out_is_told_what_to_type(word, said):
    done = surgery(word)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_twins_folder_is_known_for_one(tmp_path):
    (tmp_path / "surgery.json").write_text("{}")
    assert f"surgery eval {tmp_path}" in surgery(tmp_path).stderr


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version(option):
    assert __version__ in surgery(option).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(shell):
    assert "_SURGERY_COMPLETE" in surgery("completion", shell).stdout


def test_bash_is_given_the_commands():
    given = {**os.environ, "_SURGERY_COMPLETE": "bash_complete", "COMP_WORDS": "surgery con", "COMP_CWORD": "1"}
    assert process(env=given).stdout.split() == ["plain,convert"]


def test_no_colour_where_nobody_looks(tmp_path):
    tiny.save_with_tokenizer("llama", tmp_path / "model")
    for more in ({}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}):
        done = process("inspect", tmp_path / "model", env={**os.environ, **more})
        assert done.returncode == 0
        assert not re.search(r"\x1b\[[34]\d", done.stdout)
