"""The switch itself: which base parameters train now. What rests has no gradient and no optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from peftkit import ledger
from peftkit.schedules import ranks
from peftkit.schedules.optimizers import check_held, check_wrapped, is_quantised, plain_optimizers
from peftkit.sites import walk
from peftkit.stacks import Block, plain_name, unwrapped

Place = tuple[nn.Module, str]
_RESTS = "_peftkit_rests"  # on a module, of which parameters a schedule has turned off: whose doing it is


class Turns:
    """The base parameters of a model that were trainable, which of them are on, and the optimizer that holds them.

    What was frozen before stays frozen; what `inject` froze counts as trainable. Adapters are left alone.

    Attributes:
        trained: these parameters by name, each once.
        places: the modules that hold each, and under which key; several where it is tied.

    Raises:
        ValueError: nothing is trainable, the optimizer lacks some of it, a wrapper is in the way, an adapter is merged.
        TypeError: an optimizer that keeps no state by parameter.
    """

    def __init__(self, model: nn.Module, optimizer: Any, who: str, *, check_ranks: bool):
        self.who, self.check_ranks = who, check_ranks
        self.optimizers = plain_optimizers(optimizer)
        self._model = unwrapped(model)
        check_nobody_else(self._model)
        self._record = _record(self._model)
        self.trained: dict[str, nn.Parameter] = {}
        self.places: dict[str, list[Place]] = {}
        names: dict[int, str] = {}
        for name, (holder, key) in trainable_places(self._model, self._record).items():
            p = holder._parameters[key]
            assert p is not None
            first = names.setdefault(id(p), name)
            self.trained[first] = p
            self.places.setdefault(first, []).append((holder, key))
        if not self.trained:
            raise ValueError(
                f"no base parameter of this {type(self._model).__name__} is trainable, so {who} has nothing to switch; it "
                "turns on only what was on before: model.requires_grad_(True), then inject, then this"
            )
        self._check_merged()
        check_wrapped(model, self.trained, who)
        check_held(self.optimizers, self.trained, who)
        self._before = {name: p.requires_grad for name, p in self.trained.items()}
        self._on: frozenset[str] | None = None

    def blocks_of(self, blocks: Sequence[Block]) -> dict[str, set[int | None]]:
        """The numbers of the blocks that each parameter lies in; None for outside of them.

        Raises:
            ValueError: a block in which nothing can be trained, or whose weights are quantised.
        """
        inside = {id(m): i for i, block in enumerate(blocks) for m in block.module.modules()}
        found = {name: {inside.get(id(m)) for m, _ in self.places[name]} for name in self.trained}
        reached = set().union(*found.values())
        trained = {id(p) for p in self.trained.values()}
        for i, block in enumerate(blocks):
            if (name := _quantised(block.module, trained)) is not None:
                raise ValueError(
                    f"{self.who} trains blocks whole, and {block.name}.{name} is quantised, so it has no gradient; train an "
                    "adapter there"
                )
            if i not in reached:
                raise ValueError(
                    f"no parameter of {block.name!r} is trainable; {self.who} turns on only what was on before: turn it on, "
                    "close() the schedule that turned it off, or leave the block out of blocks="
                )
        return found

    def only(self, on: Iterable[str], *, compare: bool) -> None:
        """These train from now on. Of the others the gradients go at once, the optimizer's state with `sweep`.

        Args:
            compare: whether what trained until now is to be equal on all ranks.
        """
        if compare and self._on is not None and self.check_ranks:
            ranks.check_equal({name: self.trained[name] for name in sorted(self._on)}, self.who)
        self._on = frozenset(on)
        for name, p in self.trained.items():
            wanted = name in self._on
            if p.requires_grad != wanted:
                p.requires_grad_(wanted)
            if not wanted:
                p.grad = None
            self._mark(name, rests=not wanted)

    def sweep(self) -> None:
        """Drop the optimizer's state of all that rests."""
        for name, p in self.trained.items():
            if self._on is not None and name not in self._on:
                for optimizer in self.optimizers:
                    optimizer.state.pop(p, None)

    def check(self) -> None:
        """Whether the model still is as the last switch left it.

        Raises:
            RuntimeError: somebody turned a parameter on or off, or put another in its place; an adapter is merged.
        """
        self._check_merged()
        for name, p in self.trained.items():
            if any(holder._parameters.get(key) is not p for holder, key in self.places[name]):
                raise RuntimeError(
                    f"{name!r} is another parameter than when this {self.who} was made, so neither it nor the optimizer "
                    "would train it; load weights with load_state_dict, and shard or convert the model before"
                )
            if self._on is not None and p.requires_grad != (name in self._on):
                raise RuntimeError(
                    f"{name!r} was turned {'on' if p.requires_grad else 'off'} by something else since {self.who} switched; "
                    "inject, eject and requires_grad_ come before it is made, or after close()"
                )

    def close(self) -> None:
        """Every flag as it was found, as far as adapters are as they were: what `inject` has frozen meanwhile stays frozen
        and is on again after `eject`, and what `eject` has turned on stays on.
        """
        now = _record(self._model)
        noted = {(id(module), key) for module, key in now.frozen} if now is not None else set()
        for name, p in self.trained.items():
            self._mark(name, rests=False)
            p.requires_grad_(now is None or (now is self._record and self._before[name]))
            if now is not None and now is not self._record:
                now.frozen += [(m, key) for m, key in self.places[name] if (id(m), key) not in noted]
        self._on = None

    def _mark(self, name: str, *, rests: bool) -> None:
        # on the modules, whose attributes a copy keeps and a parameter's does not
        for holder, key in self.places[name]:
            if rests:
                vars(holder).setdefault(_RESTS, {})[key] = self.who
            elif _RESTS in vars(holder):
                vars(holder)[_RESTS].pop(key, None)
                if not vars(holder)[_RESTS]:
                    del vars(holder)[_RESTS]

    def _check_merged(self) -> None:
        if self._record is not None and self._record.merged:
            merged = ", ".join(map(repr, self._record.merged))
            raise RuntimeError(
                f"{merged} is merged, and unmerge would take the base back to what it was; unmerge(model) before training it"
            )


def check_nobody_else(model: nn.Module) -> None:
    """Refuse a model in which a schedule that was not closed has turned parameters off: they are not the user's frozen ones.

    Where something is on that it had turned off, somebody took over, and what it said counts no more.

    Raises:
        ValueError: naming a parameter.
    """
    marked = [(site, key, whose) for site in walk(model) for key, whose in vars(site.module).get(_RESTS, {}).items()]
    held = [(site, key, whose, site.module._parameters.get(key)) for site, key, whose in marked]
    if any(p is not None and p.requires_grad for *_, p in held):
        for site, *_ in held:
            vars(site.module).pop(_RESTS, None)
        return
    for site, key, whose, _ in held:
        raise ValueError(
            f"{plain_name(f'{site.name}.{key}')!r} rests in a {whose} that was not closed; close() that one first (and for "
            "another optimizer, new.load_state_dict(old.state_dict())), or turn all on by requires_grad_(True) where it is "
            "gone"
        )


def _record(model: nn.Module) -> ledger.Ledger | None:
    found = ledger.find(model)
    return None if found is None else found[1]


def trainable_places(model: nn.Module, record: ledger.Ledger | None) -> dict[str, Place]:
    """Where the base parameters that are trainable, or were before `inject` froze them, are held, by name."""
    frozen = {(id(module), key) for module, key in record.frozen} if record is not None else set()
    places: dict[str, Place] = {}
    for site in walk(model):
        if site.part is None:
            for key, p in site.module._parameters.items():
                if p is not None and (p.requires_grad or (id(site.module), key) in frozen):
                    places[plain_name(f"{site.name}.{key}" if site.name else key)] = (site.module, key)
    return places


def _quantised(block: nn.Module, trained: set[int]) -> str | None:
    """The name of a Linear in it whose weight is stored quantised."""
    sites = (site for site in walk(block) if site.part is None)
    return next((plain_name(site.name) for site in sites if is_quantised(site.module, trained)), None)
