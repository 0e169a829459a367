"""Dictionaries that the tests of reading share, written as SAELens writes them."""

import json

import torch
from safetensors.torch import save_file

LEN6 = {"sae_lens_version": "6.54.12"}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(folder, tensors, **config):
    """A folder of SAELens; returns its path as text."""
    folder.mkdir(parents=True, exist_ok=True)
    n, d = tensors["W_dec"].shape
    known = {"architecture": "standard", "d_in": d, "d_sae": n, "apply_b_dec_to_input": True, "dtype": "float32"}
    known |= {"normalize_activations": "none", "reshape_activations": "none", "device": "cpu", "metadata": LEN6}
    (folder / "cfg.json").write_text(json.dumps(known | config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    return str(folder)


def random_dictionary(d=8, n=20, seed=0, **more):
    tensors = {"W_enc": draw(d, n, seed=seed), "b_enc": draw(n, seed=seed + 1), "W_dec": draw(n, d, seed=seed + 2)}
    return tensors | {"b_dec": draw(d, seed=seed + 3)} | more


def exact(basis, offset=None):
    """±b for every row b of an orthogonal matrix: what is encoded comes back exactly. Feature i is +b_i, d + i −b_i."""
    both = torch.cat([basis, -basis]).float()
    d = basis.shape[1]
    zero = torch.zeros(d) if offset is None else offset.float()
    return {"W_enc": both.T, "b_enc": torch.zeros(len(both)), "W_dec": both, "b_dec": zero}


def orthogonal(d, seed=0, first=None):
    """A random orthogonal matrix, (d, d); its first row along `first`."""
    found = draw(d, d, seed=seed).double()
    if first is not None:
        found[0] = first.double()
    q, r = torch.linalg.qr(found.T)
    return (q * r.diag().sign()).T
