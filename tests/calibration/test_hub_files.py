"""Files of Hub datasets, and the mixture made of them, against a server that speaks the Hub's protocol."""

import gzip
import json
import os

import pytest

from surgery.calibration import hub_files
from surgery.calibration.automatic import automatic, available
from surgery.calibration.common_pile import PARTS, SOURCES
from surgery.calibration.inputs import calibration_inputs
from surgery.calibration.mixtures import Mixture
from surgery.calibration.texts import documents
from surgery.errors import CalibrationError
from tests import tiny
from tests.calibration.support import MODEL, Characters
from tests.commands import process
from tests.hub_server import Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server in the place of the Hub, and an empty cache."""
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()


def put(hub, source, texts, packed=gzip.compress):
    found = hub_files.NAME.fullmatch(source)
    content = packed("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode())
    trees = hub.repositories.setdefault(f"datasets/{found['repo']}", {"main": {}})
    trees.setdefault(found["commit"], {})[found["file"]] = content
    return content


SOURCE = f"hub:someone/texts@{'ab' * 20}/texts-0000.json.gz"


def test_the_texts_of_a_file_come_line_by_line_and_only_as_far_as_they_are_read(hub, monkeypatch):
    monkeypatch.setattr(hub_files, "PIECE", 4096)
    texts = [f"{number} " + "".join(chr(33 + number * n % 90) for n in range(900)) for number in range(200)]
    content = put(hub, SOURCE, texts)
    read = documents(SOURCE)
    assert [next(read) for _ in range(3)] == texts[:3]
    fetched = len([line for line in hub.log if "resolve" in line])
    assert fetched == 1 < len(content) / 4096
    assert list(documents(SOURCE)) == texts
    hub.log.clear()
    assert list(documents(SOURCE)) == texts
    assert not hub.log, "what was fetched is kept"


def test_long_documents_are_cut_and_empty_ones_passed_over(hub, monkeypatch):
    monkeypatch.setattr(hub_files, "LONGEST", 10)
    put(hub, SOURCE, ["x" * 30, " ", "short"])
    assert list(documents(SOURCE)) == ["x" * 10, "short"]


def test_several_gzip_members_and_plain_files_are_read(hub):
    put(hub, SOURCE, ["one", "two"], packed=lambda text: b"".join(map(gzip.compress, text.splitlines(True))))
    assert list(documents(SOURCE)) == ["one", "two"]
    many = SOURCE.replace("0000", "0001")
    put(hub, many, map(str, range(3000)), packed=lambda text: b"".join(map(gzip.compress, text.splitlines(True))))
    assert len(list(documents(many))) == 3000
    plain = SOURCE.removesuffix(".gz")
    put(hub, plain, ["one", "two"], packed=bytes)
    assert list(documents(plain)) == ["one", "two"]


@pytest.mark.parametrize(
    ("packed", "words"), [(bytes, "not what its name says"), (lambda _: gzip.compress(b"[1]\n"), 'without a "text"')]
)
def test_a_file_of_another_kind_is_a_clear_error(packed, words, hub):
    put(hub, SOURCE, ["one"], packed=packed)
    with pytest.raises(CalibrationError, match=words):
        list(documents(SOURCE))


def test_a_file_that_is_not_there_is_a_clear_error_and_leaves_nothing(hub):
    with pytest.raises(CalibrationError, match="could not be fetched"):
        list(documents(SOURCE))
    assert not hub_files.cache_of(SOURCE).exists() or not any(hub_files.cache_of(SOURCE).iterdir())


def test_broad_is_what_is_taken_where_it_can_be_had(hub):
    for source in PARTS:
        put(hub, source, ["some text " * 50])
    assert automatic(Characters(), generates=True) == ("broad", "")
    mixture = Mixture.of("broad")
    assert available(mixture) == (mixture, "")


def test_a_part_that_is_missing_is_left_out_and_named(hub):
    for source in PARTS:
        if source != SOURCES["recipes"]:
            put(hub, source, ["some text " * 50])
    mixture, note = available(Mixture.of("broad"))
    assert len(mixture.parts) == len(PARTS) - 1
    assert sum(part.share for part in mixture.parts) == pytest.approx(1)
    assert "foodista" in note


def test_without_a_network_there_are_samples_and_a_plain_word(hub):
    source, note = automatic(Characters(), generates=True)
    assert source == "samples"
    assert "could not be fetched" in note and "--text" in note
    assert automatic(Characters(), generates=False)[0] == "python"
    with pytest.raises(CalibrationError, match="of broad cannot be fetched"):
        available(Mixture.of("broad"))


def test_a_tokenizer_that_does_not_know_english_is_not_given_any(hub):
    class Residues(Characters):
        unk_token_id = 7

        def __call__(self, text, **_):
            return {"input_ids": [7] * len(text)}

    for source in PARTS:
        put(hub, source, ["some text " * 50])
    assert automatic(Residues(), generates=True) == ("samples", "")


def test_small_parts_of_broad_are_left_out_where_there_are_few_tokens(hub):
    for source in PARTS:
        put(hub, source, ["some text of this kind " * 50] * 40)
    settings = {"length": 64, "batch": 4, "short": 0.0}
    few = calibration_inputs("broad", MODEL, Characters(), tokens=1024, **settings)
    assert len(few.parts) < len(PARTS)
    assert f"{len(PARTS) - len(few.parts)} of {len(PARTS)} sources left out" in few.note
    enough = calibration_inputs("broad", MODEL, Characters(), tokens=8192, **settings)
    assert (len(enough.parts), enough.note) == (len(PARTS), "")
    assert enough.parts[0]["source"] == next(iter(PARTS)), "with its commit"


def test_a_conversion_fetches_broad_text_once_and_needs_no_network_again(hub, tmp_path):
    tiny.save_with_tokenizer("llama", tmp_path / "base")
    for number, source in enumerate(PARTS):
        put(hub, source, [f"kind {number} of text, page {page}. " * 20 for page in range(60)])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    online = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    command = ["convert", tmp_path / "base", "--tokens", 8192, "--window", 32, "--measure", 512]
    done = process(*command, "-o", tmp_path / "one", env=kept | online)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "one" / "surgery.json").read_text())
    assert report["recipe"]["text"] == report["calibration"]["source"] == "broad"
    assert [part["source"] for part in report["calibration"]["parts"]] == list(PARTS)
    assert report["calibration"]["note"] == ""
    fetched = [line for line in hub.log if "resolve" in line]
    assert len(fetched) == len(PARTS)
    hub.shutdown()
    hub.server_close()
    again = process(*command, "-o", tmp_path / "two", env=kept | online)
    assert again.returncode == 0, again.stderr
    other = json.loads((tmp_path / "two" / "surgery.json").read_text())
    assert other["calibration"]["fingerprint"] == report["calibration"]["fingerprint"]
