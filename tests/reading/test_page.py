"""The explanation as people read it."""

import json

from click.testing import CliRunner

from surgery.cli.main import cli
from surgery.reading.page import JSON, PAGE, PLOT, write_explanation


def test_the_page_is_self_contained_and_escapes_tokens(report, tmp_path):
    report = json.loads(json.dumps(report))
    report["contexts"][0]["tokens"][0] = "<script>alert(1)</script>"
    write_explanation(report, tmp_path / "out")
    text = (tmp_path / "out" / PAGE).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "http" not in text
    assert (tmp_path / "out" / PLOT).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / JSON).read_text())["eigenpairs"]


def test_the_command(folders, tmp_path):
    arguments = ["explain", folders["twin"], "--block", "1", "--tokens", "512", "--window", "32"]
    done = CliRunner().invoke(cli, [*arguments, "--direction", "token:fox", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "λ =" in done.output
    assert (tmp_path / "out" / PAGE).is_file()
    told = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert told["own"]["linear"]
