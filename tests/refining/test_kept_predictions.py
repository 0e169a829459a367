"""The original's predictions on disk: what they are worth as a loss, and that nobody is asked twice."""

import errno
import os

import pytest
import torch

import surgery
from surgery.errors import CheckpointError, RecipeError
from surgery.refining.kept_predictions import KeptPredictions, Likeliest
from surgery.refining.losses import kl
from surgery.refining.packing import PackedWindows
from surgery.refining.run import refined
from surgery.refining.settings import check_refinement
from tests import commands
from tests.refining.support import interrupted, settings_of

WORDS = 11


def asked_for(monkeypatch):
    """Grows with every batch whose predictions are not known."""
    asked = []
    monkeypatch.setattr(Likeliest, "of", staticmethod(lambda *given, of=Likeliest.of: asked.append(1) or of(*given)))
    return asked


def short_text(place):
    (place / "short.txt").write_text((place / "text.txt").read_text()[:8000])
    return str(place / "short.txt")


def logits(seed, windows=2):
    return 3 * torch.randn(windows, 5, WORDS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("count", [1, 4, WORDS])
def test_the_loss_and_its_gradient_are_those_of_the_words_kept_and_the_rest(count, temperature):
    goal, found = logits(0), logits(1).requires_grad_()
    likeliest = Likeliest.of(goal, count, temperature)
    kl(likeliest.completed(found, temperature), found, temperature).backward()
    again = found.detach().double().requires_grad_()
    p, q = ((part.double() / temperature).softmax(-1) for part in (goal, again))
    kept_p, kept_q = (part.gather(-1, goal.topk(count).indices) for part in (p, q))
    loss = (kept_p * (kept_p / kept_q).log()).sum(-1)
    if count < WORDS:
        rest_p, rest_q = (1 - part.sum(-1) for part in (kept_p, kept_q))
        loss = loss + rest_p * (rest_p / rest_q).log()
    expected = temperature**2 * loss.mean()
    expected.backward()
    found_loss = kl(likeliest.completed(found, temperature), found, temperature)
    assert found_loss.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(found.grad, again.grad.float(), rtol=1e-3, atol=1e-6)
    whole = kl(goal, found, temperature)
    assert found_loss.item() == pytest.approx(whole.item(), rel=1e-4) if count == WORDS else found_loss < whole


@pytest.mark.parametrize("sure", [5.0, 20.0, 60.0])
def test_a_twin_that_is_sure_leaves_the_rest_its_probability(sure):
    goal, found = logits(0), logits(1)
    found[..., 3] += sure
    likeliest = Likeliest.of(goal, 4, 1.0)
    completed = likeliest.completed(found, 1.0)
    torch.testing.assert_close(completed.softmax(-1).gather(-1, likeliest.words), likeliest.log_p.exp())
    others = torch.ones_like(goal).scatter(-1, likeliest.words, 0).bool()
    one, two = (part[others].view(2, 5, -1).log_softmax(-1) for part in (completed, found))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 3])
def test_words_that_a_model_never_says_are_kept_too(tmp_path, batch):
    goal = logits(0, batch)
    goal[..., 5:] = torch.finfo(torch.float32).min
    windows = PackedWindows(torch.arange(5 * batch, dtype=torch.int32).view(batch, 5), None)
    likeliest = KeptPredictions(tmp_path, "run", windows, 8)(torch.arange(batch), lambda: goal)
    found = logits(1, batch)
    loss = kl(likeliest.completed(found, 1.0), found)
    assert loss.item() == pytest.approx(kl(goal, found).item(), rel=1e-2)


def test_equal_windows_are_asked_for_once_and_a_later_run_finds_them(tmp_path):
    ids = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [1, 2, 3, 4, 5]], dtype=torch.int32)
    places = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2], [0, 1, 2, 3, 4]], dtype=torch.int32)
    asked = []

    def predictions(kept, *numbers):
        def given():
            asked.append(numbers)
            return logits(7)[: len(numbers)]

        return kept(torch.tensor(numbers), given)

    kept = KeptPredictions(tmp_path / "state", "run", PackedWindows(ids, places), 3)
    assert kept.distinct == 2
    first = predictions(kept, 0, 1)
    assert torch.equal(first.words, logits(7).topk(3, sorted=False).indices)
    second = predictions(KeptPredictions(tmp_path / "state", "run", PackedWindows(ids, places), 3), 1, 2)
    assert asked == [(0, 1)]
    assert torch.equal(second.words, first.words.flip(0))
    assert torch.equal(second.log_p, first.log_p.flip(0))
    predictions(KeptPredictions(tmp_path / "state", "another run", PackedWindows(ids, places), 3), 1, 2)
    assert asked == [(0, 1), (1, 2)]
    elsewhere = KeptPredictions(tmp_path / "state", "positions", PackedWindows(ids, torch.arange(15).view(3, 5)), 3)
    assert elsewhere.distinct == 3, "the same words at other positions are another window"


def test_refining_asks_the_original_once_a_window(place, tmp_path, monkeypatch):
    passes, how = asked_for(monkeypatch), {"tokens": 8192, "text": (short_text(place),)}
    exact = refined(settings_of(place, tmp_path / "exact", **how))
    assert not passes
    record = refined(settings_of(place, tmp_path / "kept", teacher_top_k=40, **how))
    epochs = record["passes_over_the_text"]
    assert epochs > 3
    assert len(passes) <= len(record["losses"]) / epochs + 3
    assert record["divergence_after"] < 0.9 * record["divergence_before"]
    assert record["divergence_after"] == pytest.approx(exact["divergence_after"], rel=0.05)
    few = refined(settings_of(place, tmp_path / "few", teacher_top_k=2, **how))
    assert few["losses"][0] < record["losses"][0] < exact["losses"][0]
    assert not list(tmp_path.glob("*refining*"))


def test_windows_that_come_once_go_beside_those_that_are_kept(place, tmp_path):
    how = {"tokens": 2048, "text": (short_text(place), "samples"), "validate_tokens": 256}
    exact = refined(settings_of(place, tmp_path / "exact", **how))
    whole = refined(settings_of(place, tmp_path / "whole", teacher_top_k=500, **how))
    assert whole["losses"] == pytest.approx(exact["losses"], rel=1e-2), "all words are kept, as float16"
    few = refined(settings_of(place, tmp_path / "few", teacher_top_k=1, **how))
    assert few["losses"][0] < exact["losses"][0]


def test_a_killed_refinement_goes_on_with_what_it_kept(place, tmp_path, monkeypatch):
    how = {"teacher_top_k": 4, "tokens": 8192, "text": (short_text(place),), "validate_every": 8}
    asked = asked_for(monkeypatch)
    whole = refined(settings_of(place, tmp_path / "whole", **how))
    once = len(asked)
    with interrupted(after=3):  # in the second of more than three passes over the text
        refined(settings_of(place, tmp_path / "resumed", **how))
    del asked[:]
    assert refined(settings_of(place, tmp_path / "resumed", **how))["losses"] == whole["losses"]
    assert len(asked) < once / 4


def test_what_is_refused_and_planned(place, tmp_path, monkeypatch):
    for more in ({"match": 0.5}, {"objective": "local"}):
        with pytest.raises(RecipeError, match="what the original's blocks write"):
            check_refinement(settings_of(place, tmp_path / "out", teacher_top_k=4, **more))
    with pytest.raises(RecipeError, match="below 0"):
        check_refinement(settings_of(place, tmp_path / "out", teacher_top_k=-1))
    command = ["refine", place / "native", "--original", place / "llama", "-o", tmp_path / "out", "--window", "32"]
    done = commands.surgery(*command, "--teacher-top-k", "64", "--dry-run")
    assert "disk: at most 0.36 GiB for the original's predictions" in done.stdout

    done = commands.surgery(*command, "--teacher-top-k", "64", "--dry-run", "--nproc", "2")
    assert done.returncode == 2 and "run one process" in done.stderr

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(CheckpointError, match="the disk is full"):
        surgery.refine(place / "native", place / "llama", tmp_path / "out", teacher_top_k=4, tokens=4096,
                       text=str(place / "text.txt"), window=32, validate_tokens=512)  # fmt: skip
