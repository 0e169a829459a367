"""The code of docs/python.md, one piece after another."""

import re
from pathlib import Path

from tests import tiny

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_the_code_of_the_page_runs(tmp_path, capsys):
    tiny.save_with_tokenizer("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 600)
    names = {"MODEL": str(tmp_path / "model"), "TEXT": str(tmp_path / "text.txt"), "OUT": tmp_path}
    text = PAGE.read_text()
    pieces = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(pieces) > 8
    for piece in pieces:
        line = text[: text.index(piece)].count("\n")
        exec(compile("\n" * line + piece, str(PAGE), "exec"), names)  # a failure names the page's own line
    said = capsys.readouterr().out
    assert "model.layers.0.mlp gated 32 64 ['native', 'custom']" in said
    assert "did you mean 'degree'" in said
    assert (tmp_path / "silu" / "config.json").is_file()
    assert (tmp_path / "explained" / "explanation.html").is_file()
