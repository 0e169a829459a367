"""Text files as people have them."""

import gzip
import json

import pytest
import torch

from surgery.calibration import text_files
from surgery.calibration.text_files import Unfinished, file_texts
from surgery.calibration.texts import tokens_of
from surgery.errors import CalibrationError
from tests.calibration.support import Characters

SEPARATORS = "one\u2028two\u0085three\x0bfour\x1cfive\u2029six"
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


def lines(*records):
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


def read(path, content, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    return list(file_texts(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines({"text": SEPARATORS}, {"text": "b"})),
        ("a.ndjson", lines({"text": SEPARATORS}, {"text": "b"})),
        ("a.jsonl", lines({"text": SEPARATORS}, {"text": "b"}).replace("\n", "\r\n\r\n")),
        ("a.jsonl", lines(SEPARATORS, "", {"text": " "}, "b", "")),
        ("a.json", json.dumps([{"text": SEPARATORS}, "b"])),
        ("a.json", json.dumps([{"text": SEPARATORS}, {"text": "b"}], indent=2)),
        ("a.json", lines({"text": SEPARATORS}, {"text": "b"})),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_records_of_json_in_every_shape_and_encoding(name, content, encoding, tmp_path):
    assert read(tmp_path / name, content, encoding) == [SEPARATORS, "b"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a"])
def test_any_other_file_is_one_text(name, tmp_path):
    assert read(tmp_path / name, "[1]\n" + SEPARATORS, "utf-8-sig") == ["[1]\n" + SEPARATORS]
    assert read(tmp_path / name, " \n") == []


@pytest.mark.parametrize("ending", [1, 55])
def test_plain_text_of_any_length_is_one_document_read_in_parts(ending, tmp_path, monkeypatch):
    content = "".join(f"line {number}\n" for number in range(300)) + "x" * 250 + " " * 150 + "\n" * ending
    path = tmp_path / "a.txt"
    path.write_text(content)
    (whole,) = file_texts(path)
    ids = tokens_of(str(path), Characters(), 10_000)
    monkeypatch.setattr(text_files, "TOGETHER", 100)
    parts = list(file_texts(path))
    assert "".join(parts) == whole == content
    assert max(map(len, parts)) == 100, "no more of it is read at once"
    assert [isinstance(part, Unfinished) for part in parts] == [True] * (len(parts) - 1) + [False]
    assert torch.equal(tokens_of(str(path), Characters(), 10_000), ids), "it is closed once"


def test_gzipped_files_are_read_as_what_they_hold(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines({"text": "a"}, {"text": "b"}).encode()))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a\nb"))
    assert list(file_texts(tmp_path / "a.jsonl.gz")) == ["a", "b"]
    assert list(file_texts(tmp_path / "a.txt.gz")) == ["a\nb"]
    (tmp_path / "b.txt.gz").write_bytes(b"no gzip")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"abc" * 1000)[:-12])
    for name in ("b.txt.gz", "c.txt.gz"):
        with pytest.raises(CalibrationError, match="cannot be read"):
            list(file_texts(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines({"text": "a"}, {"txt": "a", "id": 1}), r"a\.jsonl:2.*|.*'id', 'txt'"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b', r"not JSON"),
        ("a.jsonl", '{"text": "a"}\n\n[1]', r"a list without"),
        ("a.jsonl", '{"text": 3}', "neither"),
        ("a.jsonl", '{"messages": ["hi"]}', "neither"),
        ("a.jsonl", "[" * 100_000, "not JSON"),
        ("a.json", '{"a": [1, 2}', "not JSON"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.json", '[{"text": "a"}, 3]', "an? int without"),
    ],
)
def test_what_is_not_clear_is_refused_with_its_place(name, content, message, tmp_path):
    with pytest.raises(CalibrationError, match=message) as refused:
        read(tmp_path / name, content)
    number = {"a.jsonl": content.rstrip().count("\n") + 1}.get(name)
    assert str(refused.value.where).startswith(str(tmp_path / name) + (f":{number}" if number else ""))


def test_a_file_of_another_encoding_is_refused(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.json"):
        with pytest.raises(CalibrationError, match="UTF-8"):
            read(tmp_path / name, '{"text": "\xe9\xe8"}', "latin-1")


def test_chat_messages_go_through_the_chat_template(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(CHAT, {"text": "c"}))
    assert list(file_texts(path)) == ["hi\n\nho", "c"]

    class Chatting(Characters):
        chat_template = "…"

        def apply_chat_template(self, messages, tokenize):
            assert tokenize is False
            if len(messages) < 2:
                raise ValueError("roles must alternate\nmore")
            return "".join(f"<{part['role'][0]}>{part['content']}" for part in messages)

    tokenizer = Chatting()
    expected = [*tokenizer("<u>hi<a>ho")["input_ids"], 2, *tokenizer("c")["input_ids"], 2]
    assert tokens_of(str(path), tokenizer, 100).tolist() == expected
    with pytest.raises(CalibrationError, match="no chat template"):
        tokens_of(str(path), Characters(), 100)
    path.write_text(lines(CHAT, {"messages": CHAT["messages"][:1]}))
    with pytest.raises(CalibrationError, match=r"roles must alternate$") as refused:
        tokens_of(str(path), tokenizer, 100)
    assert refused.value.where == f"{path}:2"
