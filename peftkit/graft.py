"""The surgery: how adapters hang on a module that stays the module it was.

Nothing is replaced. A grafted module keeps its identity, parameters, hooks and names; its class becomes a cached
subclass of its own class, and its adapters hang on it as one child module. Ejecting gives the class back. This is the
only file that changes a module.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.sites import CHILD

Names = tuple[str, ...]


class _PerThread(threading.local):
    names: Names | None = None  # what acts in this thread alone; None where the thread follows the model


class _Entered(threading.local):
    def __init__(self) -> None:
        self.depth: dict[int, int] = {}  # id of a module -> how many of its replaced forwards this thread is in


_entered = _Entered()


class Switch:
    """Which adapters act: one object for all grafted modules of a model, so that switching is one assignment."""

    def __init__(self, names: Names = ()):
        self.names = names
        self.local = _PerThread()

    def acting(self) -> Names:
        names = self.local.names
        return self.names if names is None else names

    def __reduce__(self) -> tuple[Any, ...]:
        return Switch, (self.names,)


class Graft(nn.Module):
    """The child of a grafted module. Its own children are the adapters, by name (`name:part` on a part).

    Attributes:
        switch: the model's.
        replaced: what was put in place of the module's `forward` on the instance, oldest first.
        merged: keys of the adapters that the weights hold, with the versions of their tensors at merging.
        kept: the host's parameters as they were before merging.
    """

    def __init__(self, switch: Switch):
        super().__init__()
        self.switch = switch
        self.replaced: list[Callable[..., Any]] = []
        self.was_replaced = False
        self.merged: dict[str, tuple[int, ...]] = {}
        self.kept: dict[str, Tensor] = {}

    def acting(self, names: Names) -> list[Any]:
        """The adapters of the whole module among `names`, less those the weights hold."""
        found = []
        for name in names:
            adapter = self._modules.get(name)
            if adapter is not None:
                if name in self.merged:
                    self._still_merged(name, adapter)
                else:
                    found.append(adapter)
        return found

    def acting_anywhere(self, names: Names) -> list[Any]:
        """The same, with the adapters on parts of the module."""
        return self.acting(tuple(key for name in names for key in self._modules if key.partition(":")[0] == name))

    def _still_merged(self, key: str, adapter: nn.Module) -> None:
        if not torch.compiler.is_compiling() and versions(adapter) != self.merged[key]:
            raise RuntimeError(
                f"adapter {key!r} was changed while merged, so the merged weight no longer holds it; "
                "call unmerge(model), and merge(model) again if you want the new values merged"
            )

    def __repr__(self) -> str:
        return f"Graft({', '.join(self._modules) or 'no adapters'})"


def versions(adapter: nn.Module) -> tuple[int, ...]:
    """Counters that every in-place change of the adapter's tensors moves."""
    return tuple(p._version for p in adapter.parameters())


class Grafted:
    """Marks a module whose class was swapped; `__grafted__` is the class it came with."""

    __grafted__: type[nn.Module]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before it was grafted."""
    return getattr(type(module), "__grafted__", type(module))


def graft_of(module: nn.Module) -> Graft | None:
    child = module._modules.get(CHILD)
    return child if isinstance(child, Graft) else None


# -- the class ----------------------------------------------------------------------------------------------------------


def _forward_for(base: type[nn.Module]) -> Callable[..., Any]:
    base_forward: Callable[..., Any] = base.forward
    reads_weights = issubclass(base, nn.MultiheadAttention | nn.TransformerEncoderLayer)

    @functools.wraps(base_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        graft: Any = self._modules.get(CHILD)
        if graft is None:  # a bound method that somebody kept beyond eject
            return base_forward(self, *args, **kwargs)
        switch = graft.switch
        names = switch.local.names
        if names is None:
            names = switch.names
        if not graft.replaced and not graft.merged and len(names) == 1 and not reads_weights:
            adapter = graft._modules.get(names[0])
            if adapter is None:
                return base_forward(self, *args, **kwargs)
            if adapter.can_fuse:
                return adapter.fused(self, *args, **kwargs)
        return _call(self, graft, names, base_forward, reads_weights, args, kwargs)

    return forward


def _call(
    module: nn.Module,
    graft: Graft,
    names: Names,
    base_forward: Callable[..., Any],
    reads_weights: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Nests the acting adapters around what lies beneath: a replaced forward, or the class's own."""
    if graft.replaced:
        depth = _entered.depth.get(id(module), 0)
        if depth:  # a replacement that calls the forward it replaced: the adapters are around it already
            return _replacement(module, graft, depth, base_forward)(*args, **kwargs)
        call = _replacement(module, graft, 0, base_forward)
    elif reads_weights:
        call = functools.partial(base_forward, stand_in(module, names))
    else:
        call = functools.partial(base_forward, module)
    for adapter in graft.acting(names):
        call = functools.partial(adapter.forward, call)
    return call(*args, **kwargs)


def _replacement(module: nn.Module, graft: Graft, depth: int, base_forward: Callable[..., Any]) -> Callable[..., Any]:
    if depth >= len(graft.replaced):
        return functools.partial(base_forward, module)
    replaced = graft.replaced[-1 - depth]

    def call(*args: Any, **kwargs: Any) -> Any:
        _entered.depth[id(module)] = depth + 1
        try:
            return replaced(*args, **kwargs)
        finally:
            if depth:
                _entered.depth[id(module)] = depth
            else:
                del _entered.depth[id(module)]

    return call


@functools.cache
def _graft_class(base: type[nn.Module]) -> type[nn.Module]:
    forward = _forward_for(base)

    def setattr_(self: nn.Module, name: str, value: Any) -> None:
        graft = graft_of(self) if name == "forward" else None
        if graft is None:
            base.__setattr__(self, name, value)
        elif getattr(value, "__func__", None) is forward:  # a hook gives back what it found
            graft.replaced.clear()
        else:
            graft.replaced.append(value)

    def delattr_(self: nn.Module, name: str) -> None:
        graft = graft_of(self) if name == "forward" else None
        if graft is None:
            base.__delattr__(self, name)
        elif graft.replaced:
            graft.replaced.pop()
        else:
            raise AttributeError(name)

    def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        graft = graft_of(self)
        if graft is not None and graft.merged and any(k.startswith(prefix) for k in state_dict):
            raise RuntimeError(f"the weights of {prefix[:-1]!r} hold a merged adapter; unmerge(model) before loading")
        base._load_from_state_dict(self, state_dict, prefix, *args)

    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (base,), self.__dict__

    body: dict[str, Any] = {
        "__grafted__": base,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__setattr__": setattr_,
        "__delattr__": delattr_,
        "__reduce_ex__": reduce_ex,
        "_load_from_state_dict": load,
        "forward": forward,
    }
    if issubclass(base, nn.TransformerEncoder):
        # its layers' stand-in weights carry gradients, which nested tensors do not
        body["use_nested_tensor"] = property(
            lambda self: self.__dict__["use_nested_tensor"] and not torch.is_grad_enabled()
        )
    return type(f"Grafted{base.__name__}", (Grafted, base), body)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = _graft_class(base)
    return cls.__new__(cls)


# -- modules that read the weights of others ------------------------------------------------------------------------------

READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def stand_in(module: nn.Module, names: Names) -> nn.Module:
    """What `base.forward` gets as `self` where it reads weights instead of calling modules.

    A shallow copy, of the original class, whose weights hold what acts on them. The module itself is not touched, so
    other threads see nothing. A TransformerEncoderLayer calls its modules in training and reads them in eval alone.
    """
    if isinstance(module, nn.TransformerEncoderLayer) and module.training:
        return module
    graft = graft_of(module)
    if graft is None:
        return module
    base = original_class(module)
    clone = base.__new__(base)
    clone.__dict__.update(module.__dict__)
    parameters: dict[str, Any] = dict(module._parameters)
    for adapter in graft.acting_anywhere(names):
        for name in adapter.merges:
            parameters[name] = parameters[name] + adapter.delta(name)
    children = {key: child for key, child in module._modules.items() if key != CHILD}
    calls = False
    for key, child in children.items():
        if isinstance(child, Grafted):
            below = graft_of(child)  # type: ignore[arg-type]
            readable = below is not None and not below.replaced and all(a.merges for a in below.acting_anywhere(names))
            if readable:
                children[key] = stand_in(child, names)  # type: ignore[arg-type]
            calls |= not readable
    clone.__dict__["_parameters"] = parameters
    clone.__dict__["_modules"] = children
    if calls and isinstance(module, nn.TransformerEncoderLayer):
        clone.__dict__["activation_relu_or_gelu"] = 0  # what cannot be read must be called: not the fused path
    return clone


# -- attaching and giving back --------------------------------------------------------------------------------------------


def why_not_graft(module: nn.Module) -> str | None:
    """Why the class of `module` cannot be swapped; None where it can, or has been."""
    cls = type(module)
    if issubclass(cls, Grafted):
        return None if "__grafted__" in cls.__dict__ else f"its class became {cls.__name__} after it was grafted"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a scripted module, whose forward is compiled already"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized (weight_norm or the like); remove the parametrization first"
    for name in (CHILD, "__grafted__"):
        if hasattr(module, name):
            return f"it has an attribute {name!r} of its own, the name that its adapters need"
    if any("__slots__" in c.__dict__ and c.__dict__["__slots__"] for c in cls.__mro__):
        return f"{cls.__name__} has __slots__, another memory layout than nn.Module's"
    return None


def graft(module: nn.Module, switch: Switch) -> Graft:
    """Swap the class of `module` and give it the child for its adapters; `why_not_graft` must have said None.

    Raises:
        TypeError: the class has another memory layout; the module is as it was.
    """
    found = graft_of(module)
    if found is not None:
        return found
    made = Graft(switch)
    made.training = module.training
    module.__class__ = _graft_class(type(module))
    replaced = module.__dict__.pop("forward", None)
    if replaced is not None:
        made.replaced.append(replaced)
        made.was_replaced = True
    module._modules[CHILD] = made
    return made


def ungraft(module: nn.Module) -> None:
    """Give the class back; the last adapter is gone already."""
    made = graft_of(module)
    if made is None:
        return
    base = original_class(module)
    del module._modules[CHILD]
    module.__class__ = base
    first = made.replaced[0] if made.was_replaced else None
    for name, value in list(module.__dict__.items()):
        # hooks that came later keep the forward they found; it was ours
        if getattr(value, "__self__", None) is module and hasattr(getattr(value, "__func__", None), "__wrapped__"):
            if value.__func__ is _graft_class(base).forward:
                module.__dict__[name] = first or base.forward.__get__(module)
    if made.replaced:
        module.__dict__["forward"] = made.replaced[-1]


def freeze(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Turn off `requires_grad` of every parameter; returns which were on, by holder and name."""
    turned = []
    for module in modules:
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad:
                p.requires_grad_(False)
                turned.append((module, name))
    return turned


def unfreeze(turned: Iterable[tuple[nn.Module, str]]) -> None:
    for module, name in turned:
        p = module._parameters.get(name)
        if p is not None:
            p.requires_grad_(True)


def underneath(module: nn.Module) -> Callable[..., Any]:
    """What the module computes without any adapter."""
    made = graft_of(module)
    if made is None:
        return module.forward
    return _replacement(module, made, 0, original_class(module).forward)


def plain_copy(module: nn.Module) -> nn.Module:
    """A deep copy of the module as it would be without adapters."""
    memo: dict[int, Any] = {id(g): None for m in module.modules() if (g := graft_of(m)) is not None}
    made = copy.deepcopy(module, memo)
    for m in made.modules():
        if CHILD in m._modules:
            del m._modules[CHILD]
            m.__class__ = original_class(m)
    return made
