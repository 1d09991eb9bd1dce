"""What all schedules share: blocks, switches counted from 0, and a state from which a run goes on exactly."""

from __future__ import annotations

import copy
import hashlib
import json
import operator
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from peftkit import stacks
from peftkit.schedules import ranks
from peftkit.schedules.optimizers import accumulates, fill_in
from peftkit.schedules.turns import Turns


class Schedule(ABC):
    """Which base parameters train, changed from switch to switch.

    What the n-th switch chooses depends on the settings and on n alone: it is the same on every rank and in a run that is
    resumed, and nobody else's random numbers are touched. The optimizer may step with what is on only: a hook on it drops
    the state of everything else before its step.

    Attributes:
        blocks: the model's blocks, in order.
        switches: how many switches there were, the first one included.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, blocks: stacks.Blocks | None, settings: Mapping[str, Any], ranked: bool
    ):
        self.blocks = stacks.find(model, blocks)
        self._settings = {key: whole(value) for key, value in settings.items()}
        self._check_settings()
        self._turns = Turns(model, optimizer, type(self).__name__, check_ranks=ranked)
        if ranked:
            about = {"blocks": len(self.blocks), "parameters": self._signature()}
            ranks.check_settings(self._settings | about, type(self).__name__)
        self.switches = 0
        self._chosen: list[int] = []
        self._prepare(model)
        self._open = True
        self._stepped = False  # whether an optimizer has, since the last call of `step`
        self._watch()
        self._switch()

    # -- what a schedule is ------------------------------------------------------------------------------------------

    @abstractmethod
    def _check_settings(self) -> None:
        """Refuse settings that do not fit the blocks, before anything is changed."""

    @abstractmethod
    def _prepare(self, model: nn.Module) -> None:
        """Look at the model once."""

    @abstractmethod
    def _choose(self, switch: int) -> list[int]:
        """What the switch of this number turns on, by numbers of the schedule's own."""

    @abstractmethod
    def _may_choose(self, chosen: list[int]) -> bool:
        """Whether a switch could have chosen this; of a state that is read."""

    @abstractmethod
    def _on(self, chosen: Collection[int]) -> Collection[str]:
        """The names of the parameters which that is."""

    # -- for the user ------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> list[str]:
        """The names of the base parameters that are on."""
        return [name for name, p in self._turns.trained.items() if p.requires_grad]

    def close(self) -> None:
        """End it: `requires_grad` of every parameter as it was found, the optimizer left alone. Twice is as good as once."""
        if self._open:
            self._open = False
            for hook in self._hooks:
                hook.remove()
            self._turns.close()

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on, as plain values that JSON can hold."""
        return {
            "schedule": type(self).__name__,
            "settings": copy.deepcopy(self._settings),
            "blocks": [block.name for block in self.blocks],
            "parameters": self._signature(),
            "switches": self.switches,
            "chosen": list(self._chosen),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; before or after the optimizer's own `load_state_dict`.

        Raises:
            ValueError: it is of another schedule, of other settings or of another model; nothing was changed.
        """
        own = self.state_dict()
        if not isinstance(state, Mapping) or own.keys() - state.keys():
            missing = sorted(own.keys() - state.keys()) if isinstance(state, Mapping) else []
            raise ValueError(
                f"this is no state of a {own['schedule']}{f': it lacks {missing[0]!r}' if missing else ''}"
            )
        if state["schedule"] != own["schedule"]:
            raise ValueError(f"this is the state of a {state['schedule']}, not of a {own['schedule']}")
        theirs = state["settings"] if isinstance(state["settings"], Mapping) else {}
        for key, value in own["settings"].items():
            if theirs.get(key) != value:
                raise ValueError(
                    f"the state was saved with {key}={theirs.get(key)!r}, and this one has {key}={value!r}"
                )
        if list(state["blocks"]) != own["blocks"]:
            raise ValueError(
                f"the state is of another model: {len(state['blocks'])} blocks{_first(state['blocks'])}, and this one has "
                f"{len(own['blocks'])}{_first(own['blocks'])}"
            )
        if state["parameters"] != own["parameters"]:
            raise ValueError(
                "the state is of another model: names or shapes of its trainable parameters are not those of this one"
            )
        self._check_open()
        chosen = state["chosen"]
        plain = isinstance(chosen, list | tuple) and all(isinstance(i, int) for i in chosen)
        if not plain or not self._may_choose(list(chosen)) or not _counts(state):
            raise ValueError(
                f"this is no state of a {own['schedule']}: switches={state['switches']!r}, chosen={chosen!r}"
            )
        self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.switches = state["switches"]
        self._apply(list(state["chosen"]), compare=False)

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self._settings.items() if value is not None)
        blocks = f"{len(self.blocks)} blocks{_first([b.name for b in self.blocks])}"
        on = f"{len(self.trained)} of {len(self._turns.trained)} parameters on"
        return f"{type(self).__name__}({settings}; {blocks}; {on})"

    # -- the switch --------------------------------------------------------------------------------------------------

    def _switch(self) -> None:
        self._apply(self._choose(self.switches), compare=self.switches > 0)
        self.switches += 1
        if self.switches > 1:  # before, the optimizer may hold what a resumed run is about to need
            self._turns.sweep()

    def _apply(self, chosen: list[int], *, compare: bool) -> None:
        self._turns.only(self._on(chosen), compare=compare)
        self._chosen = chosen

    def _watch(self) -> None:
        self._hooks = [o.register_step_pre_hook(self._before_step) for o in self._turns.optimizers]

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._turns.check()
        self._turns.sweep()
        fill_in(optimizer)
        self._stepped = True

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError(f"this {type(self).__name__} was closed; make a new one")

    def __getstate__(self) -> dict[str, Any]:
        """A copy of an optimizer has no hooks, so a copy of its schedule hangs on it anew."""
        return {key: value for key, value in vars(self).items() if key != "_hooks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._open:
            self._watch()

    def _rng(self, switch: int) -> np.random.Generator:
        return np.random.default_rng([self._settings["seed"], switch])

    def _signature(self) -> str:
        shapes = sorted((name, tuple(p.shape)) for name, p in self._turns.trained.items())
        return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


class SteppedSchedule(Schedule):
    """One that switches by itself: every `interval` calls of `step`."""

    steps: int = 0

    def step(self) -> None:
        """Count one step, after `optimizer.step()`, as of a learning-rate scheduler; switch where it is time.

        Within `accelerator.accumulate` a call that comes before the optimizer's real step counts nothing.

        Raises:
            RuntimeError: it was closed; something else turned parameters on or off, or they differ between the ranks.
        """
        self._check_open()
        self._turns.check()
        stepped, self._stepped = self._stepped, False
        if not stepped and accumulates():
            return
        if (self.steps + 1) % self._settings["interval"] == 0:
            self._switch()
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self.steps}

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self.steps = state["steps"]


def whole(value: Any) -> Any:
    """A whole number as a plain one, numpy's too; anything else as it is."""
    return value if isinstance(value, bool) or not hasattr(value, "__index__") else operator.index(value)


def check_count(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        ValueError: naming it.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is a whole number of at least {least}, not {value!r}")


def _counts(state: Mapping[str, Any]) -> bool:
    return all(isinstance(state.get(key, 1), int) and state.get(key, 1) >= 0 for key in ("switches", "steps"))


def _first(names: Sequence[str]) -> str:
    return f" ({names[0]} … {names[-1]})" if len(names) > 1 else f" ({names[0]})" if names else ""
