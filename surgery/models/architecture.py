"""Which of transformers' classes a checkpoint is.

Its configuration names one. Where transformers knows no such name (a class of the author's own), the weights decide:
the class all of whose weights are there, and that leaves the fewest of the checkpoint's over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import transformers

from surgery.errors import ModelError

SHOWN = 3  # names in a list


@dataclass(frozen=True)
class Architecture:
    """A model class, and a plain word on it where it is not the one that the configuration names."""

    cls: Any
    note: str = ""


def named_class(config: Any) -> Any | None:
    """The architecture named in the configuration, if transformers has it."""
    known = (getattr(transformers, name, None) for name in config.architectures or [])
    return next((found for found in known if found is not None), None)


def general_class(config: Any) -> Any:
    """The most general class for a configuration's type. Raises ModelError where there is none."""
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ModelError(
        f"transformers knows no model class for model type {config.model_type!r}",
        cause="the model needs custom code, which is not run here",
    )


def class_by_weights(config: Any, path: str, **options: Any) -> Architecture:
    """The class that takes the checkpoint's weights best; nothing is loaded but their names and shapes.

    Args:
        path, options: as for `from_pretrained`.
    Raises:
        ModelError: no class finds all its weights there, or several do equally.
    """
    left: dict[Any, list[str]] = {}
    for cls in _classes(config):
        info = cls.from_pretrained(path, config=config, device_map="meta", output_loading_info=True, **options)[1]
        if not info["missing_keys"] and not info.get("mismatched_keys"):
            left[cls] = sorted(info["unexpected_keys"])
    least = min(map(len, left.values()), default=0)
    best = _preferred([cls for cls, over in left.items() if len(over) == least], config)
    named = f"its configuration names {', '.join(config.architectures or ['no class'])}"
    if len(best) != 1:
        either = (
            ", ".join(cls.__name__ for cls in best) or "none of transformers' classes finds all of its weights there"
        )
        raise ModelError(
            f"{named}, which transformers does not have",
            where=path,
            cause=f"by its weights it may be {either}" if best else either,
            fix='name one of transformers\' classes in config.json, as in "architectures": '
            f'["{best[0].__name__ if best else general_class(config).__name__}"]',
        )
    over = left[best[0]]
    listed = ", ".join(over[:SHOWN]) + (", …" if len(over) > SHOWN else "")
    rest = f" but {len(over)}, which are left out: {listed}" if over else ""
    return Architecture(best[0], f"{named}; by its weights it is a {best[0].__name__}, which takes all{rest}")


def _classes(config: Any) -> Iterator[Any]:
    """transformers' classes for a configuration's type, each once."""
    seen = []
    for name in dir(transformers):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is None or type(config) not in mapping:
            continue
        found = mapping[type(config)]
        for cls in found if isinstance(found, tuple) else (found,):
            if cls not in seen:
                seen.append(cls)
                yield cls


def _preferred(classes: list[Any], config: Any) -> list[Any]:
    """Of classes that take a checkpoint equally well: not the bare model where one with a head does as well, and of a
    causal and a masked language model the one that `is_decoder` says."""

    def of(auto: str) -> Any:
        mapping = getattr(transformers, auto)._model_mapping
        return mapping.get(type(config), None)

    bare, causal, masked = of("AutoModel"), of("AutoModelForCausalLM"), of("AutoModelForMaskedLM")
    rest = [cls for cls in classes if cls is not bare] or classes
    if causal in rest and masked in rest and causal is not masked:
        rest.remove(masked if getattr(config, "is_decoder", False) else causal)
    return rest
