"""Teacher and student: loaded, made trainable, and put into one memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import ModelError, RecipeError, first_line
from surgery.models import loading
from surgery.models.as_llama import as_llama
from surgery.refining import sharding
from surgery.refining.parameters import BlockPaths, names_inside
from surgery.refining.settings import LORA, RefineSettings


def load_teacher(settings: RefineSettings, student: Any) -> Any:
    """The original; as a Llama where the twin was made from it as one."""
    teacher: Any = loading.loaded(settings.original, settings.original_revision).model
    if type(student).__name__ == "LlamaForCausalLM" and type(teacher).__name__ != "LlamaForCausalLM":
        return as_llama(teacher) or teacher
    return teacher


def with_lora(student: Any, settings: RefineSettings) -> tuple[Any, dict[str, nn.Parameter]]:
    """The student in LoRA's wrapper, and the parameters to train, by name.

    Raises:
        RecipeError: it has no such modules.
    """
    from peft import LoraConfig, get_peft_model

    names = settings.lora_modules
    torch.manual_seed(settings.seed)
    try:
        adapted = get_peft_model(
            student,
            LoraConfig(
                r=settings.lora_rank,
                lora_alpha=2 * settings.lora_rank,
                target_modules=names if names == "all-linear" else names.split(","),
            ),
        )
    except ValueError as error:
        raise RecipeError(first_line(error), where="--lora-modules") from error
    return adapted, {name: value for name, value in adapted.named_parameters() if value.requires_grad}


def whole_student(settings: RefineSettings, state: dict[str, Any]) -> Any:
    """The student in one piece, from the tensors of a sharded one."""
    model: Any = loading.loaded(settings.twin).model
    if settings.train == LORA:
        model, _ = with_lora(model, settings)
    model.load_state_dict(state)
    return model


def checkpoint_activations(model: Any) -> None:
    """Layers keep their input alone and run again in the backward pass; nothing else changes.

    transformers does so in layers that are training, and there only; their children stay as they are, and dropout that
    a layer applies by itself is set to 0.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer.training = True
            for name, value in list(vars(layer).items()):
                if "dropout" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)


def _optimizer(
    settings: RefineSettings, trainable: dict[str, nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW without weight decay: the twin begins close to where it should end."""
    whole = not any(hasattr(value, "to_local") for value in trainable.values())
    fused = True if whole and device.type in ("cpu", "cuda") else None
    return torch.optim.AdamW(trainable.values(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)


@dataclass(frozen=True)
class Trainee:
    """A model ready to be trained.

    Attributes:
        network: what is called: the model, or accelerate's wrapper around it.
        trainable: its parameters to train, by name.
        shared_bytes: of the tensors that it shares with its teacher.
    """

    network: Any
    trainable: dict[str, nn.Parameter]
    optimizer: Any
    shared_bytes: int


def ready_student(
    settings: RefineSettings, accelerator: Any, pair: tuple[Any, Any, Any], trained: set[str], blocks: BlockPaths
) -> Trainee:
    """A student with what it needs to be trained, sharing or sharded.

    Args:
        pair: the student as it is called, the model inside it, and its teacher.
        trained: names of the parameters to train; `blocks`: as `twin_block_paths` gives them.
    """
    student, model, teacher = pair
    trainable = {name: value for name, value in student.named_parameters() if name in trained}
    if not sharding.wanted(accelerator, settings.shard):
        network, optimizer = accelerator.prepare(student, _optimizer(settings, trainable, accelerator.device))
        # Only now, since moving to a device copies.
        return Trainee(network, trainable, optimizer, share_tensors(student, teacher, trained, names_inside(blocks)))
    teacher.to("cpu")
    share_tensors(student, teacher, trained, names_inside(blocks))  # one model until each process has its parts
    for network, inside in ((student, model), (teacher, teacher)):
        sharding.shard(network, inside, (paths[0] for paths, _ in blocks), accelerator)
    trainable = {name: value for name, value in student.named_parameters() if name in trained}
    return Trainee(student, trainable, _optimizer(settings, trainable, accelerator.device), 0)


def _rounded_alike(own: Tensor, other: Tensor) -> bool:
    """Equal but for the rounding of a stored precision, float16 or bfloat16."""
    return bool((own - other).norm() <= 2e-3 * other.norm())


def share_tensors(twin: Any, teacher: Any, trained: set[str], inside: tuple[str, ...]) -> int:
    """Lets the teacher use the twin's tensors wherever nothing is trained; the bytes this saves.

    Args:
        inside: beginnings of the names in the replaced blocks (:func:`names_inside`), which stay the teacher's own.

    Raises:
        ModelError: the teacher is not what the twin was made from: outside the blocks their weights differ.
    """
    ours = {name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in twin.named_parameters()}
    saved = 0
    for name, parameter in list(teacher.named_parameters()):
        if name.startswith(inside):
            continue
        own = ours.get(name)
        if own is None or own.shape != parameter.shape or not _rounded_alike(own, parameter):
            raise ModelError(
                f"{name} differs between the teacher and the twin",
                cause="the twin was made from another model",
                fix="name the model that the twin was converted from",
            )
        if name not in trained:
            parameter.data = own.data
            saved += own.numel() * own.element_size()
    teacher.requires_grad_(False)
    return saved
