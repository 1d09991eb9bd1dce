"""The places in a model that an adapter can hang on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from peftkit.holder import Graft


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A place an adapter can hang on: a module, or one of several weights of a module.

    Attributes:
        name: dotted path from the model; for a part, the path of the module and the part (``"attn.in_proj"``).
        module: the module.
        part: which weight, where a module holds several: ``nn.MultiheadAttention``'s ``"in_proj"``, or its
            ``"q_proj"``, ``"k_proj"`` and ``"v_proj"``; None where the module is the site.
        aliases: other names that patterns may use: further paths to the same module, and for what belongs to an
            ``nn.MultiheadAttention`` the path of that.
        reader: the `nn.MultiheadAttention` that reads this weight instead of calling a module, if there is one.
    """

    name: str
    module: nn.Module
    part: str | None = None
    aliases: tuple[str, ...] = ()
    reader: nn.MultiheadAttention | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def module_name(self) -> str:
        """Dotted path of the module."""
        return self.name if self.part is None else self.name.rpartition(".")[0]

    def full_name(self, name: str) -> str:
        """Dotted path from the model of what the module calls `name`."""
        return f"{self.module_name}.{name}" if self.module_name else name

    @property
    def weight_name(self) -> str:
        return "weight" if self.part is None else f"{self.part}_weight"

    @property
    def bias_name(self) -> str:
        return "bias" if self.part is None else "in_proj_bias"


def walk(model: nn.Module) -> list[Site]:
    """Every module of `model` once, in order, with all of its names; adapters are left out."""
    paths: dict[int, list[str]] = {}
    found: list[tuple[nn.Module, nn.Module | None]] = []
    above: set[int] = set()  # ids of the modules that lead here: one that holds itself is not entered again

    def visit(module: nn.Module, path: str, parent: nn.Module | None) -> None:
        at = id(module)
        known = paths.get(at)
        if known is None:
            paths[at] = [path]
            found.append((module, parent))
        else:
            known.append(path)
        if module._modules and at not in above:
            above.add(at)
            prefix = path + "." if path else ""
            for key, child in module._modules.items():
                if child is not None and type(child) is not Graft:
                    visit(child, prefix + key, module)
            above.discard(at)

    visit(model, "", None)
    sites = []
    for module, parent in found:
        name, *aliases = paths[id(module)]
        reader = parent if isinstance(parent, nn.MultiheadAttention) else None
        sites.append(Site(name, module, None, (*aliases, *(paths[id(reader)] if reader else ())), reader))
        if isinstance(module, nn.MultiheadAttention):
            same = module.in_proj_weight is not None
            for part in ("in_proj",) if same else ("q_proj", "k_proj", "v_proj"):
                names = [f"{p}.{part}" if p else part for p in (name, *aliases)]
                sites.append(Site(names[0], module, part, (*names[1:], name, *aliases), module))
    return sites


def layer_index(name: str) -> int | None:
    """The index of the block that `name` lies in: its first numeric component; None outside of all blocks."""
    for component in name.split("."):
        if component.isdigit():
            return int(component)
    return None


def starred(name: str) -> str:
    """`name` with a star for every number in it, so that blocks of one kind have one name."""
    return ".".join("*" if component.isdigit() else component for component in name.split("."))


def base_parameters(everything: Iterable[Site]) -> list[nn.Parameter]:
    """The parameters of all that `walk` found, each once; those of adapters are not among them."""
    found = {id(p): p for s in everything if s.part is None for p in s.module._parameters.values() if p is not None}
    return list(found.values())
