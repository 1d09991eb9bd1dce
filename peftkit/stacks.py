"""Stacks: the blocks that a model repeats, such as a transformer's layers, and how deep its other modules lie.

A stack is a `ModuleList`, or a `Sequential` of modules of one class, in which every member holds several matrices; of
stacks within stacks the outermost counts, so a Swin's or a ConvNeXt's blocks are its stages. A model may have more than one
(encoder and decoder, image and text), but what a head repeats is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from peftkit.blocks import matrices
from peftkit.holder import original_class
from peftkit.running_order import by_last_mention, children
from peftkit.sites import Site, walk
from peftkit.targets import Pattern, Patterns, TargetError, heads, nearest

Blocks = Pattern | Sequence[Pattern] | Sequence[nn.Module] | nn.Module
_HEADS = frozenset({"heads", "lm_heads", "classifiers", "prediction_heads"})  # `targets` knows single ones
_COMPILED = "_orig_mod"  # where `torch.compile(module)` keeps the module


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One block: its name, the same whether or not it or the model is compiled or wrapped, and the module."""

    name: str
    module: nn.Module


def unwrapped(model: nn.Module) -> nn.Module:
    """What `torch.compile`, DataParallel or DistributedDataParallel was given."""
    while True:
        inner = model._modules.get(_COMPILED)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def plain_name(name: str) -> str:
    """A dotted name without what `torch.compile` puts into it."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def find(model: nn.Module, given: Blocks | None = None) -> list[Block]:
    """The blocks of `model` in order, each once.

    Args:
        given: patterns as in a config's `targets` (`"model.layers.*"`), or the modules themselves, one `ModuleList` too;
            None finds the stacks.

    Raises:
        TargetError: no stack is found, a pattern matches nothing, a module is not the model's, one block lies in another.
    """
    model = unwrapped(model)
    sites = [site for site in walk(model) if site.part is None and site.name]
    if given is None:
        wanted = {id(m) for m in _stacked(model)}
        if not wanted:
            raise TargetError(
                f"no repeated blocks were found in this {type(model).__name__}; name them, for instance "
                f"blocks='layers.*'{nearest('layers.*', (s.name for s in sites))}"
            )
    else:
        wanted = _named(sites, given)
    found = [Block(plain_name(site.name), site.module) for site in sites if id(site.module) in wanted]
    _check_apart(found)
    return found


def depths(model: nn.Module, blocks: Sequence[Block]) -> dict[int, int]:
    """How deep each module lies, adapters included, by id: 0 below the blocks, 1 to L in them, L + 1 above.

    What runs before the first block is below, what runs after the last one above, as far as the source of `forward` tells,
    and else by registration; what stands between two stacks belongs to the block before it. Embeddings are below and
    output heads above, wherever they stand.
    """
    model = unwrapped(model)
    numbers = {id(block.module): i + 1 for i, block in enumerate(blocks)}
    holding = {id(m) for m in model.modules() if any(id(inner) in numbers for inner in m.modules())}
    of_heads = heads(model)
    found: dict[int, int] = {}

    def settle(module: nn.Module, depth: int) -> None:
        for inner in module.modules():
            found.setdefault(id(inner), depth)

    def visit(module: nn.Module, passed: int) -> int:
        """Settle the module; returns how many blocks have run once it has."""
        at = id(module)
        if at in numbers:
            settle(module, numbers[at])
            return max(passed, numbers[at])
        above = len(blocks) + 1
        if at in holding:
            if at in found:  # it holds itself, or stands in two places
                return passed
            found[at] = passed if passed < len(blocks) else above
            for child in by_last_mention(module):
                passed = visit(child, passed)
        elif at in of_heads:
            settle(module, above)
        else:
            for inner in module.modules():
                if isinstance(inner, nn.Embedding):
                    settle(inner, 0)
            settle(module, passed if passed < len(blocks) else above)
        return passed

    visit(model, 0)
    settle(model, 0)  # adapters on what holds blocks
    return found


def _stacked(model: nn.Module) -> Iterable[nn.Module]:
    if isinstance(model, nn.ModuleList | nn.Sequential) and (members := _members(model)):
        yield from members
        return
    of_heads = heads(model)
    stacks, others = [], []
    for key, child in children(model):
        if id(child) in of_heads or key in _HEADS:
            continue
        listed = isinstance(child, nn.ModuleList | nn.Sequential)
        (stacks if listed and _members(child) else others).append((key, child))
    for _, stack in _alike(model, stacks):
        yield from _members(stack)
    for _, child in others:
        yield from _stacked(child)


def _alike(parent: nn.Module, stacks: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Of stacks beside each other those that are the model's: of unlike ones the longest.

    Raises:
        TargetError: unlike ones of one length, as where attentions and feed-forwards have a list each.
    """
    classes = {key: {_class(m) for m in _members(stack)} for key, stack in stacks}
    if len(stacks) < 2 or all(classes[key] & classes[stacks[0][0]] for key, _ in stacks):
        return stacks
    longest = max(len(_members(stack)) for _, stack in stacks)
    kept = [(key, stack) for key, stack in stacks if len(_members(stack)) == longest]
    if len(kept) > 1:
        raise TargetError(
            f"{type(parent).__name__} has {' and '.join(key for key, _ in kept)} beside each other, {longest} each, so what "
            f"is a block cannot be told; name the blocks, for instance blocks='{kept[0][0]}.*'"
        )
    return kept


def _members(stack: nn.Module) -> list[nn.Module]:
    """What a stack repeats; nothing where it is none."""
    members = [m for _, m in children(stack)]
    if isinstance(stack, nn.Sequential) and (len(members) < 2 or len({_class(m) for m in members}) > 1):
        return []
    return members if members and all(len(matrices(m)) > 1 for m in members) else []


def _class(module: nn.Module) -> type[nn.Module]:
    return original_class(module._modules.get(_COMPILED) or module)


def _named(sites: Sequence[Site], given: Blocks) -> set[int]:
    written = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    known = {id(s.module) for s in sites}
    modules = [m for m in written if isinstance(m, nn.Module)]
    for module in modules:
        if id(module) not in known:
            raise TargetError(f"blocks: a {type(module).__name__} that was given is no module of the model")
    written_patterns = [p for p in written if not isinstance(p, nn.Module)]
    patterns, hit = Patterns(written_patterns), set()
    wanted = {id(m) for m in modules}
    for site in sites:
        for name in site.names:
            for pattern in patterns.matching(plain_name(name)):
                hit.add(pattern)
                wanted.add(id(site.module))
    for pattern in written_patterns:
        if pattern not in hit:
            names = (s.name for s in sites)
            raise TargetError(f"blocks: {pattern!r} matches no module{nearest(pattern, names)}")
    if not wanted:
        raise TargetError("blocks: nothing was given; leave it out to have them found")
    return wanted


def _check_apart(blocks: Sequence[Block]) -> None:
    own = {id(block.module): block.name for block in blocks}
    for block in blocks:
        for inner in block.module.modules():
            if inner is not block.module and id(inner) in own:
                raise TargetError(f"blocks: {own[id(inner)]!r} lies in {block.name!r}; name one of them")
