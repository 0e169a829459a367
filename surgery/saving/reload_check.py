"""Run by path in a fresh process: loads folders with plain transformers and compares their outputs with files'.

Imports nothing of this package, so what it sees is what somebody without it sees. Arguments: FOLDER FILE FORM, any
number of times; a line of JSON each. --on-disk before them leaves the weights on disk.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

NEW_TOKENS = 5


def compare(folder: str, file: str, form: str, **where) -> dict:
    """Missing and unexpected keys, the relative difference of the outputs, and whether greedy text is the same."""
    trust = form == "custom"
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    cls = auto_class_of(config) if trust else getattr(transformers, config.architectures[0])
    options = {"trust_remote_code": True} if trust else {}
    model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options, **where)
    model.eval()
    tensors = load_file(file)
    inputs = {name.removeprefix("input."): value for name, value in tensors.items() if name.startswith("input.")}
    with torch.no_grad():
        outputs = model(**inputs)
    found = outputs.get("logits")
    if found is None:
        found = outputs.get("last_hidden_state")
    if found is None:
        found = next(value for value in outputs.values() if isinstance(value, torch.Tensor))
    expected = tensors["expected"]
    seen = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "difference": float((found.float() - expected).norm() / expected.norm().clamp_min(1e-30)),
    }
    if "generated" in tensors:
        text = model.generate(tensors["prompt"], do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
        seen["generates"] = torch.equal(text, tensors["generated"])
    return seen


def auto_class_of(config):
    """The Auto class that loads the class a custom twin was made from, and not one with another head."""
    base = getattr(transformers, config.base_architecture)
    names = [name for name in config.auto_map if name.startswith("AutoModel")]
    for name in names:
        found = getattr(transformers, name)._model_mapping.get(base.config_class, None)
        if base in (found if isinstance(found, tuple) else (found,)):
            return getattr(transformers, name)
    return getattr(transformers, names[0])


def main(arguments: list[str]) -> None:
    transformers.utils.logging.disable_progress_bar()
    where = {}
    if arguments[0] == "--on-disk":
        arguments, where = arguments[1:], {"device_map": {"": "disk"}, "offload_folder": tempfile.mkdtemp(dir=".")}
    for start in range(0, len(arguments), 3):
        try:
            seen = compare(*arguments[start : start + 3], **where)
        except Exception as error:
            seen = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
