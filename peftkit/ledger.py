"""What is attached to a model: one record on its root, from which everything can be undone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from peftkit.graft import freeze, graft, unfreeze, ungraft, why_not_graft, why_not_ungraft
from peftkit.holder import Graft, Names, Switch, graft_of
from peftkit.method import Adapter, Config, own_parameters
from peftkit.reading import READERS
from peftkit.sites import Site, walk
from peftkit.targets import TargetError, nearest

_ATTRIBUTE = "_peftkit"


@dataclass(eq=False)
class Attachment:
    """One named adapter: its config and what it hung where."""

    name: str
    config: Config
    adapters: dict[str, Adapter]  # by the site's name
    sites: dict[str, Site]
    trainable: bool
    undo: Callable[[], None] | None = None
    # by where they are held, since values may be replaced meanwhile: all parameters, and those that rest
    places: list[tuple[dict[str, nn.Parameter | None], str]] = field(default_factory=list)
    resting: list[tuple[dict[str, nn.Parameter | None], str]] = field(default_factory=list)

    def key(self, site: Site) -> str:
        return self.name if site.part is None else f"{self.name}:{site.part}"

    def parameters(self) -> list[nn.Parameter]:
        """All of its parameters, each once."""
        return list({id(p): p for a in self.adapters.values() for p in own_parameters(a)}.values())

    def rest(self) -> None:
        """Nothing of it is trained while it does not act."""
        if not self.trainable or self.resting:
            return
        if not self.places:
            holders = (h for a in self.adapters.values() for h in (a.modules() if a._modules else (a,)))
            self.places = [(h._parameters, name) for h in holders for name in h._parameters]
        for held, name in self.places:
            p = held[name]
            if p is not None and p.requires_grad:
                p.requires_grad = False
                self.resting.append((held, name))

    def wake(self) -> None:
        """What was trained before it rested is trained again."""
        for held, name in self.resting:
            if (p := held[name]) is not None:
                p.requires_grad = True
        self.resting = []

    def __getstate__(self) -> dict[str, Any]:
        """A predicate cannot be pickled; it stays as the names it chose."""
        config = self.config
        for key in ("targets", "exclude"):
            value = getattr(config, key)
            if any(callable(one) for one in (value if isinstance(value, tuple) else (value,))):
                chosen = tuple(f"^{name}" for name, a in self.adapters.items() if not (a.replaces or a.beside))
                config = replace(config, **{key: chosen if key == "targets" else None})
        return {**self.__dict__, "config": config}


@dataclass(eq=False)
class Ledger:
    """The record on a model's root.

    Attributes:
        switch: which adapters act; shared by all grafts.
        frozen: the base parameters whose `requires_grad` was on, by holder and name.
        readers: modules grafted because they read the weights of adapted ones.
        merged: names whose adapters the weights hold.
    """

    switch: Switch = field(default_factory=Switch)
    attachments: dict[str, Attachment] = field(default_factory=dict)
    frozen: list[tuple[nn.Module, str]] = field(default_factory=list)
    readers: list[nn.Module] = field(default_factory=list)
    merged: Names = ()

    def named(self, names: Iterable[str]) -> list[Attachment]:
        """The attachments of these names.

        Raises:
            KeyError: no adapter of a name is attached.
        """
        found = []
        for name in names:
            if name not in self.attachments:
                raise KeyError(f"no adapter {name!r} is attached{nearest(name, self.attachments)}")
            found.append(self.attachments[name])
        return found

    def grafts(self) -> Iterator[tuple[nn.Module, Graft]]:
        """Every grafted module once."""
        seen: set[int] = set()
        for attachment in self.attachments.values():
            for site in attachment.sites.values():
                made = graft_of(site.module)
                if made is not None and id(made) not in seen:
                    seen.add(id(made))
                    yield site.module, made

    # -- attaching and taking off -----------------------------------------------------------------------------------

    def attach(self, model: nn.Module, everything: list[Site], attachment: Attachment) -> None:
        """Hang a built adapter on its sites; on any failure the model is as it was."""
        hung: list[tuple[Site, str]] = []
        first = not self.attachments
        try:
            for name, adapter in attachment.adapters.items():
                site = attachment.sites[name]
                made = graft(site.module, self.switch)
                key = attachment.key(site)
                hung.append((site, key))
                if adapter.training != site.module.training:  # else what is in it may have modes of its own
                    adapter.train(site.module.training)
                made._modules[key] = adapter
            self._graft_readers(everything, attachment)
            _check_hooks(everything, attachment)
            attachment.undo = attachment.config.setup(model)
        except BaseException:
            for site, key in hung:
                self._unhang(site, key)
            self._drop_readers(everything=not self.attachments)
            raise
        if first:
            self.frozen = freeze(s.module for s in everything if s.part is None)
            model.__dict__[_ATTRIBUTE] = self
        if not attachment.trainable:
            for p in attachment.parameters():
                p.requires_grad_(False)
        self.attachments[attachment.name] = attachment
        self.activate((attachment.name,))

    def check_classes(self) -> None:
        """Refuse to take adapters off modules whose class was changed after attaching.

        Raises:
            RuntimeError: naming what the class became.
        """
        for module in [m for m, _ in self.grafts()] + self.readers:
            if (reason := why_not_ungraft(module)) is not None:
                raise RuntimeError(f"a {type(module).__name__} cannot be given back its class: {reason}")

    def detach(self, model: nn.Module, attachment: Attachment) -> None:
        if attachment.undo is not None:
            attachment.undo()
        for name, site in attachment.sites.items():
            self._unhang(site, attachment.key(site))
            del attachment.adapters[name]
        del self.attachments[attachment.name]
        self.switch.names = tuple(n for n in self.switch.names if n != attachment.name)
        self._drop_readers(everything=not self.attachments)
        if not self.attachments:
            unfreeze(self.frozen)
            del model.__dict__[_ATTRIBUTE]

    def take_off(self, attachment: Attachment, name: str) -> None:
        """Take the adapter at one site off."""
        site = attachment.sites.pop(name)
        self._unhang(site, attachment.key(site))
        del attachment.adapters[name]
        attachment.places = []

    @staticmethod
    def _unhang(site: Site, key: str) -> None:
        made = graft_of(site.module)
        if made is not None:
            made._modules.pop(key, None)
            if not made._modules:
                ungraft(site.module)

    def _graft_readers(self, everything: list[Site], attachment: Attachment) -> None:
        """Modules that read weights instead of calling their children must know of the adapters there."""
        readers = [s.module for s in everything if s.part is None and isinstance(s.module, READERS)]
        if not readers:
            return
        adapted = {id(s.module) for s in attachment.sites.values()}
        for module in readers:
            if graft_of(module) is None and any(id(m) in adapted for m in module.modules()):
                if (reason := why_not_graft(module)) is not None:
                    kind = type(module).__name__
                    raise TargetError(f"a {kind} reads the weights of its children, and it cannot be adapted: {reason}")
                graft(module, self.switch)
                self.readers.append(module)

    def _drop_readers(self, everything: bool) -> None:
        keep = []
        for module in self.readers:
            made = graft_of(module)
            if made is None or made._modules:
                continue  # an adapter of its own came or went meanwhile
            if everything or not any(graft_of(m) for m in module.modules() if m is not module):
                ungraft(module)
            else:
                keep.append(module)
        self.readers = keep

    # -- switching --------------------------------------------------------------------------------------------------

    def activate(self, names: Names) -> None:
        """These act from now on; what is trained follows."""
        before = self.switch.names
        for name in before:
            if name not in names and name in self.attachments:
                self.attachments[name].rest()
        for name in names:
            if name not in before:
                self.attachments[name].wake()
        self.switch.names = names


def check_name(name: str) -> None:
    """Refuse names that no module could have, or that would leave the directory they are saved in.

    Raises:
        ValueError: naming it.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"an adapter's name is letters, digits, '_' and '-', not {name!r}")


def find(model: nn.Module) -> tuple[nn.Module, Ledger] | None:
    """The root that adapters were attached to, in `model` or anywhere in what it wraps, and its record."""
    own = model.__dict__.get(_ATTRIBUTE)
    if own is not None:
        return model, own
    found = [(s.module, s.module.__dict__[_ATTRIBUTE]) for s in walk(model) if _ATTRIBUTE in s.module.__dict__]
    if len(found) > 1:
        raise ValueError(
            f"adapters were attached to {len(found)} different parts of this {type(model).__name__}; name one"
        )
    return found[0] if found else None


def require(model: nn.Module) -> tuple[nn.Module, Ledger]:
    """The same.

    Raises:
        ValueError: nothing is attached.
    """
    found = find(model)
    if found is None:
        raise ValueError(f"no adapter is attached to this {type(model).__name__}; inject or load one first")
    return found


def for_attaching(model: nn.Module, name: str) -> tuple[Ledger, list[Site]]:
    """The record to attach a new adapter to, and all sites of the model.

    Raises:
        ValueError: the name is taken, a part of the model has adapters of its own, or adapters are merged.
    """
    check_name(name)
    everything = walk(model)
    ledger = model.__dict__.get(_ATTRIBUTE)
    if ledger is None:
        for site in everything:
            if _ATTRIBUTE in site.module.__dict__ or graft_of(site.module) is not None:
                raise ValueError(
                    f"{site.name!r} in this {type(model).__name__} carries adapters that were attached to another root; "
                    "attach to that one, or eject them first"
                )
        return Ledger(), everything
    if name in ledger.attachments:
        raise ValueError(f"an adapter {name!r} is attached already; give another name=, or eject it first")
    if ledger.merged:
        raise ValueError(f"{', '.join(map(repr, ledger.merged))} is merged; unmerge(model) before attaching another")
    return ledger, everything


def _check_hooks(everything: Iterable[Site], attachment: Attachment) -> None:
    """accelerate's `preload_module_classes` looks up all that lies in a module among what it once offloaded."""
    for site in everything:
        hook = site.module.__dict__.get("_hf_hook")
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "offload", False) and getattr(one, "place_submodules", False):
                inside = {id(m) for m in site.module.modules()}
                for name, adapted in attachment.sites.items():
                    if id(adapted.module) in inside:
                        raise TargetError(
                            f"{name!r} lies in {site.name!r}, which accelerate offloads as one piece and would not find "
                            "the adapter in; attach before offloading, or offload without preload_module_classes"
                        )


def check_graftable(sites: Iterable[Site]) -> None:
    """Refuse modules whose class cannot be swapped.

    Raises:
        TargetError: naming the site, with the reason.
    """
    for site in sites:
        reason = why_not_graft(site.module)
        if reason is not None:
            raise TargetError(f"{site.name!r} cannot be adapted: {reason}")
