"""Modules that read the weights of others, or their own in parts, instead of calling a module for each.

What they read must hold what acts on it. They get a stand-in for themselves, so that nothing is written and other
threads see nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.holder import CHILD, Names, graft_of, original_class

READING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
READERS = (*READING, nn.TransformerEncoder)  # the last asks the weights of its layers which way to go


class _Reads(threading.local):
    count = 0


reads = _Reads()
_KNOWN_READING = {c.forward for c in READING}


def read(module: nn.Module, names: Names, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module's own class, with what acts on the weights it reads."""
    if not torch.compiler.is_compiling():
        reads.count += 1
    base = original_class(module)
    clone = stand_in(module, names)
    result = base.forward(clone, *args, **kwargs)
    if clone is not module and base.forward not in _KNOWN_READING:
        for name, value in clone.__dict__.items():  # what somebody's subclass noted down on itself
            if name not in _OWN and module.__dict__.get(name) is not value:
                module.__dict__[name] = value
    return result


_OWN = ("_parameters", "_modules", "activation_relu_or_gelu")


def stand_in(module: nn.Module, names: Names) -> nn.Module:
    """What reads weights gets as `self`: a shallow copy of the original class whose weights hold what acts on them.

    The module itself where nothing does. It is not touched, so other threads see nothing. A TransformerEncoderLayer
    calls its modules in training and reads them in eval alone.
    """
    graft = graft_of(module)
    encoder = isinstance(module, nn.TransformerEncoderLayer)
    if graft is None or (encoder and module.training):
        return module
    children: dict[str, Any] = {}
    calls = False
    for key, child in module._modules.items():
        below = None if child is None or key == CHILD else graft_of(child)
        if below is None or child is None:
            continue
        whole = below.acting(names)
        if isinstance(child, READING):
            readable, new = not whole, stand_in(child, names)
        else:
            readable = all(a.merges and not any("." in name for name in a.merges) for a in whole)
            readable = readable and not (encoder and "forward" in child.__dict__)
            readable = readable and (not encoder or _plain(child))
            new = _holding(child, whole) if whole and readable else child
        if not readable and not encoder:
            raise RuntimeError(
                f"{type(module).__name__} reads the weights of {key!r}, which the adapter there cannot give it"
            )
        calls |= not readable
        if new is not child:
            children[key] = new
    parts = graft.acting_on_parts(names)
    if not parts and not children and not calls:
        return module
    clone = _holding(module, parts)
    if calls:  # what cannot be read must be called: not the fused path
        clone.__dict__["activation_relu_or_gelu"] = 0
    else:
        clone.__dict__["_modules"] |= children
    return clone


def all_readable(module: nn.Module) -> bool:
    """Whether all that acts in the module acts on weights, so that nothing in it has to be called."""
    grafts = [g for m in module.modules() if (g := graft_of(m)) is not None]
    return all(adapter.merges for g in grafts for adapter in g.acting(g.switch.acting()))


def _plain(module: nn.Module) -> bool:
    return type(module._parameters.get("weight")) in (nn.Parameter, Tensor)


def _holding(module: nn.Module, adapters: Iterable[Any]) -> nn.Module:
    """A copy of the module without its graft, whose weights hold the adapters."""
    clone = without_graft(module)
    parameters: dict[str, Any] = dict(module._parameters)
    for adapter in adapters:
        for name in adapter.merges:
            parameters[name] = adapter.applied(name, parameters[name])
    clone.__dict__["_parameters"] = parameters
    return clone


def without_graft(module: nn.Module) -> nn.Module:
    """A shallow copy of the module as it is without adapters."""
    base = original_class(module)
    clone = base.__new__(base)
    clone.__dict__.update(module.__dict__)
    clone.__dict__["_modules"] = {key: child for key, child in module._modules.items() if key != CHILD}
    return clone
