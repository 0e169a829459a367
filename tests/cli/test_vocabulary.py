"""One name and one type for one thing: in every command, recipe and function."""

import inspect
import re
import warnings
from dataclasses import MISSING, fields

import pytest

import surgery
from evals.settings import EvalSettings, evaluation_settings
from surgery.cli.main import cli
from surgery.cli.options import COUNT, DTYPE
from surgery.conversion.recipe import Recipe
from surgery.errors import RecipeError
from surgery.reading.explanation import ExplainSettings
from surgery.reading.trace import TraceSettings
from surgery.refining.settings import RefineSettings
from surgery.runtime.vocabulary import FORMER, current
from tests.commands import surgery as typed

CLI_ONLY = {"help", "trust_remote_code", "as_json", "nproc", "dry_run", "version", "shell"}
"""What only a terminal needs."""

MORE = {
    "convert": {"recipe_file"}, "eval": {"no_cache", "cache"}, "run": set(),
}  # fmt: skip


def options():
    """(command, option) of all commands."""
    return [(name, option) for name, command in cli.commands.items() for option in command.params]


def defaults_of(command):
    """Names and defaults of what a command's function takes: its parameters and the fields of its settings."""
    functions = {"eval": evaluation_settings, "run": surgery.run}
    function = functions.get(command) or getattr(surgery, command)
    found = {name: one.default for name, one in inspect.signature(function).parameters.items()}
    kinds = {"refine": RefineSettings, "eval": EvalSettings, "explain": ExplainSettings, "trace": TraceSettings}
    if command == "convert":
        found |= {name: one.default for name, one in Recipe.model_fields.items()}
    if command in kinds:
        found |= {one.name: one.default for one in fields(kinds[command]) if one.default is not MISSING}
        found |= {one.name: None for one in fields(kinds[command]) if one.default is MISSING}
    return found


def test_an_option_is_the_same_in_every_command():
    seen = {}
    for command, option in options():
        if option.param_type_name == "option" and option.name not in ("help", "form"):
            about = (type(option.type), option.opts, option.secondary_opts, option.is_flag)
            assert seen.setdefault(option.name, (about, command))[0] == about, f"{command} {option.name}"
    assert len(seen) > 60


def test_counts_and_precisions_have_one_type():
    for command, option in options():
        if option.name in (
            "tokens",
            "window",
            "batch",
            "measure",
            "kind_tokens",
            "task_window",
            "block_tokens",
            "seed",
        ):
            assert option.type is COUNT, f"{command} {option.name}"
        if option.name in ("dtype", "save_dtype"):
            assert option.type is DTYPE, f"{command} {option.name}"


@pytest.mark.parametrize("command", sorted(set(cli.commands) - {"completion"}))
def test_an_option_has_its_name_in_python(command):
    known = set(defaults_of(command)) | CLI_ONLY | MORE.get(command, set())
    if command == "eval":
        known.add("output")  # of evaluate
    for option in cli.commands[command].params:
        assert option.name in known, f"--{option.name} is not in Python"


def test_what_help_says_is_the_default():
    checked = 0
    for command, option in options():
        told = re.search(r"\[default: ([^;\]]+)\]", option.help or "") if option.param_type_name == "option" else None
        if told is None or command == "completion":
            continue
        default = defaults_of(command).get(option.name)
        words = told[1].strip().replace("1M", "1e6")
        if isinstance(default, bool) or not isinstance(default, int | float) or not re.fullmatch(r"[\d.e-]+", words):
            continue
        value = float(words)
        assert value == default, f"{command} --{option.name}: {words} and {default}"
        checked += 1
    assert checked > 40


def test_every_command_that_runs_a_model_takes_a_device():
    with_device = {command for command, option in options() if option.name == "device"}
    assert with_device == {"convert", "eval", "refine", "explain", "trace"}
    for command in with_device:
        assert defaults_of(command)["device"] == "auto"


@pytest.mark.parametrize(("old", "new"), sorted(FORMER.items()))
def test_names_of_earlier_versions_are_understood_with_a_word(old, new):
    with pytest.warns(FutureWarning, match=f"{old} is called {new} now"):
        assert current({old: 1}) == {new: 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert current({new: 1}) == {new: 1}
    with pytest.raises(RecipeError, match="the same setting"):
        current({old: 1, new: 2})


def test_options_of_earlier_versions_are_understood_with_a_word(tmp_path):
    done = typed("convert", tmp_path, "--calibration", "python", "--length=1k", "--dry-run")
    assert "note: --calibration is called --text now" in done.stderr
    assert "note: --length is called --window now" in done.stderr
    assert "no config.json" in done.stderr, "and nothing else is wrong"


def test_a_direction_is_not_taken_for_a_folder(tmp_path):
    done = typed("explain", tmp_path, "--block", 0, "--output", "token: Paris")
    assert done.returncode == 2
    assert "is a direction, not a folder" in done.stderr
