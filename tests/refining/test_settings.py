"""What can be told, and what is refused."""

import pytest

import surgery
from surgery.errors import RecipeError, SurgeryError
from surgery.refining.settings import RefineSettings, check_refinement
from tests import commands, tiny
from tests.refining.support import settings_of


def test_a_dry_run_writes_nothing(place, tmp_path):
    command = ["refine", place / "native", "--original", place / "llama", "-o",
               tmp_path / "out", "--tokens", "20k", "--window", "32", "--train", "lora", "--dry-run"]  # fmt: skip
    done = commands.surgery(*command)
    assert done.returncode == 0, done.stderr
    assert "156 steps of 128 tokens" in done.stdout
    assert "trained: lora" in done.stdout
    assert not any(tmp_path.iterdir())


def test_what_is_refused(place, tmp_path):
    for more, words in (
        ({"train": "lora", "objective": "local"}, "what is in blocks"),
        ({"text": ("nowhere.txt",)}, "no text source"),
        ({"dtype": "float8"}, "no dtype"),
        ({"train": "all", "objective": "local"}, "what is in blocks"),
        ({"window": 4}, "not from 8 to 128"),
        ({"window": 256}, "not from 8 to 128"),
        ({"text": (str(place / "text.txt"), "elsewhere/text.txt")}, "two sources of one name"),
    ):
        with pytest.raises(RecipeError, match=words):
            check_refinement(settings_of(place, tmp_path / "out", **more))


def test_only_whole_twins_of_causal_models_are_refined(place, tmp_path):
    from surgery.publishing.silu import export_silu

    export_silu(place / "native", tmp_path / "silu")
    settings = vars(settings_of(place, tmp_path / "out"))
    with pytest.raises(RecipeError, match="silu form"):
        check_refinement(RefineSettings(**{**settings, "twin": str(tmp_path / "silu")}))
    tiny.save_with_tokenizer("bert", tmp_path / "bert")
    surgery.convert(tmp_path / "bert", output=tmp_path / "masked", text="python", tokens=1024, window=32, measure=0)
    with pytest.raises(SurgeryError, match="only causal"):
        check_refinement(
            RefineSettings(**{**settings, "twin": str(tmp_path / "masked"), "original": str(tmp_path / "bert")})
        )
