"""Models larger than one device: every process holds a part of every tensor (PyTorch's FSDP2).

A layer is put together when it runs and let go of afterwards; gradients, the optimiser's state and the running mean
stay in parts. Teacher and twin are sharded alike and do not share tensors, so each of N processes holds 2 ÷ N of a
model, and 5 ÷ N of what is trained. Elementwise work (means, saved states) is done on each :func:`local_part`, without
communication.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.blocks.parts import layer_of
from surgery.errors import ModelError, RecipeError

REPLICATED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")


def wanted(accelerator: Any, asked: bool) -> bool:
    """Whether to shard: where it was asked for, or where accelerate's configuration says FSDP.

    Raises:
        ModelError: a kind of distribution that is not known here, or FSDP of an earlier kind or on the CPU's memory.
        RecipeError: nobody to share with.
    """
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind == "FSDP":
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2 or getattr(plugin.cpu_offload, "pin_memory", None) is not None:
            raise ModelError(
                "of accelerate's FSDP only version 2 without offloading is supported",
                fix="set fsdp_version: 2 and fsdp_offload_params: false, or use MULTI_GPU with --shard",
            )
        return True
    if kind not in REPLICATED:
        raise ModelError(
            f"refinement does not run under {accelerator.distributed_type}",
            fix="use data parallelism (accelerate's MULTI_GPU), with --shard where a model is larger than a GPU",
        )
    if asked and accelerator.num_processes == 1:
        raise RecipeError(
            "there is one process, and nothing to share out",
            where="--shard",
            fix="start several with accelerate launch, or leave --shard",
        )
    return asked


def shard(network: nn.Module, model: nn.Module, paths: Iterable[str], accelerator: Any) -> None:
    """Shards a model in place, a layer at a time; gradients come as means over the processes.

    Args:
        network: what is called: the model, or a wrapper around it.
        paths: modules in the layers; all members of the stacks these are in become units of their own.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    stacks = {layer_of(path).rpartition(".")[0] for path in paths}
    for stack in sorted(stacks):
        for layer in model.get_submodule(stack).children():
            fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)


def is_sharded(network: nn.Module) -> bool:
    """Whether its parameters are shared out between the processes."""
    return any(hasattr(value, "to_local") for value in network.parameters())


def local_part(value: Tensor) -> Tensor:
    """This process's part of a sharded tensor, the same memory; a tensor that is not sharded as it is. Detached."""
    value = value.detach()
    local: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local


def drop_stale(network: nn.Module) -> None:
    """After weights were changed: what is still put together from old parts is let go of."""
    if is_sharded(network):
        from torch.distributed.fsdp import FSDPModule

        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """All tensors, whole, on the CPU of the first process; empty elsewhere. Every process must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(network, options=options)
    return state


def own_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state, of this process's parts."""
    state = optimizer.state_dict()
    parts = {
        index: {name: local_part(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": parts}


def load_own_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Puts back what :func:`own_state` gave."""
    optimizer.load_state_dict(state)
    parameter: Any
    for parameter, entry in optimizer.state.items():
        if not hasattr(parameter, "to_local"):
            continue
        from torch.distributed.tensor import DTensor

        for name, value in entry.items():
            if isinstance(value, Tensor) and value.dim():
                entry[name] = DTensor.from_local(
                    value, parameter.device_mesh, parameter.placements, run_check=False,
                    shape=parameter.shape, stride=parameter.stride(),
                )  # fmt: skip
