"""What is shown acts on nobody, and what leaves the machine names no place on it."""

import json
import os
import re
import subprocess
import sys

import pytest

from evals.report import write_evaluation
from surgery.cli import terminal
from surgery.runtime.public import as_label, in_markdown, printable, public, public_text


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "secret" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


def test_paths_are_named_by_their_last_part_wherever_they_stand(here):
    for path in (f"{here}/secret/model", "secret/model", "~/secret/model", "./secret/model/", "../x/../secret/model"):
        assert public_text(path).strip("/") == "model" or not os.path.exists(path)
    said = f'no "{here}/secret/model/vocab.json" in ({here}/secret/model), nor in ~/secret/model; see'
    assert public_text(said) == 'no "vocab.json" in (model), nor in model; see'
    nested = {f"{here}/a": [(f"at {here}/secret/b",), {"x": {"y": f"&#34;{here}/secret/c&#34;"}}], "n": 3, "none": None}
    assert public(nested) == {"a": [("at b",), {"x": {"y": "&#34;c&#34;"}}], "n": 3, "none": None}
    assert here not in json.dumps(public(nested))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "them/base",
            "hub:them/texts@0123/file.json.gz",
            "https://hf.co/them/base",
            "see http://localhost:80/some/place",
        ),
        *("model.layers.0.mlp", "and/or", "R²/held", "/somebody/elses/path", "input / output", "3/4", "", "a\nb"),
        *("novels.txt", "D:\\x\\y", "/", "//", "~"),
    ],
)
def test_what_is_no_place_here_stays(text, here):
    assert public_text(text) == text


def test_evaluations_are_cleaned(here, tmp_path, monkeypatch):
    report = {
        "models": {"twin": {"name": "t"}, "original": {"name": "o"}},
        "settings": {"twin": f"{here}/secret/model", "task_settings": {"include_path": [f"{here}/secret/model"]}},
        "versions": {}, "seconds": {}, "blocks": [], "text": None,
    }  # fmt: skip
    monkeypatch.setattr("evals.report.markdown", json.dumps)
    monkeypatch.setattr("evals.report.page", json.dumps)
    write_evaluation(report, tmp_path / "evaluation")
    for file in (tmp_path / "evaluation").iterdir():
        assert here not in file.read_text() and "model" in file.read_text()


NASTY = "<script>alert(1)</script>|`x`\x1b]0;owned\x07\x1b[31m[red]:smile:\u202e$\\frac{$\n# heading"


def test_nothing_shown_acts_on_a_terminal_a_table_or_a_picture(tmp_path):
    shown = printable(NASTY)
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert "\\x1b[31m[red]" in shown and shown.count("\n") == 1
    assert printable("zwölf £\tµ →\n") == "zwölf £\tµ →\n"
    line = in_markdown(NASTY)
    assert "\n" not in line and "<" not in line and "`" not in line and "|" not in line.replace("\\|", "")
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().set_title(as_label(NASTY))
    figure.savefig(tmp_path / "a.svg")


def test_tables_and_lines_at_the_terminal_show_what_there_is(capsys):
    terminal.print_table(f"title {NASTY}", ["block", "kind"], [["[bold]x[/bold]", NASTY]])
    terminal.echo(NASTY)
    seen = capsys.readouterr().out
    assert "\x1b" not in seen and "[bold]x[/bold]" in seen and ":smile:" in seen and "[red]" in seen


def test_errors_of_a_server_or_a_file_are_shown_as_text(tmp_path):
    code = (
        "import sys\nfrom surgery.cli import main\nfrom surgery.errors import ModelError\n"
        "@main.cli.command()\ndef fail():\n    raise ModelError('a\\x1b[2Jb', where='\\x1b]0;c\\x07')\n"
        "sys.argv = ['surgery', 'fail']\nmain.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "\x1b" not in done.stderr and "a\\x1b[2Jb" in done.stderr


def test_pages_hold_no_script_and_no_broken_table():
    from evals.report import markdown, page

    row = {"path": NASTY, "r2": 0.5, "r2_affine": 0.1, "fvu": 0.5, "fvu_gaussian": None, "gaussian_misleads": False}
    task = {"task": NASTY, "metric": "acc,none", "difference_stderr": None, "difference": 0.0}
    task |= dict.fromkeys(("original", "twin"), 0.5) | {f"{name}_stderr": None for name in ("original", "twin")}
    report = {
        "models": {"twin": {"name": NASTY, "conversion": None}, "original": {"name": NASTY}}, "reused": [NASTY],
        "settings": {"twin": NASTY, "task_settings": {"limit": None}}, "versions": {}, "seconds": {}, "blocks": [row],
        "tasks": [task],
    }  # fmt: skip
    html = page(report)
    assert "<script>alert" not in html and html.count("<svg") == 2
    lines = markdown(report).splitlines()
    assert sum(line.startswith("#") for line in lines) == 1 and "<script" not in "".join(lines)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines if "alert" in line and line.startswith("| ")} == {6}
