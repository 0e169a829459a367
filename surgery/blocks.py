"""Finds a transformer's feed-forward blocks by their structure, and confirms each by recomputing it.

A block is two or three linear maps and an activation, wherever they sit:

    gated   gate: d → h, up: d → h, down: h → o      σ(gate x) ⊙ (up x)       Llama, Qwen, Gemma, T5 v1.1, …
    fused   gate_up: d → 2h,        down: h → o      the same, in one matrix  Phi-3, GLM, …
    plain   first: d → h,           last: h → o      σ(first x)               GPT-2, GPT-NeoX, OPT, Phi, BERT, ViT, T5

Names are hints only (which of two equal maps is the gate). Whatever looks like a feed-forward block and does not fit
is listed with the reason and left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.activations import Activation, recognise
from surgery.errors import ModelError

Kind = Literal["gated", "fused", "plain"]
GATE_HINTS = ("gate", "w1", "wi_0", "fc1_g", "linear_1")
CONFIRM_TOLERANCE = 1e-3  # relative; a wrong reading of a block is off by the size of its output


@dataclass(frozen=True)
class Block:
    """One feed-forward block.

    Attributes:
        path: the module a user would name: the block's own module, or the layer that holds it inline.
        kind: gated, fused or plain.
        first: paths of the map(s) that read the block's input; gate before up.
        last: path of the map that writes its output.
        activation_path: where the activation sits.
        activation: its name.
        width, hidden, out: d, h, o.
        parameters: number of weights and biases.
        additive: the layer's output is its residual stream plus the block's output, seen in a forward pass.
    """

    path: str
    kind: Kind
    first: tuple[str, ...]
    last: str
    activation_path: str
    activation: str
    width: int
    hidden: int
    out: int
    parameters: int
    additive: bool = False

    @property
    def entry(self) -> str:
        """Path of the module that receives the block's input."""
        return self.first[0] if self.kind == "plain" else self.path

    @property
    def replaced(self) -> tuple[str, ...]:
        """Paths at which conversion puts something new."""
        return (*self.first, self.activation_path, self.last) if self.kind == "plain" else (self.path,)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Survey:
    """What a model contains: blocks that can be converted, and (path, reason) for those left alone."""

    blocks: tuple[Block, ...]
    left_alone: tuple[tuple[str, str], ...]


def is_linear(module: nn.Module) -> bool:
    """A matrix: nn.Linear, or GPT-2's Conv1D, which keeps it transposed."""
    if type(module).__name__ == "Conv1D":
        return True
    return isinstance(module, nn.Linear)


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(out, in) weight, whatever way the module keeps it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    bias = getattr(module, "bias", None)
    return (weight.T if type(module).__name__ == "Conv1D" else weight), bias


def _shape(module: nn.Module) -> tuple[int, int]:
    weight, _ = weight_and_bias(module)
    return weight.shape[0], weight.shape[1]


def attribute(model: nn.Module, path: str) -> Any:
    """What stands at a dotted path: a module, or a plain function kept as an attribute."""
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name)


def activation_of(function: Callable[[Tensor], Tensor], block: Block) -> Activation:
    """The row of :mod:`surgery.activations` for a block's nonlinearity. Raises ModelError if not elementwise."""
    found = recognise(function, block.activation)
    if found is None:
        raise ModelError(
            "the activation is not an elementwise function",
            where=block.activation_path,
            fix="leave this block out with --blocks",
        )
    return found


def survey(model: nn.Module) -> Survey:
    """Every feed-forward block by structure. Works on meta weights; nothing is run."""
    found: list[Block] = []
    left: list[tuple[str, str]] = []
    claimed: set[str] = set()
    expert_paths = tuple(path for path, module in model.named_modules() if _mixture(module))
    for path, module in model.named_modules():
        if path == "" or any(path.startswith(f"{claim}.") for claim in claimed):
            continue
        if any(path == expert or path.startswith(f"{expert}.") for expert in expert_paths):
            if path in expert_paths:
                left.append((path, "mixture of experts: not converted yet"))
                claimed.add(path)
            continue
        block, reason = _read(model, path, module)
        if block is not None:
            found.append(block)
            claimed.add(block.path)
        elif reason:
            left.append((path, reason))
    seen: dict[int, str] = {}
    unique = []
    for block in found:
        identity = id(model.get_submodule(block.last))
        if identity in seen:
            left.append((block.path, f"shares its weights with {seen[identity]}"))
            continue
        seen[identity] = block.path
        unique.append(block)
    left.extend(_silent_layers(model, found, left))
    return Survey(tuple(unique), tuple(left))


def _mixture(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    if "experts" in name or "sparsemoe" in name or name.endswith("moe"):
        return True
    stacked = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1]
    children = dict(module.named_children())
    routed = any(key in children for key in ("router", "experts"))
    return routed or (len(stacked) >= 2 and len(set(stacked)) == 1)


def _read(model: nn.Module, path: str, module: nn.Module) -> tuple[Block | None, str]:
    """The block whose maps are direct children of `module` (or its BERT-style split pair), else why not."""
    children = dict(module.named_children())
    split = _split_pair(children)
    if split is not None:
        return _plain(model, path, *split), ""
    linears = {name: child for name, child in children.items() if is_linear(child)}
    activation = _activation_name(module)
    if len(linears) < 2 or activation is None:
        looks = path.rpartition(".")[2] in ("mlp", "feed_forward", "ffn") and bool(list(module.parameters()))
        inside = any(is_linear(m) for m in module.modules())
        return None, "no activation between two linear maps was recognised" if looks and inside else ""
    names = list(linears)
    shapes = {name: _shape(child) for name, child in linears.items()}
    full = {name: f"{path}.{name}" for name in names}
    if len(names) == 3:
        for last in names:
            one, two = (name for name in names if name != last)
            out, hidden = shapes[last]
            if shapes[one] == shapes[two] and shapes[one][0] == hidden and shapes[one][1] == out:
                if hidden == out and last != names[-1]:
                    continue
                gate, up = (two, one) if _gate_like(two) and not _gate_like(one) else (one, two)
                return _block(model, path, "gated", (full[gate], full[up]), full[last], f"{path}.{activation}"), ""
    if len(names) == 2:
        first, last = names
        if shapes[first][0] == 2 * shapes[last][1]:
            return _block(model, path, "fused", (full[first],), full[last], f"{path}.{activation}"), ""
        if shapes[first][0] == shapes[last][1]:
            return _block(model, path, "plain", (full[first],), full[last], f"{path}.{activation}"), ""
    # A layer with attention and a feed-forward pair inline (OPT): the pair is the one that widens and narrows.
    pairs = [
        (a, b)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if shapes[a][0] == shapes[b][1] and shapes[a][1] == shapes[b][0] and shapes[a][0] > shapes[a][1]
    ]
    if len(pairs) == 1:
        return _block(model, path, "plain", (full[pairs[0][0]],), full[pairs[0][1]], f"{path}.{activation}"), ""
    return None, f"{len(names)} linear maps and an activation, but no pair or triple of matching widths"


def _gate_like(name: str) -> bool:
    return any(hint in name for hint in GATE_HINTS)


def _split_pair(children: dict[str, nn.Module]) -> tuple[str, str, str] | None:
    """BERT's intermediate.dense + activation, output.dense, siblings in one layer."""
    wide, narrow = children.get("intermediate"), children.get("output")
    if wide is None or narrow is None:
        return None
    activation = _activation_name(wide)
    first, last = getattr(wide, "dense", None), getattr(narrow, "dense", None)
    if activation is None or first is None or last is None or not (is_linear(first) and is_linear(last)):
        return None
    return "intermediate.dense", "output.dense", f"intermediate.{activation}"


def _plain(model: nn.Module, path: str, first: str, last: str, activation: str) -> Block | None:
    return _block(model, path, "plain", (f"{path}.{first}",), f"{path}.{last}", f"{path}.{activation}")


def _activation_name(module: nn.Module) -> str | None:
    """The attribute that holds an activation: a parameterless child, or a plain function, named like one."""
    candidates = []
    for name, child in module.named_children():
        if "act" in name.lower() and not list(child.parameters()):
            candidates.append(name)
    for name, value in vars(module).items():
        if "act" in name.lower() and callable(value) and not isinstance(value, type):
            candidates.append(name)
    if not candidates:
        candidates = [
            name
            for name, child in module.named_children()
            if type(child).__module__.endswith("activation") and not list(child.parameters())
        ]
    return candidates[0] if len(candidates) == 1 else None


def _block(
    model: nn.Module, path: str, kind: Kind, first: tuple[str, ...], last: str, activation_path: str
) -> Block | None:
    out, hidden = _shape(model.get_submodule(last))
    width = _shape(model.get_submodule(first[0]))[1]
    parameters = sum(p.numel() for part in (*first, last) for p in model.get_submodule(part).parameters())
    function = attribute(model, activation_path)
    row = recognise(function, getattr(function, "__name__", type(function).__name__))
    name = row.name if row is not None else f"{type(function).__name__} (not elementwise)"
    return Block(path, kind, first, last, activation_path, name, width, hidden, out, parameters)


def _silent_layers(model: nn.Module, found: Iterable[Block], left: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Layers of a stack that hold matrices, but in which nothing was found or named."""
    known = [block.path for block in found] + [path for path, _ in left]
    silent = []
    for path, module in model.named_modules():
        nested_stack = any(part.isdigit() for part in path.split("."))  # sublayers of a layer, as in T5
        if not isinstance(module, nn.ModuleList) or not len(module) or nested_stack:
            continue
        inside = [any(p == f"{path}.{i}" or p.startswith(f"{path}.{i}.") for p in known) for i in range(len(module))]
        nested = any(path.startswith(p + ".") for p in known)
        if any(inside) and not nested:
            silent += [
                (f"{path}.{i}", "no feed-forward block was recognised in this layer")
                for i, here in enumerate(inside)
                if not here and any(is_linear(m) for m in module[i].modules())
            ]
    return silent


def layer_of(path: str) -> str:
    """Path of the layer (member of the innermost stack) a block belongs to, or the block's own path."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        if parts[end - 1].isdigit():
            return ".".join(parts[:end])
    return path


def is_norm(module: nn.Module) -> bool:
    """A normalisation layer: one-dimensional parameters, no children."""
    own = list(module.parameters())
    return bool(own) and not list(module.children()) and all(parameter.dim() == 1 for parameter in own)


def norms_around(model: nn.Module, path: str) -> list[nn.Module]:
    """Normalisation layers of the layer that the block at `path` belongs to."""
    return [module for module in model.get_submodule(layer_of(path)).modules() if is_norm(module)]


def confirm(model: nn.Module, blocks: Iterable[Block], run: Callable[[], object]) -> tuple[Block, ...]:
    """Runs the model once and recomputes each block's hidden vector and output from the weights found.

    Returns the blocks, with gate and up exchanged where the recomputation says so.

    Raises:
        ModelError: a block was not called exactly once, or its recomputation differs.

    The blocks come back in the order in which they run, with `additive` filled in.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    normed: list[tuple[Tensor, Tensor]] = []
    layers: dict[str, Tensor] = {}
    hooks = []

    def record(path: str) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.setdefault(path, []).append((args[0].detach(), output.detach()))

        hooks.append(model.get_submodule(path).register_forward_hook(hook))

    def record_layer(path: str) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                layers[path] = first.detach()

        hooks.append(model.get_submodule(path).register_forward_hook(hook))

    blocks = tuple(blocks)
    for block in blocks:
        for path in {block.entry, *block.first, block.last}:
            record(path)
        for norm in norms_around(model, block.path):
            hooks.append(norm.register_forward_hook(lambda _, args, output: normed.append((args[0], output))))
        record_layer(layer_of(block.path))
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    order = list(seen)  # the order of execution, which is the order of conversion
    confirmed = [_confirmed(model, block, seen) for block in blocks]
    confirmed = [replace(block, additive=_additive(model, block, seen, normed, layers)) for block in confirmed]
    return tuple(sorted(confirmed, key=lambda block: order.index(block.last)))


def _additive(
    model: nn.Module,
    block: Block,
    seen: dict[str, list[tuple[Tensor, Tensor]]],
    normed: list[tuple[Tensor, Tensor]],
    layers: dict[str, Tensor],
) -> bool:
    entered, written = seen[block.entry][0][0], seen[block.last][0][1]
    total = layers.get(layer_of(block.path))
    for before, after in normed:
        if after.data_ptr() == entered.data_ptr() and total is not None and before.numel() == total.numel():
            return _near(before.flatten() + written.flatten(), total)
    return False


def _confirmed(model: nn.Module, block: Block, seen: dict[str, list[tuple[Tensor, Tensor]]]) -> Block:
    calls = {path: len(seen.get(path, [])) for path in {block.entry, *block.first, block.last}}
    if set(calls.values()) != {1}:
        raise ModelError(
            f"the block's parts were called {calls} times in one forward pass, not once each",
            where=block.path,
            cause="the block is shared, routed or skipped",
            fix="leave it out with --blocks",
        )
    activation = activation_of(attribute(model, block.activation_path), block).function
    hidden_in = seen[block.last][0][0]
    parts = [seen[path][0][1] for path in block.first]
    entry_in, entry_out = seen[block.entry][0]
    same_input = all(torch.equal(seen[path][0][0].flatten(), entry_in.flatten()) for path in block.first)
    if block.kind == "plain":
        readings = {block.first: activation(parts[0])}
        same_output = True
    else:
        gate, up = parts if block.kind == "gated" else parts[0].chunk(2, dim=-1)
        readings = {block.first: activation(gate) * up}
        if block.kind == "gated":
            readings[block.first[::-1]] = activation(up) * gate
        same_output = _near(entry_out, seen[block.last][0][1])
    for first, hidden in readings.items():
        if same_input and same_output and _near(hidden, hidden_in):
            return replace(block, first=first)
    raise ModelError(
        f"recomputing the {block.kind} block from the weights found does not give what the model computes",
        where=block.path,
        cause="something else happens inside it (clamping, a norm, another order of gate and up)",
        fix="leave it out with --blocks; the model is unchanged",
    )


def _near(a: Tensor, b: Tensor) -> bool:
    a, b = a.float().flatten(), b.float().flatten()
    return a.shape == b.shape and bool((a - b).norm() <= CONFIRM_TOLERANCE * b.norm() + 1e-30)
