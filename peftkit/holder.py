"""What a grafted module holds: its adapters, and the switch that says which of them act."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

CHILD = "peftkit"  # the name under which a grafted module holds its adapters
Names = tuple[str, ...]


class _PerThread(threading.local):
    names: Names | None  # what acts in this thread alone; None where the thread follows the model

    def __init__(
        self,
    ) -> None:  # in every thread: of an attribute of the class alone, no compiler guards that it is hidden
        self.names = None


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
        merged: keys of the adapters that the weights hold, with the versions of their tensors at merging.
        kept: the host's parameters as they were before merging.
    """

    switch: Switch
    merged: dict[str, tuple[float, ...]]
    kept: dict[str, Tensor]

    def __init__(self, switch: Switch):
        super().__init__()
        vars(self).update(switch=switch, merged={}, kept={})  # nn.Module's __setattr__ is slow

    def forward(self, x: Any) -> Any:
        """Nothing, for modules that call all of their children in turn."""
        return x

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

    def acting_on_parts(self, names: Names) -> list[Any]:
        """The same for the adapters on parts of the module."""
        return self.acting(tuple(k for n in names for k in self._modules if k.startswith(n + ":")))

    def _still_merged(self, key: str, adapter: nn.Module) -> None:
        if not torch.compiler.is_compiling() and versions(adapter) != self.merged[key]:
            raise RuntimeError(
                f"adapter {key!r} was changed while merged, so the merged weight no longer holds it; "
                "call unmerge(model), and merge(model) again if you want the new values merged"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Counters start anew in a copy, so it is told whether they have moved."""
        kept = {key: at == versions(self._modules[key]) for key, at in self.merged.items()}  # type: ignore[arg-type]
        return {**self.__dict__, "merged": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.merged = {k: versions(self._modules[k]) if kept else () for k, kept in self.merged.items()}  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"Graft({', '.join(self._modules) or 'no adapters'})"


def versions(adapter: nn.Module) -> tuple[float, ...]:
    """Its scale, where it has one, and counters that every in-place change of its tensors moves."""
    return (getattr(adapter, "scale", 1.0), *(-1 if p.is_inference() else p._version for p in adapter.parameters()))


class Grafted:
    """Marks a module whose class was swapped; `__grafted__` is the class it came with."""

    __grafted__: type[nn.Module]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before it was grafted."""
    return getattr(type(module), "__grafted__", type(module))


def graft_of(module: nn.Module) -> Graft | None:
    """The child that holds the module's adapters; None where it has none."""
    children = module._modules  # a scripted module's has no `get`
    child = children[CHILD] if CHILD in children else None
    return child if isinstance(child, Graft) else None


def without_merged(module: nn.Module, name: str) -> Tensor | None:
    """The module's parameter `name` without the adapters that may be merged into it; None where it has none."""
    graft = graft_of(module)
    kept = graft.kept.get(name) if graft is not None else None
    own = module._parameters.get(name)
    if kept is None or own is None or own.is_meta:
        return own if kept is None else kept
    return kept.to(own)  # the model may have been cast or moved meanwhile
