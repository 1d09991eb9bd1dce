"""How long a forward takes: with nothing acting, with the adapters beside the weights, and with them merged."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from peftkit import api
from peftkit.eval_mode import evaluating
from peftkit.ledger import find
from peftkit.method import NotMergeable

_IN_A_ROW = 20  # calls of each kind in a round, at most


@dataclass
class Times:
    """Seconds of each call, by rounds; `why_not` says why there are none of a merged model."""

    base: list[list[float]] = field(default_factory=list)
    acting: list[list[float]] = field(default_factory=list)
    merged: list[list[float]] = field(default_factory=list)
    why_not: str = ""

    def added_acting(self) -> float | None:
        """The median over pairs of neighbouring calls of acting over base, less one."""
        pairs = zip(chain(*self.acting), chain(*self.base), strict=False)
        return _median([acting / base - 1 for acting, base in pairs])

    def added_merged(self) -> float | None:
        """The median over rounds of merged over base, as it was before and after, less one."""
        rounds = zip(self.merged, self.base, [*self.base[1:], []], strict=False)
        return _median([statistics.median(merged) / statistics.median(now + then) - 1 for merged, now, then in rounds])


def median(rounds: list[list[float]]) -> float | None:
    """Of all calls; None without any."""
    return _median(list(chain(*rounds)))


@torch.no_grad()
def time_forwards(model: nn.Module, prepared: Callable[[], Callable[[], Any]], seconds: float) -> Times:
    """Times in eval mode of the calls that `prepared` makes: in each round base and acting by turns, then merged, so that a
    slow moment meets all of them.

    Merging goes both ways in every round, untimed, with a call after it to warm up. At least one round is done, however
    short `seconds` is; a model that was merged has its own bits back. Without adapters there is the base alone.
    """
    found, timed = Times(), _Clock(model, prepared)
    begun = time.perf_counter()
    adapted = find(model) is not None
    with evaluating(model), _no_collection():
        timed()
        in_a_row = max(1, min(_IN_A_ROW, int(seconds / 15 / max(timed(), 1e-9))))
        while not found.base or time.perf_counter() - begun < seconds:
            if not adapted:
                found.base.append([timed() for _ in range(in_a_row)])
                continue
            _without(model, timed)
            found.base.append([])
            found.acting.append([])
            for _ in range(in_a_row):
                found.base[-1].append(_without(model, timed))
                found.acting[-1].append(timed())
            if not found.why_not:
                # the weights have their own bits back, so what autograd has saved of them holds
                with _unsafe_preserve_version_counter(tuple(p for p in model.parameters() if not p.is_inference())):
                    _merged(model, timed, in_a_row, found)
    return found


def _merged(model: nn.Module, timed: Callable[[], float], in_a_row: int, found: Times) -> None:
    try:
        api.merge(model)
    except (NotMergeable, ValueError) as refusal:
        found.why_not = f"not mergeable: {refusal}"
        return
    try:
        timed()
        found.merged.append([timed() for _ in range(in_a_row)])
    finally:
        api.unmerge(model)
    timed()


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _without(model: nn.Module, timed: Callable[[], float]) -> float:
    with api.disabled(model):
        return timed()


class _Clock:
    """Seconds of one call, its work on other devices done."""

    def __init__(self, model: nn.Module, prepared: Callable[[], Callable[[], Any]]) -> None:
        self.prepared = prepared
        self.devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}

    def __call__(self) -> float:
        run = self.prepared()
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        for device in self.devices:
            torch.accelerator.synchronize(device)


@contextmanager
def _no_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
