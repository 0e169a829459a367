"""A twin's blocks as an encrypted evaluation needs them: scaled weights, CKKS parameters, ranges on unseen text.

Attention and norms are not polynomials and stay with the client, who sends every block an encrypted input and decrypts
what it writes. One block is evaluated so before the export is believed, where TenSEAL is installed.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from surgery.calibration.texts import check_source, label, special_tokens, tokens_of
from surgery.calibration.windows import sequences
from surgery.errors import ModelError
from surgery.models import loading
from surgery.models.saved_blocks import SavedBlock, twin_blocks
from surgery.publishing.ckks import Client, Parameters, Server
from surgery.publishing.scaled_block import (
    DEPTH,
    Excess,
    Product,
    Ranges,
    ScaledBlock,
    entering,
    excess,
    largest_values,
)
from surgery.runtime.files import write_json
from surgery.saving.folder import check_target, whole_folder
from surgery.saving.report import read_verified_report, write_report

WEIGHTS, ABOUT = "blocks.safetensors", "encrypted.json"
TEXT, TOKENS, WINDOW, BATCH = "python", 8192, 256, 8
TOLERANCE = 1e-3  # relative norm of the encrypted output's error
PLAIN_TOLERANCE = 1e-5  # of the scaled block's in float32


def export_encrypted(
    folder: Path,
    out: Path,
    overwrite: bool = False,
    text: str | None = None,
    tokens: int | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Saves `blocks.safetensors` and `encrypted.json`; what the evaluation of one block saw.

    Args:
        text: source that ranges are calibrated on (`tokens` of it) and tested on (as many after them); python's manual
            by default.
        tokens: 8,192 by default.
    Raises:
        SurgeryError: no such text, or too little of it; blocks that are experts or not of degree 2, too wide for one
            ciphertext, or that compute something else when they are encrypted.
    """
    text, tokens = text or TEXT, tokens or TOKENS
    check_source(text)
    report = read_verified_report(folder)
    out = check_target(out, overwrite)
    loaded = loading.loaded(str(folder))
    model: Any = loaded.model
    blocks, products = _products(model)
    widest = max(max(one.gate.weight.shape) for one in products.values())
    parameters = Parameters.of(widest + 1, DEPTH)  # a constant beside the numbers
    if loaded.text_tokenizer is None:
        raise ModelError("the twin has no tokenizer, so no text to measure ranges on", where=str(folder))
    rows = _rows(text, model, loaded.tokenizer, tokens)
    fit, fresh = rows.split(len(rows) // 2)[:2]
    with tqdm(total=2 * len(fit.split(BATCH)), desc="measuring ranges", unit="batch", disable=quiet) as bar:
        ranges = largest_values(model, blocks, products, _counted(fit, bar))
        beyond = excess(model, blocks, products, ranges, _counted(fresh, bar))
    scaled = {path: ScaledBlock.of(product, ranges[path]) for path, product in products.items()}
    worst = max(beyond, key=lambda path: beyond[path].largest)
    seen = _checked(model, blocks, worst, scaled[worst], products[worst], parameters, fresh)
    about = {
        "depth": DEPTH,
        "parameters": parameters.as_dict(),
        "largest_value": parameters.largest,
        "text": label(text),
        "tokens": {"calibrated": fit.numel(), "tested": fresh.numel()},
        "checked": {"block": worst, **seen},
        "blocks": [_row(path, beyond[path], parameters, ranges[path]) for path in products],
    }
    with whole_folder(out) as place:
        named = {name: value for path, one in scaled.items() for name, value in one.tensors(path).items()}
        save_file(named, place / WEIGHTS)
        write_json(place / ABOUT, about)
        model.config.save_pretrained(place)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(place)
        verification = {"verified": True, "form": "encrypted", **seen}
        write_report(place, {**report, "form": "encrypted", "exported_from": folder.name}, verification)
    over = {"values_out": max(one.values_out for one in beyond.values()), "margin": _margin(beyond[worst], parameters)}
    return {"form": "encrypted", "blocks": len(products), "worst": worst, **over, **seen}


def read_block(folder: str | Path, path: str) -> tuple[ScaledBlock, Parameters]:
    """One block of an export, by its path in the model, and the parameters to encrypt with.

    Raises:
        ModelError: not an export of this form, or no such block.
    """
    place = Path(folder)
    if not (place / ABOUT).is_file():
        raise ModelError(
            "no encrypted export", where=str(folder), fix="surgery export TWIN -o OUT --form encrypted writes one"
        )
    given = json.loads((place / ABOUT).read_text(encoding="utf-8"))["parameters"]
    parameters = Parameters(given["degree"], tuple(given["primes"]), given["scale"])
    return ScaledBlock.read(load_file(place / WEIGHTS), path), parameters


def _products(model: Any) -> tuple[list[SavedBlock], dict[str, Product]]:
    blocks = twin_blocks(model)
    if not blocks:
        raise ModelError("no polynomial blocks in this twin")
    routed = [block.path for block in blocks if block.routed]
    if routed:
        raise ModelError(
            "experts have no encrypted form here",
            where=routed[0],
            cause="which expert a token goes to would have to be decided on encrypted numbers",
        )
    return blocks, {block.path: Product.of(block.read(model), block.path) for block in blocks}


def _rows(text: str, model: Any, tokenizer: Any, tokens: int) -> Tensor:
    """Windows, an even number: the first half to calibrate on, the second to test on."""
    window = min(WINDOW, getattr(model.config.get_text_config(), "max_position_embeddings", None) or WINDOW)
    ids = tokens_of(text, tokenizer, 2 * tokens)
    rows = sequences(ids, window, special_tokens(tokenizer), where=label(text))
    return rows[: len(rows) // 2 * 2]


def _counted(rows: Tensor, bar: Any) -> Iterator[Tensor]:
    for batch in rows.split(BATCH):
        yield batch
        bar.update(1)


def _margin(beyond: Excess, parameters: Parameters) -> float:
    """How many times larger the largest value seen may be before it wraps around."""
    return parameters.largest / max(beyond.largest, 1e-12)


def _row(path: str, beyond: Excess, parameters: Parameters, ranges: Ranges) -> dict[str, Any]:
    sizes = {f"largest_{name}": float(part.max()) for name, part in ranges.parts()}
    return {"path": path, **asdict(beyond), "margin": _margin(beyond, parameters), **sizes}


def _checked(
    model: Any,
    blocks: Sequence[SavedBlock],
    path: str,
    scaled: ScaledBlock,
    product: Product,
    parameters: Parameters,
    fresh: Tensor,
) -> dict[str, Any]:
    """The scaled block beside the block itself on unseen text, and encrypted on one token of it."""
    x = _inputs(model, [block for block in blocks if block.path == path], fresh[:1])
    wanted = product.stages(x).y
    plain = _relative(ScaledBlock.read(scaled.tensors(path), path)(x), wanted)
    if not plain < PLAIN_TOLERANCE:
        raise ModelError(f"the scaled block computes something else: relative error {plain:.1e}", where=path)
    if importlib.util.find_spec("tenseal") is None:
        return {"engine": None, "difference": plain}
    seen = encrypted_once(scaled, parameters, x[-1])
    error = _relative(seen.pop("y"), wanted[-1])
    if not error < TOLERANCE:
        raise ModelError(f"encrypted, the block computes something else: relative error {error:.1e}", where=path)
    return {"engine": "TenSEAL", "difference": error, **seen}


def encrypted_once(block: ScaledBlock, parameters: Parameters, x: Tensor) -> dict[str, Any]:
    """One token through a block, encrypted: `y` (out,), seconds of each step and bytes of what is sent.

    Args:
        x: the block's own input, (d,).
    """
    begun = time.monotonic()
    client = Client(parameters)
    keys = client.public_keys()
    server = Server(block, keys)
    ready = time.monotonic()
    sent = client.encrypt(x / block.x_size)
    encrypted = time.monotonic()
    answer = server(sent)
    computed = time.monotonic()
    y = client.decrypt(answer) * block.y_size
    seconds: Mapping[str, float] = {
        "keys": ready - begun,
        "encrypt": encrypted - ready,
        "compute": computed - encrypted,
        "decrypt": time.monotonic() - computed,
    }
    sizes = {"keys": len(keys), "sent": len(sent), "answer": len(answer)}
    return {"y": y, "seconds": {name: round(value, 3) for name, value in seconds.items()}, "bytes": sizes}


def _inputs(model: Any, blocks: Sequence[SavedBlock], ids: Tensor) -> Tensor:
    """What enters one block, (tokens, d)."""
    found: list[Tensor] = []
    with entering(model, blocks, lambda _, x: found.append(x)):
        model(input_ids=ids, use_cache=False)
    return found[0].double()


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
