"""The contract of a method, and the registry of all of them.

A method is one frozen dataclass, its config, and one module class, its adapter. The config says where it can be
attached and builds an adapter for a site; the adapter says what its host computes with it. Declaring the config
registers the method::

    @dataclass(frozen=True, kw_only=True)
    class ScaleConfig(Config, method="scale"):
        def refuses(self, site): return None if isinstance(site.module, nn.Linear) else "it is no Linear"
        def build(self, site, plan): return ScaleAdapter(site.module.out_features)

    class ScaleAdapter(Adapter):
        def __init__(self, n): super().__init__(); self.scale = nn.Parameter(torch.ones(n))
        def forward(self, base, x): return base(x) * self.scale
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftkit.hosts import linears_in
from peftkit.sites import Site
from peftkit.targets import Targets, select

_registry: dict[str, type[Config]] = {}


class NotMergeable(ValueError):
    """An adapter that cannot be folded into its host's weights, with the reason."""


class Adapter(nn.Module):
    """What hangs on one site. Its parameters are the site's share of the method.

    Class attributes a method sets:
        tensor_names: attribute of each tensor to store -> its key in the file behind the site's name.
        fast: attributes LoRA+ trains with the higher learning rate.
        replaces: it takes the host's place rather than adding to it, so that only one may act at a time.
        reads_base: its change of a weight depends on the weight as it is without any adapter.
        gathers: other than 0 where one would see what another has changed, if they nested: those of this class on a host
            are called together, by `gathered`, around all that nest; of two such classes, the higher around the lower.
        beside: it hangs beside the sites that were chosen, see `Config.beside`, and stores nothing.
    """

    tensor_names: Mapping[str, str] = {}
    fast: ClassVar[tuple[str, ...]] = ()
    replaces: ClassVar[bool] = False
    reads_base: ClassVar[bool] = False
    gathers: ClassVar[int] = 0
    beside: ClassVar[bool] = False

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the host computes with this adapter; `base(*args, **kwargs)` is what it computes without.

        `base` is to be called once, with arguments of the host's own signature. Several active adapters nest in the
        order of attaching, so an adapter that adds to `base(...)` adds to the others.
        """
        raise NotImplementedError

    def fused(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The same with base and adapter in one computation; called where `can_fuse` and nothing lies in between."""
        raise NotImplementedError

    @classmethod
    def fused_together(cls, adapters: Sequence[Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The same with several adapters of this class, all of which can fuse; else the first, and the others around."""
        call = functools.partial(adapters[0].fused, module)
        for adapter in adapters[1:]:
            call = functools.partial(adapter.forward, call)
        return call(*args, **kwargs)

    can_fuse: bool = False

    @classmethod
    def gathered(cls, adapters: Sequence[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`forward` of one or several adapters of this class at once, where the class `gathers`."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the initial values anew; identity where the method promises it."""
        raise NotImplementedError

    # -- for adapters that act on a weight ---------------------------------------------------------------------------

    merges: Sequence[str] = ()  # parameters of the host that merging changes; empty: cannot be merged

    def why_not_merge(self) -> str | None:
        """Why merging is refused; None where it works."""
        return None if self.merges else "its effect depends on the input, so no weight can hold it"

    def delta(self, name: str) -> Tensor:
        """What to add to the host's parameter `name`, in its layout and dtype; differentiable."""
        raise NotImplementedError

    def applied(self, name: str, weight: Tensor) -> Tensor:
        """The host's parameter `name` with this adapter, for what reads weights; `weight` may hold others already."""
        return weight + self.delta(name)

    @torch.no_grad()
    def merge_(self, name: str, target: Tensor, base: Tensor) -> None:
        """Add `delta(name)` to `target` in place; `base` is the parameter without any adapter."""
        target.add_(self.delta(name).to(target))

    # -- for the file -----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What to store, by its key behind the site's name."""
        return {key: getattr(self, attribute).detach() for attribute, key in self.tensor_names.items()}

    def stored_shapes(self) -> dict[str, Sequence[torch.Size]]:
        """The shapes each stored tensor may have; the first is the usual one."""
        return {key: (t.shape,) for key, t in self.tensors().items()}

    def load_tensors(self, found: Mapping[str, Tensor]) -> None:
        """Take over stored tensors of the right shapes; they keep their dtype. Called without gradients."""
        for attribute, key in self.tensor_names.items():
            self.take(attribute, found[key])

    def take(self, attribute: str, value: Tensor) -> None:
        """Let a parameter hold `value`, which becomes its own: on the parameter's device, in the value's dtype."""
        own = self._parameters[attribute]
        assert own is not None
        if own.is_meta:  # a base whose weights come later: the adapter has its values already
            self._parameters[attribute] = nn.Parameter(value, own.requires_grad)
        else:
            own.data = value.to(own.device)


def own_parameters(adapter: Adapter) -> list[nn.Parameter]:
    """`adapter.parameters()`, which takes ten times as long for the few that most adapters have."""
    if adapter._modules:
        return list(adapter.parameters())
    return [p for p in adapter._parameters.values() if p is not None]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every method's config has.

    Args:
        targets: presets, patterns or a predicate, see `peftkit.targets`; None is the placement its paper found best.
        exclude: the same, for what to leave out; excluding a block excludes all that lies in it.
        layers: indices of the blocks to adapt, negative ones from the end; None is all.
        also_train: further modules to train and save whole, by pattern; or pattern -> rows of an embedding to train
            (token ids), or None for the whole module.
    """

    targets: Targets | None = None
    exclude: Targets | None = None
    layers: Iterable[int] | int | None = None
    also_train: Sequence[str] | Mapping[str, Sequence[int] | None] = ()

    method: ClassVar[str] = ""
    peft_type: ClassVar[str] = ""
    other_peft_types: ClassVar[Sequence[str]] = ()  # further ones that its files may have, which `to_peft` then gives
    peft_reads: ClassVar[bool] = True  # whether peft knows the method, and so its files
    mergeable: ClassVar[bool] = True  # whether a weight can hold what it does
    default_targets: ClassVar[Sequence[str]] = ("all-linear",)

    def __init_subclass__(cls, *, method: str | None = None, peft_type: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if method is not None:
            other = _registry.get(method)
            if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"method {method!r} is registered already, by {other.__module__}.{other.__qualname__}")
            cls.method = method
            cls.peft_type = peft_type or method.upper()
            _registry[method] = cls

    def __post_init__(self) -> None:
        # a mapping or sequence that the caller goes on to change must not change the config
        for name in ("targets", "exclude", "layers", "also_train"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, dict(value))
            elif isinstance(value, Iterable) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.also_train, str):
            object.__setattr__(self, "also_train", (self.also_train,))

    @property
    def identity(self) -> Literal["bits", "rounding", "none"]:
        """How far the output at attach is what it was before: to the bit, but for rounding, or not at all."""
        return "bits"

    # -- what a method says of itself -------------------------------------------------------------------------------

    def refuses(self, site: Site) -> str | None:
        """Why it cannot be attached at `site`, as the end of a sentence that names the site; None where it can."""
        raise NotImplementedError

    def presets(self, model: nn.Module, sites: Sequence[Site]) -> Callable[[str, Site], bool]:
        """Which of all `sites` of `model` a preset means, by its name; Linears, unless the method hangs on blocks."""
        return linears_in(model)

    def prepare(self, sites: Sequence[Site]) -> Any:
        """Called once with all sites, before any is built: what they share. Its result goes to every `build`."""
        return None

    def build(self, site: Site, plan: Any) -> Adapter:
        """A new adapter for `site`, on its device, its values not yet drawn."""
        raise NotImplementedError

    def check(self, site: Site, plan: Any) -> None:
        """Raise ValueError for settings that make no sense at `site`; a stored adapter is not asked."""

    def beside(self, everything: Sequence[Site], adapters: Mapping[str, Any]) -> Mapping[Site, Adapter]:
        """What must hang on further sites, of all of the model, for the built adapters to work; it stores nothing.

        The place to tell adapters, by site name, what they must know of the model; its root is the first site's module.
        """
        return {}

    def setup(self, model: nn.Module) -> Callable[[], None] | None:
        """Whatever must change on the model beside its sites; returns what undoes it, which pickles with the model."""
        return None

    @classmethod
    def examples(cls) -> Sequence[Config]:
        """A few small ones, for the contract tests."""
        return (cls(),)

    # -- the file ---------------------------------------------------------------------------------------------------

    def to_peft(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        """Its part of `adapter_config.json`, for the adapters by module path."""
        raise NotImplementedError(f"{type(self).__name__} cannot be saved yet")

    def peft_task(self, model: nn.Module, whole: Sequence[str]) -> str | None:
        """peft's `task_type`, where its wrapper for a task is what computes the method; see `peftkit.peft_tasks`.

        `whole` names the modules that are saved whole.
        """
        return None

    key_prefix: ClassVar[str] = "base_model.model."  # of the keys of sites; what peft computes outside wraps once less
    whole_keys: ClassVar[Sequence[str]] = ()  # full keys of tensors in its files that belong to no single site

    def whole_tensors(self, adapters: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those tensors, of the adapters by site name; a method whose adapters store nothing has only these."""
        return {}

    def load_whole(self, found: Mapping[str, Tensor], adapters: Mapping[str, Any]) -> None:
        """Take them over, in the order of the adapters; called without gradients, before the sites' own tensors.

        Raises:
            ValueError: one is missing or misshapen.
        """

    @classmethod
    def reads(cls, stored: Mapping[str, Any]) -> bool:
        """Whether an `adapter_config.json` of its `peft_type` is this method's, where several share one."""
        return True

    @classmethod
    def from_peft(cls, stored: Mapping[str, Any], shapes: Mapping[str, Mapping[str, torch.Size]]) -> Config:
        """The config that `adapter_config.json` describes, given the shapes stored for each site."""
        raise NotImplementedError(f"{cls.__name__} cannot be loaded yet")

    @classmethod
    def check_peft(cls, stored: Mapping[str, Any]) -> None:
        """Raise ValueError for flags of an `adapter_config.json` that change what the tensors mean to another method."""

    @classmethod
    def tensor_endings(cls) -> Sequence[str]:
        """How the keys of its tensors end, behind the site's name."""
        raise NotImplementedError(f"{cls.__name__} cannot be loaded yet")

    @classmethod
    def today(cls, key: str) -> str:
        """What a key in its files is called today, where it had another name before."""
        return key

    @classmethod
    def keys(cls) -> frozenset[str]:
        return frozenset(f.name for f in fields(cls))


def chosen(config: Config, model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """The sites of `model` that `config` means, of all that `walk` found.

    Raises:
        TargetError: a pattern that matches nothing, or only what the method refuses.
    """
    return select(
        model,
        sites,
        config.targets,
        exclude=config.exclude,
        layers=config.layers,
        refuses=config.refuses,
        in_preset=config.presets(model, sites),
        default=config.default_targets,
    )


def method_for(stored: Mapping[str, Any]) -> type[Config]:
    """The config class of a stored adapter, by its `adapter_config.json`.

    Raises:
        ValueError: no registered method has this `peft_type`.
    """
    peft_type = stored["peft_type"]
    for cls in _registry.values():
        if peft_type in (cls.peft_type, *cls.other_peft_types) and cls.reads(stored):
            return cls
    known = ", ".join(sorted(c.peft_type for c in _registry.values()))
    raise ValueError(f"peft_type {peft_type!r} belongs to no method; known are {known}")


def registered() -> dict[str, type[Config]]:
    """All methods by name."""
    return dict(_registry)
