"""The surgery: how adapters hang on a module that stays the module it was.

Nothing is replaced. A grafted module keeps its identity, parameters, hooks and names; its class becomes a cached
subclass of its own class, and its adapters hang on it as one child module. Ejecting gives the class back. This is the
only file that changes a module.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from peftkit.holder import CHILD, Graft, Grafted, Switch, graft_of, original_class
from peftkit.reading import READING, all_readable, read, reads, stand_in, without_graft

# -- the class ----------------------------------------------------------------------------------------------------------


def _forward_for(base: type[nn.Module]) -> Callable[..., Any]:
    reads_weights = issubclass(base, READING)

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        graft: Any = self._modules.get(CHILD)
        if graft is None:  # a bound method that somebody kept beyond eject
            return base.forward(self, *args, **kwargs)
        names = graft.switch.local.names
        if names is None:
            names = graft.switch.names
        if "forward" in self.__dict__:  # called by what replaced it, and the adapters are around that
            return read(self, names, *args, **kwargs) if reads_weights else base.forward(self, *args, **kwargs)
        if len(names) == 1 and not graft.merged and not reads_weights:
            adapter = graft._modules.get(names[0])
            if adapter is None:
                return base.forward(self, *args, **kwargs)
            if adapter.can_fuse:
                return adapter.fused(self, *args, **kwargs)
        call = functools.partial(read if reads_weights else base.forward, self, *((names,) if reads_weights else ()))
        acting = graft.acting(names)
        if len(acting) > 1 and not reads_weights and all(a.can_fuse and type(a) is type(acting[0]) for a in acting):
            return acting[0].fused_together(acting, self, *args, **kwargs)
        return _nested(call, acting)(*args, **kwargs)

    return forward


def _nested(call: Callable[..., Any], acting: list[Any]) -> Callable[..., Any]:
    """`call` with the acting adapters around it, those that gather by class outermost, whatever the order of acting."""
    gathering: dict[type, list[Any]] = {}
    for adapter in acting:
        if adapter.gathers:
            gathering.setdefault(type(adapter), []).append(adapter)
        else:
            call = functools.partial(adapter.forward, call)
    for cls in sorted(gathering, key=lambda cls: cls.gathers):  # type: ignore[attr-defined]
        call = functools.partial(cls.gathered, gathering[cls], call)  # type: ignore[attr-defined]
    return call


def _around(module: nn.Module, replacement: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What stands on a grafted instance as its `forward` where that was replaced: the adapters around it.

    The class's forward adds none in that case, since the replacement may call it.
    """
    graft = graft_of(module)
    now = module.__dict__.get("forward")
    if graft is None or now is None or now.args[1] is not replacement:  # replaced in its turn
        return replacement(*args, **kwargs)
    names = graft.switch.acting()
    call = _nested(replacement, graft.acting(names))
    if torch.compiler.is_compiling() or not isinstance(module, nn.MultiheadAttention):
        return call(*args, **kwargs)
    before = reads.count
    result = call(*args, **kwargs)
    if reads.count == before and stand_in(module, names) is not module:
        raise RuntimeError(
            f"the forward that was put in place of this {original_class(module).__name__}'s own does not call it, so "
            "nothing reads the adapted weights; eject the adapter here, or call the forward that was replaced"
        )
    return result


def _replaced(module: nn.Module, replacement: Callable[..., Any]) -> functools.partial[Any]:
    made = functools.partial(_around, module, replacement)
    for name in ("__wrapped__", "__name__", "__doc__"):  # signatures are read off forwards
        if hasattr(replacement, name) or name == "__wrapped__":
            setattr(made, name, getattr(replacement, name, replacement) if name != "__wrapped__" else replacement)
    return made


@functools.cache
def _graft_class(base: type[nn.Module]) -> type[nn.Module]:
    forward = _forward_for(base)

    def setattr_(self: nn.Module, name: str, value: Any) -> None:
        if name == "forward" and graft_of(self) is not None:
            if getattr(value, "__func__", None) is forward and value.__self__ is self:
                self.__dict__.pop("forward", None)  # a hook gives back what it found
                return
            if getattr(value, "func", None) is not _around:
                value = _replaced(self, value)
        base.__setattr__(self, name, value)

    def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        graft = graft_of(self)
        if graft is not None and graft.merged and any(k.startswith(prefix) for k in state_dict):
            raise RuntimeError(f"the weights of {prefix[:-1]!r} hold a merged adapter; unmerge(model) before loading")
        base._load_from_state_dict(self, state_dict, prefix, *args)

    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        getstate = getattr(self, "__getstate__", None)  # every object has one from Python 3.11 on
        return _rebuild, (base,), self.__dict__ if getstate is None else getstate()

    body: dict[str, Any] = {
        "__grafted__": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__setattr__": setattr_,
        "__reduce_ex__": reduce_ex,
        "_load_from_state_dict": load,
        "forward": forward,
    }
    if issubclass(base, nn.TransformerEncoder):
        # its layers' stand-in weights carry gradients, which nested tensors do not, and what must be called has no use
        # for a tensor without sizes
        body["use_nested_tensor"] = property(
            lambda self: self.__dict__["use_nested_tensor"] and not torch.is_grad_enabled() and all_readable(self),
            lambda self, value: self.__dict__.__setitem__("use_nested_tensor", value),
        )
    if issubclass(base, nn.Sequential):  # a list of its children
        body["__len__"] = lambda self: len(self._modules) - (CHILD in self._modules)
        body["__iter__"] = lambda self: iter([m for key, m in self._modules.items() if key != CHILD])
        body["__getitem__"] = lambda self, index: without_graft(self)[index]  # type: ignore[index]
    # the names stay: accelerate and transformers know classes by them, the latter what a model can give out beside logits
    return type(base.__name__, (Grafted, base), body)  # type: ignore[return-value]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = _graft_class(base)
    return cls.__new__(cls)


# -- attaching and giving back --------------------------------------------------------------------------------------------


def why_not_graft(module: nn.Module) -> str | None:
    """Why the class of `module` cannot be swapped; None where it can, or has been."""
    cls = type(module)
    if issubclass(cls, Grafted):
        return why_not_ungraft(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a scripted module, whose forward is compiled already"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized (weight_norm or the like); remove the parametrization first"
    for name in (CHILD, "__grafted__"):
        if hasattr(module, name):
            return f"it has an attribute {name!r} of its own, the name that its adapters need"
    if any(c.__dict__.get("__slots__") for c in cls.__mro__):
        return f"{cls.__name__} has __slots__, another memory layout than nn.Module's"
    if isinstance(module, READING) and "forward" in module.__dict__ and not _own_forwards(module, cls.forward):
        return "its forward was replaced by one that reads the weights past the adapter; replace it after attaching"
    try:
        _graft_class(cls)
    except Exception as error:  # a metaclass or __init_subclass__ may forbid it
        return f"{cls.__name__} cannot be subclassed: {error}"
    return None


def why_not_ungraft(module: nn.Module) -> str | None:
    """Why the class that a grafted module had cannot be given back; None where it can."""
    if "__grafted__" in type(module).__dict__:
        return None
    later = next(c for c in type(module).__mro__ if "__grafted__" in c.__dict__)
    made = type(module).__name__
    return f"something made its class {made} out of Grafted{later.__name__} after attaching; undo that first"


def graft(module: nn.Module, switch: Switch) -> Graft:
    """Swap the class of `module` and give it the child for its adapters; `why_not_graft` must have said None."""
    found = graft_of(module)
    if found is not None:
        return found
    made = Graft(switch)
    made.training = module.training
    base = type(module)
    module.__class__ = cls = _graft_class(base)
    if isinstance(module, READING):  # what accelerate kept to call later must read what the adapters make of it
        for name in _own_forwards(module, base.forward):
            module.__dict__[name] = cls.forward.__get__(module)
    module._modules[CHILD] = made
    if "forward" in module.__dict__:
        module.__dict__["forward"] = _replaced(module, module.__dict__["forward"])
    return made


def _own_forwards(module: nn.Module, forward: Callable[..., Any]) -> list[str]:
    """Attributes of the module that hold its own bound `forward`."""
    return [
        name
        for name, value in module.__dict__.items()
        if getattr(value, "__self__", None) is module and getattr(value, "__func__", None) is forward
    ]


def ungraft(module: nn.Module) -> None:
    """Give the class back; the last adapter is gone already, and `why_not_ungraft` must have said None."""
    if graft_of(module) is not None:
        _give_back(module)


def _give_back(module: nn.Module) -> None:
    base = original_class(module)
    ours = type(module).forward
    del module._modules[CHILD]
    module.__class__ = base
    for name in _own_forwards(module, ours):  # hooks that came later keep the forward they found
        module.__dict__[name] = base.forward.__get__(module)
    for name, value in list(module.__dict__.items()):
        if getattr(value, "func", None) is _around:
            module.__dict__[name] = value.args[1]


def freeze(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Turn off `requires_grad` of every parameter; returns which were on, by holder and name."""
    turned = []
    for module in modules:
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad:
                p.requires_grad = False  # as a method it fails on lazy parameters
                turned.append((module, name))
    return turned


def unfreeze(turned: Iterable[tuple[nn.Module, str]]) -> None:
    """Turn it on again for what `freeze` returned."""
    for module, name in turned:
        p = module._parameters[name] if name in module._parameters else None
        if p is not None:
            p.requires_grad = True


def underneath(module: nn.Module) -> Callable[..., Any]:
    """What the module computes without any adapter."""
    if graft_of(module) is None:
        return module.forward
    replaced = module.__dict__.get("forward")
    return functools.partial(original_class(module).forward, module) if replaced is None else replaced.args[1]


def plain_copy(module: nn.Module) -> nn.Module:
    """A deep copy of the module as it would be without adapters."""
    memo: dict[int, Any] = {id(g): None for m in module.modules() if (g := graft_of(m)) is not None}
    made = copy.deepcopy(module, memo)
    for m in made.modules():
        if CHILD in m._modules and m._modules[CHILD] is None:
            _give_back(m)
    return made
