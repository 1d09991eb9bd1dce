"""Blocks: which modules are whole attention or feed-forward sub-layers, how wide they are, where their output appears.

A preset such as "mlp" means single Linears to a method that acts on weights, and sub-layers to one that acts on what a
block computes. A sub-layer is found by names (those of `peftkit.targets`, then class names) and by structure. Most are
one module from x to y, with residual and norm outside. Others are not:

- post-norm ones whose module ends in `norm(… + residual)` (attention in BERT and ALBERT): their output is that of the
  last Linear before the norm;
- ones without a module of their own, whose Linears lie in the layer itself (OPT, BART, `nn.TransformerEncoderLayer`) or
  in two modules of it (BERT's `intermediate` and `output`): again the last Linear's.

Which of a module's children runs last is read from the source of its forward (`running_order`).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from peftkit.holder import original_class
from peftkit.hosts import is_hf_conv1d
from peftkit.running_order import children, in_order
from peftkit.targets import heads, sub_layer_named

Sizes = tuple[int, int]

_CLASSES = {"attention": re.compile(r"attention|attn", re.I), "mlp": re.compile(r"mlp|feed_?forward|ffn$", re.I)}
_EXPERTS = re.compile(r"experts?")
_RESIDUAL = re.compile(r"input_tensor|residual.*")
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_CONVOLUTION = nn.modules.conv._ConvNd


@dataclass(frozen=True, eq=False)
class SubLayer:
    """One sub-layer of a model.

    Attributes:
        kind: "attention" or "mlp".
        name: the path of what holds it, itself or more; of a feed-forward without a module of its own, of its layer.
        block: the module from x to y with no residual inside; None where there is none.
        exit: the Linear whose output is the sub-layer's; None where it has none (packed experts).
        joins: the module `(h, x) -> norm(exit(h) + x)`, which x reaches as the residual; None where there is none.
        adds: whether the block is given a residual and adds it, as BLOOM's are; its exit then comes before that.
    """

    kind: str
    name: str
    block: nn.Module | None
    exit: nn.Module | None
    joins: nn.Module | None = None
    adds: bool = False


def find(model: nn.Module) -> list[SubLayer]:
    """All sub-layers of `model` in order, each once; those of its output heads are left out."""
    found: list[SubLayer] = []
    of_heads = heads(model)
    seen = set(of_heads)

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        kind = _kind_by_name(name, module) if name else None
        if kind is not None and not _holds_others(kind, module):
            found.append(_resolved(kind, name, module))
            return
        before = len(found)
        for key, child in children(module):
            visit(f"{name}.{key}" if name else key, child)
        inside = found[before:]
        if not inside and name and (kind := _kind_by_class(module)) is not None:
            found.append(_resolved(kind, name, module))
        elif not any(s.kind == "mlp" for s in inside):
            attention = [s for s in inside if s.kind == "attention" and s.name.rpartition(".")[0] == name]
            found.extend(_loose(name, module, attention, of_heads) if attention else ())

    visit("", model)
    return found


def sizes(module: nn.Module) -> Sizes | None:
    """The last dimension of what `module` takes and of what it gives; None where its structure does not tell."""
    ends = _ends(module)
    if ends is not None and ends[0] == ends[1]:
        return ends
    common = None if isinstance(module, nn.Sequential) else _common_width(module)
    if common is not None and (ends is None or ends[0] == common):
        return common, common
    return ends


def linear_sizes(module: nn.Module) -> Sizes | None:
    """In and out of a Linear, whatever its weight looks like; None for what is no Linear."""
    if is_hf_conv1d(module):
        weight = module._parameters["weight"]
        return (weight.shape[0], weight.shape[1]) if weight is not None else None
    found = getattr(module, "in_features", None), getattr(module, "out_features", None)
    plain = all(isinstance(size, int) for size in found) and not children(module)
    return found if plain else None  # type: ignore[return-value]


def why_no_block(module: nn.Module) -> str | None:
    """Why no adapter can hang on what `module` computes; None where one can."""
    kind = original_class(module).__name__
    if isinstance(module, _LISTS):
        return f"it is a {kind}, which computes nothing itself; name what is in it"
    if any(p is not None and nn.parameter.is_lazy(p) for _, m in everything_in(module) for p in m._parameters.values()):
        return f"this {kind} has no shape yet; run one batch through the model first"
    if _convolves(module):
        return "it is a convolution or holds one, and of images the last dimension is no feature"
    return None


def joins_residual(module: nn.Module) -> bool:
    """Whether it is `(h, x) -> norm(Linear(h) + x)`, as BERT's `output` modules are: x enters as the residual alone."""
    taken = arguments(module)
    return (
        sum(linear_sizes(m) is not None for _, m in children(module)) == 1
        and len(taken) == 2
        and all(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in taken)
        and _RESIDUAL.fullmatch(taken[1].name) is not None
    )


def arguments(module: nn.Module) -> list[inspect.Parameter]:
    """What the module's forward takes; nothing where that cannot be told, as of a compiled one."""
    try:
        return list(inspect.signature(original_class(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return []


def everything_in(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module and all modules in it, each once, by path, adapters left out."""
    yield "", module
    yield from _below(module, {id(module)}, "")


def _below(module: nn.Module, seen: set[int], prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for key, child in children(module):
        if id(child) not in seen:
            seen.add(id(child))
            yield prefix + key, child
            yield from _below(child, seen, f"{prefix}{key}.")


# -- which modules ------------------------------------------------------------------------------------------------------


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(m, _CONVOLUTION) for _, m in everything_in(module))


def _computes(module: nn.Module) -> bool:
    """Whether it has several matrices; a single Linear, a norm or a rotary embedding is no sub-layer."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if isinstance(module, _LISTS) or linear_sizes(module) is not None:
        return False
    return len(matrices(module)) > 1 and not _convolves(module)


def _kind_by_name(name: str, module: nn.Module) -> str | None:
    kind = sub_layer_named(name.rpartition(".")[2])
    if any(_EXPERTS.fullmatch(key) for key, _ in children(module)):
        kind = kind or "mlp"
    return kind if kind is not None and _computes(module) else None


def _kind_by_class(module: nn.Module) -> str | None:
    """For what has a number for a name, such as the second of `ModuleList([attention, feed_forward])`."""
    name = original_class(module).__name__
    kind = next((kind for kind, pattern in _CLASSES.items() if pattern.search(name)), None)
    if kind is None or not _computes(module):
        return None
    found = sizes(module)
    return kind if found is not None and found[0] == found[1] else None


def _holds_others(kind: str, module: nn.Module) -> bool:
    """Whether it is a layer, or a tower of layers, rather than one sub-layer."""
    own: list[str] = []
    for name, inner in everything_in(module):
        found = _kind_by_name(name, inner) if name else None
        if found is not None and found != kind:
            return True
        if found == "attention" and not any(name.startswith(f"{other}.") for other in own):
            own.append(name)
    return len(own) > 1


# -- where the output is ------------------------------------------------------------------------------------------------


def _resolved(kind: str, name: str, module: nn.Module) -> SubLayer:
    """The sub-layer that `module` is."""
    parts = list(_parts(module))
    last = max((i for i, (m, _) in enumerate(parts) if linear_sizes(m) is not None), default=None)
    if (
        last is None
    ):  # packed experts; or XLNet's attention, which ends in a norm, and where its output is cannot be told
        ends_in_norm = bool(parts) and is_norm(parts[-1][0])
        return SubLayer(kind, name, None if ends_in_norm else module, None)
    final, holder = parts[last]
    # a Sequential adds no residual, whatever it ends in
    if not any(is_norm(m) and not isinstance(at, nn.Sequential) for m, at in parts[last + 1 :]):
        adds = any(_RESIDUAL.fullmatch(p.name) for p in arguments(module))
        return SubLayer(kind, name, module, final, adds=adds)
    for key, inner in children(module):  # MPNet's attention, whose `attn` is all but residual and norm
        if _kind_by_name(key, inner) == kind:
            whole = _resolved(kind, name, inner)
            if whole.block is inner and whole.exit is final:
                return whole
    return SubLayer(kind, name, None, final, holder if joins_residual(holder) else None)


def _loose(name: str, layer: nn.Module, attention: list[SubLayer], apart: set[int]) -> Iterator[SubLayer]:
    """The feed-forward sub-layer of a layer that has no module for it: two Linears, from d to f and back to d."""
    of_attention = {s.name.rpartition(".")[2] for s in attention}
    linears: list[tuple[str, nn.Module]] = []
    for key, child in children(layer):
        if key not in of_attention and id(child) not in apart:
            inside_it = ((f"{key}.{path}".rstrip("."), m) for path, m in everything_in(child))
            linears += [(path, m) for path, m in inside_it if linear_sizes(m) is not None]
    for i, (path, first) in enumerate(linears):
        if not any(sub_layer_named(component) == "mlp" for component in path.split(".")):
            continue
        there = linear_sizes(first)
        for other, second in linears[i + 1 :]:
            back = linear_sizes(second)
            if there is not None and back == there[::-1]:
                holder = layer.get_submodule(other.rpartition(".")[0])
                joins = holder if holder is not layer and joins_residual(holder) else None
                yield SubLayer("mlp", name, None, second, joins)
                return


# -- how wide -----------------------------------------------------------------------------------------------------------


def _parts(module: nn.Module, above: tuple[int, ...] = ()) -> Iterator[tuple[nn.Module, nn.Module]]:
    """What is in `module` and has a known size, with what holds it, in the order it runs."""
    for child in in_order(module):
        if _own_sizes(child) is not None:
            yield child, module
        elif id(child) not in above:  # one that holds itself is not entered again
            yield from _parts(child, (*above, id(module)))


def is_norm(module: nn.Module) -> bool:
    """Whether it is a normalisation layer, by its class's name."""
    return "Norm" in original_class(module).__name__ and not children(module)


def _own_sizes(module: nn.Module) -> Sizes | None:
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.embedding_dim
    if is_norm(module):
        weight = module._parameters.get("weight")
        size = weight.shape[-1] if weight is not None else (getattr(module, "normalized_shape", None) or (None,))[-1]
        return (size, size) if size else None
    return linear_sizes(module)


def _ends(module: nn.Module) -> Sizes | None:
    """What the first part of it takes and what the last one gives."""
    own = _own_sizes(module)
    if own is not None:
        return own
    found = [s for m, _ in _parts(module) if not isinstance(m, nn.Embedding) and (s := _own_sizes(m)) is not None]
    return (found[0][0], found[-1][1]) if found else None


def _common_width(module: nn.Module) -> int | None:
    """The one size that every matrix in it has: a stack of experts and its router agree on nothing else."""
    shapes = [set(shape) for shape in matrices(module)]
    common = functools.reduce(set.intersection, shapes) if shapes else set()
    return common.pop() if len(common) == 1 else None


def matrices(module: nn.Module) -> list[tuple[int, ...]]:
    """The last two sizes of every matrix and every stack of matrices in it, embeddings left out."""
    found: list[tuple[int, ...]] = []
    for _, inner in everything_in(module):
        linear = linear_sizes(inner)
        if linear is not None:  # packed weights have shapes of another kind
            found.append(linear)
        elif not isinstance(inner, nn.Embedding):
            held = [p for n, p in inner._parameters.items() if p is not None and not n.endswith("bias")]
            found += [tuple(p.shape[-2:]) for p in held if not nn.parameter.is_lazy(p) and p.dim() > 1]
    return found
