"""Dictionaries from their files: each kind does what its formula says, and what is none is refused."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from surgery.errors import RecipeError
from surgery.reading import dictionary
from surgery.reading.dictionary import explained_share, read_dictionary
from tests.reading.dictionaries import draw, exact, orthogonal, random_dictionary, write

N = 20
KINDS = {
    "standard": ({}, {}),
    "topk": ({}, {"k": 3}),
    "topk rescaled": ({}, {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}),
    "abstopk": ({}, {"k": 3}),
    "jumprelu": ({"threshold": draw(N, seed=9).abs()}, {}),
    "gated": ({"b_gate": draw(N, seed=7), "r_mag": draw(N, seed=8) / 4, "b_mag": draw(N, seed=9)}, {}),
    "layer_norm": ({}, {"architecture": "standard", "normalize_activations": "layer_norm"}),
    "constant_norm_rescale": ({}, {"architecture": "standard", "normalize_activations": "constant_norm_rescale"}),
    "uncentred": ({}, {"architecture": "standard", "apply_b_dec_to_input": False}),
    "transcoder": ({}, {"apply_b_dec_to_input": False, "d_out": 8}),
}


def dense(found, x):
    """Activations of all features, (tokens, n)."""
    return found.encode(x).activations.columns(torch.arange(found.size))


def folder_of(kind, place):
    more, config = KINDS[kind]
    tensors = random_dictionary(**more)
    if kind == "gated":
        del tensors["b_enc"]
    return write(place / kind, tensors, **{"architecture": kind} | config), tensors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="needs SAELens: make tools")
def test_saelens_says_the_same(kind, tmp_path):
    from sae_lens import SAE

    folder, _ = folder_of(kind, tmp_path)
    x = 3 * draw(50, 8, seed=11)
    theirs, ours = SAE.load_from_disk(folder), read_dictionary(folder)
    encoded = ours.encode(x)
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(encoded, x), theirs(x), rtol=1e-4, atol=1e-5)
        assert ((theirs.encode(x) != 0) == (dense(ours, x) != 0)).all()


def test_each_kind_does_what_its_formula_says(tmp_path):
    x = 3 * draw(40, 8, seed=11)
    folder, t = folder_of("topk", tmp_path)
    z = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    largest = z >= z.sort(-1, descending=True).values[:, 2:3]
    torch.testing.assert_close(dense(read_dictionary(folder), x), z.relu() * largest)
    folder, t = folder_of("jumprelu", tmp_path)
    torch.testing.assert_close(dense(read_dictionary(folder), x), z.relu() * (z > t["threshold"]))
    folder, t = folder_of("gated", tmp_path)
    inner = (x - t["b_dec"]) @ t["W_enc"]
    wanted = (inner * t["r_mag"].exp() + t["b_mag"]).relu() * (inner + t["b_gate"] > 0)
    torch.testing.assert_close(dense(read_dictionary(folder), x), wanted)
    folder, _ = folder_of("layer_norm", tmp_path)
    found, scaled = read_dictionary(folder), 5 * x + 3
    once, more = (found.decode(found.encode(rows), rows) for rows in (x, scaled))
    torch.testing.assert_close(more, 5 * once + 3, rtol=1e-3, atol=1e-3)


def test_chunks_change_nothing(tmp_path, monkeypatch):
    found = read_dictionary(folder_of("topk", tmp_path)[0])
    x = draw(10, 8, seed=4)
    whole, shift = dense(found, x), found.encode(x).shift
    monkeypatch.setattr(dictionary, "CHUNK", 3)
    torch.testing.assert_close(dense(found, x), whole)
    torch.testing.assert_close(found.encode(x).shift, shift)
    torch.testing.assert_close(found.reconstructed(x), found.decode(found.encode(x), x))


def test_an_exact_dictionary_explains_everything_and_a_random_one_nothing(tmp_path):
    x = draw(200, 8, seed=1) + 2
    for tensors, low, high in ((exact(orthogonal(8), draw(8)), 1 - 1e-6, 1 + 1e-6), (random_dictionary(), -1e6, 0)):
        found = read_dictionary(write(tmp_path / str(high), tensors))
        assert low <= explained_share(x, found.decode(found.encode(x), x)) <= high


def test_other_files_hold_the_same(tmp_path):
    tensors, x = random_dictionary(), draw(30, 8, seed=2)
    lens = dense(read_dictionary(write(tmp_path / "lens", tensors, architecture="topk", k=4)), x)
    old = write(tmp_path / "old", tensors)
    (tmp_path / "old" / "cfg.json").write_text(
        json.dumps({"d_in": 8, "d_sae": N, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}})
    )
    torch.testing.assert_close(dense(read_dictionary(old), x), lens)
    (tmp_path / "sparsify").mkdir()
    (tmp_path / "sparsify" / "cfg.json").write_text(json.dumps({"activation": "topk", "k": 4, "d_in": 8}))
    named = {"encoder.weight": tensors["W_enc"].T.contiguous(), "encoder.bias": tensors["b_enc"]}
    save_file(named | {key: tensors[key] for key in ("W_dec", "b_dec")}, tmp_path / "sparsify" / "sae.safetensors")
    torch.testing.assert_close(dense(read_dictionary(tmp_path / "sparsify"), x), lens)
    plain = dense(read_dictionary(write(tmp_path / "relu", tensors)), x)
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "plain.safetensors")
    torch.testing.assert_close(dense(read_dictionary(tmp_path / "plain.safetensors"), x), plain)
    threshold = draw(N, seed=9).abs()
    np.savez(tmp_path / "params.npz", **{key: value.numpy() for key, value in tensors.items()}, threshold=threshold)
    z = x @ tensors["W_enc"] + tensors["b_enc"]  # Gemma Scope's: b_dec is not taken away first
    found = dense(read_dictionary(tmp_path / "params.npz"), x)
    torch.testing.assert_close(found, z.relu() * (z > threshold))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda place: (place / "cfg.json").unlink(), "no dictionary here"),
        (lambda place: (place / "sae_weights.safetensors").unlink(), "no dictionary here"),
        (lambda place: (place / "cfg.json").write_text("{"), "cannot be read"),
        (lambda place: (place / "sae_weights.safetensors").write_text("?"), "cannot be read"),
        (lambda place: write(place, random_dictionary(), architecture="temporal"), "unknown kind, 'temporal'"),
        (lambda place: write(place, random_dictionary(), architecture="topk"), "does not say its k"),
        (lambda place: write(place, random_dictionary(), architecture="jumprelu"), "without threshold"),
        (lambda place: write(place, random_dictionary(), normalize_activations="odd"), "'odd' is unknown"),
        (lambda place: write(place, random_dictionary(b_enc=draw(3))), "do not fit together"),
        (lambda place: write(place, random_dictionary(b_dec=torch.full((8,), torch.nan))), "not finite"),
    ],
)
def test_what_is_no_dictionary_is_refused(spoil, words, tmp_path):
    write(tmp_path / "one", random_dictionary())
    spoil(tmp_path / "one")
    with pytest.raises(RecipeError, match=words):
        read_dictionary(tmp_path / "one")


def test_a_folder_of_several_names_them(tmp_path):
    write(tmp_path / "layer_3", random_dictionary())
    with pytest.raises(RecipeError, match=r"holds several, layer_3[\s\S]*name one of them"):
        read_dictionary(tmp_path)
