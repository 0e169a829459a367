"""What to say of a model that cannot be loaded."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from surgery.errors import ModelError, first_line

ADAPTER = "adapter_config.json"


def is_adapter(name: str) -> ModelError:
    """What to do with an adapter where a model is wanted."""
    return ModelError(
        "an adapter (a LoRA, or another of peft's) is no model by itself",
        where=name,
        cause=f"it holds {ADAPTER}",
        fix="merge it into its model first, and convert what that saves:\n"
        "    from peft import AutoPeftModelForCausalLM\n"
        f"    AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained('merged')",
    )


GGUF_MARK = "polysurgery.degree"
"""A field that is near the beginning of every GGUF file of a twin."""
BEGINNING = 1 << 16  # bytes
EXPORTS = {"gguf": "GGUF file", "onnx": "ONNX graph", "encrypted": "encrypted form"}


def refuse_export(path: Path) -> None:
    """Raises ModelError for a twin's GGUF file, and for the folder of a form that no transformers model is.

    transformers reads GGUF's Llama without the biases of its feed-forward maps, and says nothing.
    """
    form, made_from = "", ""
    if path.is_dir():
        report: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            report = json.loads((path / "surgery.json").read_text(encoding="utf-8"))
        form, made_from = report.get("form", ""), report.get("exported_from", "")
    else:
        with path.open("rb") as file:
            form = "gguf" if GGUF_MARK.encode() in file.read(BEGINNING) else ""
    if form in EXPORTS:
        raise ModelError(
            f"a twin's {EXPORTS[form]} is not for transformers",
            where=path.name,
            fix=f"name the twin that it was exported from{f' ({made_from})' if made_from else ''}",
        )


def adapter_on_the_hub(name: str, revision: str | None) -> bool:
    """Whether what is on the Hub under this name is an adapter."""
    from huggingface_hub import file_exists

    try:
        return bool(file_exists(name, ADAPTER, revision=revision))
    except Exception:
        return False


def unreadable(name: str, error: Exception) -> ModelError:
    """From what transformers or the Hub raised."""
    first = first_line(error)
    if isinstance(error, MemoryError) or "allocate memory" in first or "out of memory" in first:
        return ModelError(
            f"the model could not be loaded: {first}",
            where=name,
            cause="it needs more memory than there is",
            fix="convert it with --offload, which leaves the weights on disk",
        )
    if "trust_remote_code" in str(error):
        return ModelError(
            "the model's architecture comes as code with the checkpoint, and such code is not run",
            where=name,
            cause="transformers does not know its type, or this version does not yet",
            fix="upgrade transformers, or convert a checkpoint of an architecture that transformers has",
        )
    if "No space left" in str(error):
        return ModelError(
            f"the model could not be loaded: {first}",
            where=name,
            cause="experts that stay on disk are put together beside the output, which takes as much room again",
            fix="free some space, or choose an output (-o) on another disk",
        )
    here = "" if Path(name).expanduser().exists() else "there is no such file or folder here; on the Hub it is "
    return ModelError(
        f"the model could not be loaded: {first}",
        where=name,
        cause=f"{here}a name that does not exist, a private model, no network, or not a transformers model",
        fix="check the name; for a private model run `hf auth login`; a local folder needs config.json and weights",
    )
