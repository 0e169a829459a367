"""Kinds of text, seen and unseen."""

import json
import shutil

import pytest
import torch

import surgery
from evals.kinds import compare_kinds, over_unseen, unseen_by_all
from evals.kinds_report import JSON, PLOT, write_kinds
from evals.pair import load_pair
from evals.settings import parse_kinds
from evals.uncertainty import mean_of
from surgery.errors import EvaluationError, RecipeError
from surgery.saving.evaluation import kind_rows, unseen_line
from tests import tiny

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "off", "to", "sea", "where", "ships", "go", "by")


def text(seed, words=4000):
    draw = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[n] for n in torch.randint(len(WORDS), (words,), generator=draw).tolist())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Llama, its twin calibrated on one text, and other texts."""
    folder = tmp_path_factory.mktemp("kinds")
    tiny.save_with_tokenizer("llama", folder / "base")
    for number, name in enumerate(("novels", "drama", "verse")):
        (folder / f"{name}.txt").write_text(text(number))
    (folder / "sentences.txt").write_text("\n".join(text(number, 6) + "." for number in range(40)))
    surgery.convert(
        folder / "base",
        output=folder / "twin",
        text=str(folder / "novels.txt"),
        tokens=2048,
        window=32,
        measure=0,
    )  # fmt: skip
    return folder


def compared(place, *texts, twin=None, original=None, **more):
    settings = {"tokens": 512, "window": 32} | more
    twin, original = str(twin or place / "twin"), str(original or place / "base")
    return compare_kinds(load_pair(twin, original), twin, dict(parse_kinds(texts)), **settings)


def test_what_was_calibrated_on_is_seen_and_its_kind_too(place):
    found = compared(
        place,
        f"novels={place}/novels.txt",
        f"novel={place}/verse.txt",
        f"drama={place}/drama.txt",
        f"sentences=lines:{place}/sentences.txt",
    )
    assert {row["kind"]: row["seen"] for row in found["kinds"]} == {
        "novels": "text", "novel": "kind", "drama": "no", "sentences": "no"
    }  # fmt: skip
    told = compared(place, f"drama={place}/drama.txt", seen=["drama"])
    assert (told["kinds"][0]["seen"], told["unseen"]) == ("kind", None), "what the record cannot tell"
    with pytest.raises(RecipeError, match="no kind 'verse'"):
        compared(place, f"drama={place}/drama.txt", seen=["verse"])
    unseen = [row["nats_lost"]["value"] for row in found["kinds"] if row["seen"] == "no"]
    assert found["unseen"]["kinds"] == 2
    assert found["unseen"]["mean"]["value"] == pytest.approx(sum(unseen) / 2)
    assert found["unseen"]["worst"]["value"] == max(unseen)
    for row in found["kinds"]:
        difference = row["nats"]["twin"]["value"] - row["nats"]["original"]["value"]
        assert row["nats_lost"]["value"] == pytest.approx(difference, abs=1e-6)
        assert row["nats_lost"]["low"] <= row["nats_lost"]["value"] <= row["nats_lost"]["high"]


def test_a_refinement_has_seen_its_texts(place, tmp_path):
    surgery.refine(
        place / "twin", place / "base", tmp_path / "refined", text=str(place / "drama.txt"), tokens=2048, window=32,
        validate_tokens=256,
    )  # fmt: skip
    found = compared(place, f"drama={place}/drama.txt", twin=tmp_path / "refined", tokens=128)
    assert found["kinds"][0]["seen"] == "text"
    assert found["unseen"] is None
    assert "every kind" in unseen_line(found)


def test_the_original_against_itself_loses_nothing(place, tmp_path):
    (tmp_path / "same").mkdir()
    for file in (place / "base").iterdir():
        (tmp_path / "same" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "same" / "surgery.json").write_bytes((place / "twin" / "surgery.json").read_bytes())
    found = compared(place, f"drama={place}/drama.txt", twin=tmp_path / "same", tokens=256)
    assert found["unseen"]["worst"]["value"] == 0
    assert found["kinds"][0]["divergence"]["value"] == pytest.approx(0, abs=1e-6)


def test_short_lines_are_measured_each_by_itself(place):
    (row,) = compared(place, f"sentences=lines:{place}/sentences.txt", tokens=10_000)["kinds"]
    from surgery.models import loading

    tokenizer = loading.loaded(str(place / "base")).tokenizer
    lines = (place / "sentences.txt").read_text().splitlines()
    assert row["tokens"] == sum(len(tokenizer(line, add_special_tokens=False)["input_ids"]) for line in lines)


def test_paragraphs_become_turns_of_a_dialogue(place, tmp_path):
    (tmp_path / "turns.txt").write_text("\n\n".join(text(number, 20) for number in range(40)))
    (row,) = compared(place, f"dialogue=chat:{tmp_path}/turns.txt")["kinds"]
    assert row["tokens"] == 496, "the first of every window is not predicted"
    (tmp_path / "turns.txt").write_text("no paragraph is long enough\n\n" * 40)
    with pytest.raises(EvaluationError, match="0 tokens are fewer"):
        compared(place, f"dialogue=chat:{tmp_path}/turns.txt")


def test_a_dialogue_needs_a_chat_template(place, tmp_path):
    for name in ("base", "twin"):
        shutil.copytree(place / name, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").unlink()
    with pytest.raises(EvaluationError, match="no chat template"):
        compared(tmp_path, f"dialogue=chat:{place}/drama.txt")


@pytest.mark.parametrize("texts", [["alice.txt"], ["=alice.txt"], ["novel="], ["novel=a.txt", "novel=b.txt"]])
def test_texts_come_with_their_kind_once(texts):
    with pytest.raises(RecipeError):
        parse_kinds(texts)


def test_what_is_written_is_read_by_people_and_programs(place, tmp_path):
    found = compared(place, f"drama={place}/drama.txt", f"verse={place}/verse.txt")
    written = write_kinds(found, tmp_path / "report")
    assert [file.name for file in written] == [JSON, PLOT]
    assert json.loads(written[0].read_text()) == found
    assert written[1].read_bytes().startswith(b"\x89PNG")
    assert [row[0] for row in kind_rows(found)] == ["drama", "verse"]
    assert f"{found['unseen']['worst']['value']:+.3f}" in unseen_line(found)


def test_the_mean_of_independent_intervals_is_narrower_than_each():
    parts = [{"value": 1.0, "low": 0.7, "high": 1.4}, {"value": 3.0, "low": 2.6, "high": 3.3}]
    mean = mean_of(parts)
    assert (mean.value, mean.low, mean.high) == pytest.approx((2.0, 1.75, 2.25))
    assert mean_of([*parts, {"value": 2.0, "low": None, "high": None}]).low is None


def test_twins_are_compared_on_what_none_of_them_has_seen():
    def found(**seen):
        lost = {"value": 1.0, "low": 0.5, "high": 1.5}
        return {"kinds": [{"kind": k, "seen": s, "nats_lost": lost, "divergence": lost} for k, s in seen.items()]}

    one, two = found(drama="no", novel="no", code="text"), found(drama="no", novel="kind", code="no")
    assert unseen_by_all([one, two]) == {"drama"}
    assert unseen_by_all([one]) == {"drama", "novel"}
    assert over_unseen(one["kinds"])["kinds"] == 2
    assert over_unseen(one["kinds"], {"drama"})["kinds"] == 1
    assert over_unseen(one["kinds"], set()) is None


def test_what_another_twin_has_seen_is_passed_over(place, tmp_path):
    """The first twin was calibrated on one text, the second on another: both are measured on what neither has read."""
    surgery.convert(
        place / "base", output=tmp_path / "other", text=str(place / "drama.txt"), tokens=2048, window=32, measure=0
    )
    kinds = (f"novels={place}/novels.txt", f"drama={place}/drama.txt")
    both = [
        compared(place, *kinds, twin=one, unseen_by=[str(two)], tokens=128)["kinds"]
        for one, two in ((place / "twin", tmp_path / "other"), (tmp_path / "other", place / "twin"))
    ]
    alone = compared(place, *kinds, tokens=128)["kinds"]
    assert [row["fingerprint"] for row in both[0]] == [row["fingerprint"] for row in both[1]]
    assert [one["fingerprint"] == two["fingerprint"] for one, two in zip(both[0], alone, strict=True)] == [True, False]
