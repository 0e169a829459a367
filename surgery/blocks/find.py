"""Finds a transformer's feed-forward blocks by their structure.

A block is two or three linear maps and an activation, wherever they sit:

    gated   gate: d → h, up: d → h, down: h → o      σ(gate x) ⊙ (up x)       Llama, Qwen, Gemma, T5 v1.1, CPM-Ant, …
    fused   gate_up: d → 2h,        down: h → o      the same, in one matrix  Phi-3, GLM, …
    plain   first: d → h,           last: h → o      σ(first x)               GPT-2, OPT, Phi, BERT, ESM, ViT, T5, …
    experts any of these, many times over in one module (:mod:`surgery.blocks.experts`)  Mixtral, Qwen3-MoE, OLMoE, …

Names are hints only (which of two equal maps is the gate). Whatever looks like a feed-forward block and does not fit
is listed with the reason and left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from surgery.blocks import experts
from surgery.blocks.block import Block, ExpertsBlock, FusedBlock, GatedBlock, HalfBlock, PlainBlock
from surgery.blocks.parts import attribute, is_linear, shape_of
from surgery.closed_form.activations import recognise

NO_ACTIVATION = "no activation between two linear maps was recognised"
GATE_HINTS = ("gate", "w1", "wi_0", "fc1_g", "linear_1")


@dataclass(frozen=True)
class Survey:
    """What a model contains: blocks that can be converted, and (path, reason) for those left alone."""

    blocks: tuple[Block, ...]
    left_alone: tuple[tuple[str, str], ...]


def survey(model: nn.Module) -> Survey:
    """Every feed-forward block by structure. Works on meta weights; nothing is run."""
    found: list[Block] = []
    left: list[tuple[str, str]] = []
    claimed: set[str] = set()
    for path, module in model.named_modules():
        if path == "" or any(path.startswith(f"{claim}.") for claim in claimed):
            continue
        if experts.layout(module) is not None:
            block, reason = _experts(path, module)
        elif _mixture(module):
            if any(experts.layout(part) is not None for part in module.modules()):
                continue  # apart from the router, what is inside is looked at by itself
            block, reason = None, "mixture of experts in a form that is not known"
            claimed.add(path)
        else:
            block, reason = _read(model, path, module)
            if block is not None and _holds_another(model, block, module):
                # A gate on a layer's side input, say (Gemma 3n): the feed-forward block is the one inside.
                block, reason = None, "two linear maps beside a feed-forward block"
        if block is not None:
            found.append(block)
            claimed |= _claim(block, module)
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
    # A wrapper around a block, or a list of them, that is called as blocks are is no block by itself.
    left = [(path, why) for path, why in left if why != NO_ACTIVATION or not _contains(path, found)]
    left.extend(_silent_layers(model, found, left))
    return Survey(tuple(unique), tuple(left))


def _contains(path: str, blocks: Iterable[Block]) -> bool:
    return any(block.path.startswith(f"{path}.") for block in blocks)


def _experts(path: str, module: nn.Module) -> tuple[Block | None, str]:
    reason = experts.why_not(module)
    if reason is not None:
        return None, reason
    width, hidden, out = experts.widths(module)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    try:
        name = experts.unit(module).name
    except ValueError as error:
        return None, str(error)
    found = ExpertsBlock(
        path, (), path, path, name, width, hidden, out, parameters, experts.count(module), passes=experts.passes(module)
    )
    return found, ""


def _mixture(module: nn.Module) -> bool:
    """Whether the module routes tokens to experts, or looks like it."""
    name = type(module).__name__.lower()
    children = dict(module.named_children())
    if sum(is_linear(child) for child in children.values()) >= 2 and "router" not in children:
        return False  # one feed-forward block, however it is called
    if "sparsemoe" in name or name.endswith(("moe", "experts")):
        return True
    stacked = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1]
    routed = any(key in children for key in ("router", "experts"))
    return routed or (len(stacked) >= 2 and len(set(stacked)) == 1)


def _read(model: nn.Module, path: str, module: nn.Module) -> tuple[Block | None, str]:
    """The block whose maps are direct children of `module` (or its BERT-style split pair), else why not."""
    children = dict(module.named_children())
    split = _split_pair(children)
    if split is not None:
        return _plain(model, path, *split), ""
    apart = _gate_apart(path, children)
    if apart is not None:
        return _block(GatedBlock, model, path, *apart), ""
    linears = {name: child for name, child in children.items() if is_linear(child)}
    activation = _activation_name(module)
    functional = len(linears) == 3 and len(linears) == len(list(module.parameters()))  # F.silu in the forward (LFM2)
    if len(linears) < 2 or (activation is None and not functional):
        looks = path.rpartition(".")[2] in ("mlp", "feed_forward", "ffn") and bool(list(module.parameters()))
        inside = any(is_linear(m) for m in module.modules())
        return None, NO_ACTIVATION if looks and inside else ""
    activation_path = "" if activation is None else f"{path}.{activation}"
    names = list(linears)
    shapes = {name: shape_of(child) for name, child in linears.items()}
    full = {name: f"{path}.{name}" for name in names}
    if len(names) == 3:
        for last in names:
            one, two = (name for name in names if name != last)
            out, hidden = shapes[last]
            if shapes[one] == shapes[two] and shapes[one][0] == hidden and shapes[one][1] == out:
                if hidden == out and (last != names[-1] or not activation_path):
                    continue
                gate, up = (two, one) if _gate_like(two) and not _gate_like(one) else (one, two)
                return _block(GatedBlock, model, path, (full[gate], full[up]), full[last], activation_path), ""
    if activation is None:
        return None, ""
    if len(names) == 2:
        first, last = names
        if shapes[first][0] == 2 * shapes[last][1]:
            return _block(FusedBlock, model, path, (full[first],), full[last], activation_path), ""
        if shapes[first][0] == shapes[last][1]:
            return _block(PlainBlock, model, path, (full[first],), full[last], activation_path), ""
    # A layer with attention and a feed-forward pair inline (OPT): the pair is the one that widens and narrows.
    pairs = [
        (a, b)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if shapes[a][0] == shapes[b][1] and shapes[a][1] == shapes[b][0] and shapes[a][0] > shapes[a][1]
    ]
    if len(pairs) == 1:
        return _block(PlainBlock, model, path, (full[pairs[0][0]],), full[pairs[0][1]], activation_path), ""
    return None, f"{len(names)} linear maps and an activation, but no pair or triple of matching widths"


def _claim(block: Block, module: nn.Module) -> set[str]:
    """Where no further block is looked for: the block's module, or, of a layer with the maps in two of its parts, all
    parts that are no list of further blocks (MobileBERT's)."""
    if block.path in _holders(block):
        return {block.path}
    return {f"{block.path}.{name}" for name, part in module.named_children() if not isinstance(part, nn.ModuleList)}


def _holders(block: Block) -> set[str]:
    """Paths of the modules whose direct children the block's maps are."""
    return {path.rpartition(".")[0] for path in (*block.first, block.last)} if block.first else {block.path}


def _holds_another(model: nn.Module, block: Block, module: nn.Module) -> bool:
    """Whether a block inside `module` makes two maps beside it none; of maps in parts of their own it does not."""
    halves = _holders(block)
    nested = any(not is_linear(child) and any(map(is_linear, child.modules())) for child in module.children())
    if block.path not in halves or not nested:
        return False
    inside = ((f"{block.path}.{name}", part) for name, part in module.named_modules() if name and not is_linear(part))
    return any(_read(model, path, part)[0] is not None for path, part in inside if path not in halves)


def _gate_like(name: str) -> bool:
    return any(hint in name for hint in GATE_HINTS)


def _split_pair(children: dict[str, nn.Module]) -> tuple[str, str, str] | None:
    """BERT's intermediate.dense + activation, output.dense, siblings in one layer.

    ESM calls its activation as a function: then intermediate holds one matrix and nothing else, and the last is empty.
    """
    wide, narrow = children.get("intermediate"), children.get("output")
    if wide is None or narrow is None:
        return None
    activation = _activation_name(wide)
    first, last = getattr(wide, "dense", None), getattr(narrow, "dense", None)
    if first is None or last is None or not (is_linear(first) and is_linear(last)):
        return None
    if activation is None:
        bare = list(wide.children()) == [first] and shape_of(first) == shape_of(last)[::-1]
        return ("intermediate.dense", "output.dense", "") if bare else None
    return "intermediate.dense", "output.dense", f"intermediate.{activation}"


def _gate_apart(path: str, children: dict[str, nn.Module]) -> tuple[tuple[str, str], str, str] | None:
    """(first maps, last, activation), where the last map stands beside a module with the others in it (CPM-Ant)."""
    last = [name for name, child in children.items() if is_linear(child)]
    inner = [name for name, child in children.items() if name not in last and not _small(child)]
    if len(last) != 1 or len(inner) != 1 or isinstance(children[inner[0]], nn.ModuleList | nn.Sequential):
        return None
    first, activation = dict(children[inner[0]].named_children()), _activation_name(children[inner[0]])
    names = [name for name, child in first.items() if is_linear(child)]
    if activation is None or len(names) != 2 or shape_of(first[names[0]]) != shape_of(first[names[1]]):
        return None
    if shape_of(first[names[0]]) != shape_of(children[last[0]])[::-1]:
        return None
    whole = [f"{path}.{inner[0]}.{name}" for name in (*names, activation)]
    return (whole[0], whole[1]), f"{path}.{last[0]}", whole[2]


def _plain(model: nn.Module, path: str, first: str, last: str, activation: str) -> Block:
    if activation:
        return _block(PlainBlock, model, path, (f"{path}.{first}",), f"{path}.{last}", f"{path}.{activation}")
    half = f"{path}.{first.partition('.')[0]}"
    return _block(HalfBlock, model, path, (f"{path}.{first}",), f"{path}.{last}", "", half=half)


def _activation_name(module: nn.Module) -> str | None:
    """The attribute that holds the activation: a child with next to no parameters, or a plain function, named or
    classed like one."""
    children = {
        name: child
        for name, child in module.named_children()
        if _small(child) and not isinstance(child, nn.Dropout | nn.Identity)
    }
    functions = [name for name, value in vars(module).items() if callable(value) and not isinstance(value, type)]
    candidates = [name for name in (*children, *functions) if "act" in name.lower()]
    if not candidates:
        candidates = [name for name, child in children.items() if _classed_like_activation(child)]
    return candidates[0] if len(candidates) == 1 else None


def _small(module: nn.Module) -> bool:
    return all(parameter.numel() == 1 for parameter in module.parameters())  # xIELU learns two


def _classed_like_activation(module: nn.Module) -> bool:
    if isinstance(module, nn.Softmax):
        return False
    name = type(module).__name__.lower()
    return type(module).__module__.endswith("activation") or any(word in name for word in ("elu", "silu", "swish"))


def _block(
    kind: type[Block], model: nn.Module, path: str, first: tuple[str, ...], last: str, activation_path: str, **more: str
) -> Block:
    out, hidden = shape_of(model.get_submodule(last))
    width = shape_of(model.get_submodule(first[0]))[1]
    parameters = sum(p.numel() for part in (*first, last) for p in model.get_submodule(part).parameters())
    name = "found when run"
    if activation_path:
        function = attribute(model, activation_path)
        name = getattr(function, "__name__", type(function).__name__)
        if not any(parameter.is_meta for parameter in getattr(function, "parameters", list)()):
            row = recognise(function, name)
            name = row.name if row is not None else f"{name} (not elementwise)"
    return kind(path, first, last, activation_path, name, width, hidden, out, parameters, **more)  # type: ignore[arg-type]


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
