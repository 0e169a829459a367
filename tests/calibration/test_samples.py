"""The model's own texts."""

import pytest
import torch
from transformers import GenerationConfig

from surgery.calibration.inputs import calibration_inputs
from surgery.calibration.openings import openings
from surgery.calibration.samples import SAMPLED_TOGETHER, knows_english, sample, seed_of
from surgery.errors import CalibrationError
from tests import tiny
from tests.calibration.support import Characters


def test_samples_are_the_models_own_and_follow_the_seed():
    model = tiny.make("llama")
    state = torch.get_rng_state()
    one = sample(model, Characters(), 4, 10, seed=1)
    assert torch.equal(torch.get_rng_state(), state), "what else is drawn at random goes on as it was"
    assert torch.equal(one, sample(model, Characters(), 4, 10, seed=1))
    assert not torch.equal(one, sample(model, Characters(), 4, 10, seed=2))
    assert one.shape == (4, 10)
    assert (one[:, 0] == 1).all(), "from the start token"
    with pytest.raises(CalibrationError, match="cannot generate"):
        sample(tiny.make("bert"), Characters(), 4, 10, seed=0)


def test_every_other_sample_goes_on_from_an_opening_that_the_tokenizer_knows():
    model = tiny.make("llama")
    begun = openings(Characters())
    length = len(begun[0])
    assert all(len(row) == length for row in begun) and len({tuple(row) for row in begun}) > 40
    drawn = sample(model, Characters(), 9, length + 6, seed=0)
    opened = [row[1 : 1 + length].tolist() in begun for row in drawn]
    assert sum(opened) == 4
    assert not any(opened[:2]) and all(opened[2:4]), "two of each in turn: both begin in every way windows begin"
    later = sample(model, Characters(), 4, length + 6, seed=0, after=10)
    assert [begun.index(row[1 : 1 + length].tolist()) for row in later[2:]] == [5, 6], "the openings that follow"
    short = sample(model, Characters(), 8, length, seed=0)
    assert not any(row[1:].tolist() in [known[: length - 1] for known in begun] for row in short), "no room to go on"

    class Residues(Characters):
        unk_token_id = 3 + ord(" ") % 93

    assert not knows_english(Residues()) and knows_english(Characters())
    drawn = sample(model, Residues(), 8, length + 6, seed=0)
    assert not any(row[1 : 1 + length].tolist() in begun for row in drawn)


SETTINGS = (
    {"repetition_penalty": 5.0},
    {"min_p": 0.5},
    {"typical_p": 0.2},
    {"epsilon_cutoff": 0.01},
    {"eta_cutoff": 0.02},
    {"top_h": 0.2},
    {"no_repeat_ngram_size": 1},
    {"encoder_repetition_penalty": 3.0},
    {"bad_words_ids": [[5], [6], [7]]},
    {"suppress_tokens": [5, 6, 7]},
    {"begin_suppress_tokens": [5, 6, 7]},
    {"sequence_bias": [[[5], 50.0]]},
    {"forced_eos_token_id": 2},
    {"exponential_decay_length_penalty": (1, 5.0)},
    {"guidance_scale": 3.0},
    {"num_beams": 3},
    {"do_sample": True, "num_return_sequences": 2},
    {"max_length": 3},
    {"max_time": 1e-9},
    {"stop_strings": ["a"]},
    {"return_dict_in_generate": True, "output_scores": True},
    {"renormalize_logits": True, "remove_invalid_values": True},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 3},
    {"watermarking_config": {"greenlist_ratio": 0.1, "bias": 50.0}},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_samples_are_drawn_from_the_model_whatever_generation_settings_are_saved_with_it(settings):
    model = tiny.make("llama")

    def drawn():
        return sample(model, Characters(), 4, 12, seed=1)

    plain = drawn()
    saved = GenerationConfig.from_dict({**model.generation_config.to_dict(), **settings})
    model.generation_config = saved
    assert torch.equal(plain, drawn())
    assert model.generation_config is saved


def test_frozen_weights_are_rounded_once_and_stay_frozen():
    """autocast keeps the rounded copy of a weight that wants a gradient alone."""
    model, seen = tiny.make("llama").requires_grad_(False), []
    generate = model.generate

    def noted(*given, **more):
        seen.append(all(value.requires_grad for value in model.parameters()))
        return generate(*given, **more)

    model.generate = noted
    one = sample(model, Characters(), 4, 10, seed=1, products="bfloat16")
    assert seen == [True] and not any(value.requires_grad for value in model.parameters())
    assert not one.requires_grad
    sample(model, Characters(), 4, 10, seed=1, products="float32")
    assert seen == [True, False]


def test_every_purpose_has_texts_of_its_own():
    model = tiny.make("llama")
    data = calibration_inputs("samples", model, Characters(), tokens=32768, length=128, batch=4, short=0.5)
    long, short = (torch.cat([part["input_ids"] for part in data.batches if part["input_ids"].shape[1] == length])
                   for length in (128, 64))  # fmt: skip
    assert len(long) == len(short) / 2 == 2 * SAMPLED_TOGETHER, "as many are drawn together of both"
    first = 1 + len(openings(Characters())[0])
    written = {tuple(row[first + more : first + more + 10].tolist()) for row in long for more in (0, 1)}
    assert not written & {tuple(row[first : first + 10].tolist()) for row in short}
    assert len({seed_of(seed, purpose) for seed in (0, 1) for purpose in ("short", "held out")}) == 4


def test_samples_never_leave_the_models_positions():
    model = tiny.make("gpt2")
    data = calibration_inputs("samples", model, Characters(), tokens=1024, length=128, batch=4, short=0.5)
    assert data.length == model.config.n_positions == 128
