"""A Hub id, a local folder, a GGUF file or a model in memory → model, tokenizer and where they came from."""

from __future__ import annotations

import json
import weakref
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from surgery.errors import ModelError, first_line
from surgery.models import delta, modeling_polynomial, quantised
from surgery.models.architecture import Architecture, class_by_weights, general_class, named_class
from surgery.models.companions import Companions, companions, has_tokenizer
from surgery.models.gguf_files import gguf_config, gguf_read_once
from surgery.models.in_memory import unwrapped
from surgery.models.refusals import ADAPTER, adapter_on_the_hub, is_adapter, refuse_export, unreadable
from surgery.runtime import processes, weights_on_disk
from surgery.runtime.freed_memory import give_memory_back
from surgery.runtime.trust import trusted
from surgery.runtime.vocabulary import understands_former_names


@dataclass(frozen=True)
class Source:
    """Where a model came from, as recorded in `surgery.json`.

    Attributes:
        name: what the user typed (a folder is recorded by its last part only).
        kind: hub, folder, gguf or memory.
        revision: the commit the Hub resolved to, where there is one.
        architecture: the model class.
        dtype: the precision of the stored weights; the twin is saved in it.
        note: a plain word where the class is not the one that the configuration names.
    """

    name: str
    kind: str
    revision: str | None
    architecture: str
    dtype: str
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "note" or value}


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer where it has one, and where both came from.

    Attributes:
        place: path or Hub id, kind and revision of the checkpoint; None for a model in memory.
        tokenizer_problem: why its tokenizer does not load; empty where it does, or where there is none.
    """

    model: nn.Module
    tokenizer: Any | None
    source: Source
    place: tuple[str, str, str | None] | None = None
    tokenizer_problem: str = ""

    @cached_property
    def companions(self) -> Companions:
        """What else stands beside its weights; looked up, and on the Hub fetched, when it is asked for."""
        return Companions() if self.place is None else companions(*self.place, self.tokenizer_problem)

    @property
    def text_tokenizer(self) -> Any | None:
        """Its tokenizer, to be used. Raises ModelError where there is one that does not load."""
        if self.tokenizer is None and self.tokenizer_problem:
            raise ModelError(
                f"the model's tokenizer does not load: {self.tokenizer_problem}",
                where=self.source.name,
                cause="its files are damaged, or it needs a package that is not there, or code of its own",
                fix="mend or replace them, or give token ids; for code that you trust, --trust-remote-code "
                "(in Python: with surgery.trusting_remote_code(): …)",
            )
        return self.tokenizer


def locate(name: str) -> tuple[str, dict[str, str], str]:
    """(path or Hub id, extra from_pretrained arguments, kind)."""
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        refuse_export(path)
        return str(path.parent), {"gguf_file": path.name}, "gguf"
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if (path / "config.json").is_file():
            if (path / ADAPTER).is_file():
                raise is_adapter(name)
            refuse_export(path)
            return str(path), {}, "folder"
        if len(ggufs) == 1:
            refuse_export(ggufs[0])
            return str(path), {"gguf_file": ggufs[0].name}, "gguf"
        if (path / ADAPTER).is_file():
            raise is_adapter(name)
        raise ModelError(
            "the folder holds no config.json" + (f" and {len(ggufs)} GGUF files" if ggufs else ""),
            where=name,
            cause="it is not a transformers checkpoint",
            fix="name a checkpoint folder, or one .gguf file",
        )
    if path.is_file():
        raise ModelError("a file, but not a .gguf file", where=name, fix="name its folder, or a .gguf file")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise ModelError("there is no such file or folder", where=name, fix="check the path")
    return name, {}, "hub"


def load_config(name: str, revision: str | None = None) -> Any:
    """The configuration alone. Twins load without a trust flag."""
    modeling_polynomial.register()
    path, extra, kind = locate(name)
    try:
        if kind == "gguf":
            return gguf_config(Path(path) / extra["gguf_file"])
        return transformers.AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False, **extra)
    except Exception as error:
        if kind == "hub" and adapter_on_the_hub(name, revision):
            raise is_adapter(name) from error
        raise unreadable(name, error) from error


def architecture(name: str, config: Any, revision: str | None = None) -> Architecture:
    """The model class of a checkpoint: the one its configuration names, else what its weights say.

    Raises ModelError where that is not known.
    """
    path, _, kind = locate(name)
    if config.model_type == modeling_polynomial.MODEL_TYPE:
        return Architecture(modeling_polynomial.PolynomialModel)
    found = named_class(config)
    if found is not None:
        return Architecture(found)
    if kind == "gguf":
        return Architecture(general_class(config))
    try:
        return class_by_weights(config, path, revision=revision)
    except ModelError:
        raise
    except Exception as error:
        raise unreadable(name, error) from error


def twin_note(name: str, config: Any) -> str:
    """A plain word where what is to be loaded is a polynomial twin already."""
    file = Path(name).expanduser() / "surgery.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        made = f", made from {report['source']['name']} at degree {report['recipe']['degree']}" if report else ""
    except (OSError, ValueError, KeyError, TypeError):
        made = ""
    known = file.is_file() or config.model_type == modeling_polynomial.MODEL_TYPE
    return f"this is a polynomial twin already{made}" if known else ""


def load_meta(name: str, revision: str | None = None) -> tuple[nn.Module, Any, str]:
    """The model's structure on the meta device, its configuration, and a plain word where its class was in doubt.

    No weights are read (but for their names, where the configuration names no known class).
    """
    config = load_config(name, revision)
    if locate(name)[2] != "gguf":
        quantised.reading(name, config)
    found = architecture(name, config, revision)
    with torch.device("meta"):
        return found.cls._from_config(config), config, "; ".join(filter(None, (twin_note(name, config), found.note)))


@understands_former_names
def load(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device_map: str | dict[str, str] | None = None,
    original: str | None = None,
) -> Any:
    """A model ready to use: an original or a twin, a delta applied to its original; as a transformers model.

    Args:
        name: Hub id, folder or .gguf file; `revision` of the Hub.
        dtype: precision to compute in; `auto` is the stored one.
        device_map: as in transformers; `{"": "disk"}` leaves the weights on disk.
        original: of a delta, where it is not to be loaded from the Hub as recorded.
    Raises:
        ModelError: nothing there, not a transformer, or weights missing from the checkpoint.
    """
    return loaded(str(name), revision, dtype, device_map, original).model


def loaded(
    name: str,
    revision: str | None = None,
    dtype: str = "float32",
    device_map: str | dict[str, str] | None = None,
    base: str | None = None,
    merged: Path | None = None,
) -> LoadedModel:
    """Weights, tokenizer and where they came from.

    Args:
        name: Hub id, folder or .gguf file; a delta is applied to its original.
        dtype: precision to compute in; `auto` is the stored one.
        original: of a delta, where it is not to be loaded from the Hub as recorded.
        merged: folder for weights that stay on disk but are not there as the model keeps them (experts are put
            together on loading), in one of their own that is removed with the model; then this one and the one it is
            in, if they are empty. Default: a temporary one.
    Raises:
        ModelError: nothing there, not a transformer, or weights missing from the checkpoint.
    """
    with gguf_read_once() if locate(name)[2] == "gguf" else nullcontext():
        return _loaded(name, revision, dtype, device_map, base, merged)


def _loaded(
    name: str,
    revision: str | None,
    dtype: str,
    device_map: str | dict[str, str] | None,
    base: str | None,
    merged: Path | None,
) -> LoadedModel:
    modeling_polynomial.register()
    path, extra, kind = locate(name)
    config = load_config(name, revision)
    if hasattr(config, delta.KEY):
        return _load_delta(name, revision, dtype, device_map, base, config)
    stored = stored_dtype(Path(path), config) if kind != "gguf" else "float32"
    options = dict(extra, revision=revision, dtype=getattr(torch, stored if dtype == "auto" else dtype))
    if device_map is not None:
        options["device_map"] = device_map
    whole = {} if kind == "gguf" else quantised.reading(name, config)
    options |= whole
    if whole and isinstance(device_map, dict) and "disk" in device_map.values():
        raise ModelError(
            "quantised weights are decompressed on loading, and cannot stay on disk",
            where=name,
            fix="leave --offload out, or save the model with decompressed weights first",
        )
    kind_of_model = architecture(name, config, revision)
    model, left_over = _weights(name, path, kind_of_model.cls, options, merged)
    quantised.forget(model, converted=bool(whole))
    tokenizer, problem = _tokenizer(path, kind, revision, dict(extra))
    model.eval()
    commit = getattr(model.config, "_commit_hash", None)
    broken = f"the tokenizer does not load ({problem}); its files are copied as they are" if problem else ""
    note = "; ".join(filter(None, (twin_note(name, config), kind_of_model.note, left_over, broken)))
    source = Source(public_name(name, kind), kind, commit, type(model).__name__, stored, note)
    return LoadedModel(model, tokenizer, source, (path, kind, commit or revision), problem)


def _tokenizer(path: str, kind: str, revision: str | None, extra: dict[str, Any]) -> tuple[Any | None, str]:
    """A checkpoint's tokenizer, or None and why it does not load; no reason where there is none."""
    try:
        extra |= {"trust_remote_code": trusted()}
        return transformers.AutoTokenizer.from_pretrained(path, revision=revision, **extra), ""
    except Exception as error:
        if not has_tokenizer(path, kind, revision):
            return None, ""
        first = first_line(error)
        return None, first


def _weights(name: str, path: str, cls: Any, options: dict[str, Any], merged: Path | None) -> tuple[Any, str]:
    """The model with its weights, and a plain word on tensors it does not take; what it keeps on disk goes with it."""
    ours: list[Path] = []
    device_map = options.get("device_map")
    if isinstance(device_map, dict) and "disk" in device_map.values():
        options["offload_folder"] = weights_on_disk.fresh_folder(merged)
        ours = [options["offload_folder"], *([] if merged is None else [merged, merged.parent])]
        give_memory_back()
    try:
        model, info = cls.from_pretrained(path, output_loading_info=True, **options)
    except BaseException as error:
        weights_on_disk.remove_folders(ours)
        if not isinstance(error, Exception):
            raise
        raise unreadable(name, error) from error
    weakref.finalize(model, weights_on_disk.remove_folders, ours)
    missing = sorted(info.get("missing_keys", ()))
    if missing or info.get("mismatched_keys"):
        raise ModelError(
            f"{len(missing)} weights are missing from the checkpoint or have another shape"
            + (f", first {missing[0]}" if missing else ""),
            where=name,
            cause="the checkpoint is incomplete, or was saved for another class",
        )
    others = sorted(info.get("unexpected_keys", ()))
    if not others:
        return model, ""
    named = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
    return model, f"{len(others)} tensors of the checkpoint have no place in {type(model).__name__} ({named})"


def placed(device: str) -> Any:
    """The device of that name; `auto` is this process's accelerator, where there is one that computes in float64.

    Raises:
        ModelError: no such device here.
    """
    if device == "auto":
        from accelerate import PartialState

        processes.join()  # what joins first says how
        found: torch.device = PartialState().device
        return torch.device("cpu") if found.type == "mps" else found  # Metal has no float64, which the sums are kept in
    try:
        torch.empty(0, device=device, dtype=torch.float64)
    except Exception as error:
        raise ModelError(
            f"no device {device!r} here, or none that computes in float64",
            where="--device",
            cause=first_line(error),
            fix="cpu, cuda, cuda:1, …, or auto",
        ) from error
    return torch.device(device)


def public_name(name: str, kind: str) -> str:
    """A name as it is recorded: local paths by their last part."""
    return Path(locate(name)[0]).name if kind == "folder" else (Path(name).name if kind == "gguf" else name)


def _load_delta(
    name: str, revision: str | None, dtype: str, device_map: str | dict[str, str] | None, base: str | None, config: Any
) -> LoadedModel:
    """The twin a delta stands for: its original, loaded in the twin's stored precision, with the delta applied."""
    from transformers.utils import cached_file

    described = getattr(config, delta.KEY)
    if base is None and described["kind"] != "hub":
        raise ModelError(
            f"this delta was taken from {described['base']!r}, which is not on the Hub",
            where=name,
            fix="surgery.load(DELTA, original=MODEL), or surgery export DELTA --form full --original MODEL -o OUT",
        )
    try:
        tensors = load_file(str(cached_file(locate(name)[0], delta.WEIGHTS, revision=revision)))
    except Exception as error:
        raise unreadable(name, error) from error
    name_of_base = base or described["base"]
    pinned = described["revision"] if name_of_base == described["base"] else None
    original = loaded(name_of_base, pinned, described["dtype"], device_map)
    twin = delta.apply_delta(original.model, config, tensors)
    twin.to(dtype=getattr(torch, described["dtype"] if dtype == "auto" else dtype)).eval()
    kind = locate(name)[2]
    source = Source(
        public_name(name, kind), kind, getattr(config, "_commit_hash", None), type(twin).__name__, described["dtype"]
    )
    return LoadedModel(twin, original.tokenizer, source, original.place, original.tokenizer_problem)


def from_memory(model: Any, tokenizer: Any | None) -> LoadedModel:
    """Wraps a model the caller already holds. It is changed in place by conversion.

    Raises:
        ModelError: its class is not one of transformers', which is what a twin is loaded as; or see
            :func:`surgery.models.in_memory.unwrapped`.
    """
    model = unwrapped(model)
    known = getattr(transformers, type(model).__name__, None)
    if known is not type(model) and getattr(model.config, "model_type", None) != modeling_polynomial.MODEL_TYPE:
        raise ModelError(
            "transformers has no such model class, so that no twin of it could be loaded",
            where=f"{type(model).__module__}.{type(model).__name__}",
            cause="a class of your own, or one that came with a checkpoint",
            fix="convert a model of the transformers class that it extends, if it computes the same",
        )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    model.eval()
    return LoadedModel(model, tokenizer, Source(Path(name).name, "memory", None, type(model).__name__, dtype))


def stored_dtype(path: Path, config: Any) -> str:
    """The precision of the stored weights: what config.json says, else float32."""
    declared = getattr(config, "dtype", None)
    if declared is None and (path / "config.json").is_file():
        raw = json.loads((path / "config.json").read_text())
        declared = raw.get("dtype") or raw.get("torch_dtype")
    name = str(declared or "float32").removeprefix("torch.")
    return name if name in ("float32", "float16", "bfloat16", "float64") else "float32"


def is_causal(model: Any) -> bool:
    """Whether it predicts next tokens."""
    return bool(model.can_generate()) and not getattr(model.config, "is_encoder_decoder", False)
