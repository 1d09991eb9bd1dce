"""What it costs to change which adapter acts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import peft
from torch import nn

import peftkit

from .common import Row, Size, against, llama, ours, theirs, timed


def measure(size: Size) -> Iterator[Row]:
    """Time of `activate` and `disabled`."""
    count = 7 * size.layers
    model, wrapped = llama(size.layers), peft.get_peft_model(llama(size.layers), theirs(), adapter_name="first")
    peftkit.inject(model, ours(), name="first")
    peftkit.inject(model, ours(), name="second")
    wrapped.add_adapter("second", theirs())
    times = timed({"peftkit": _there_and_back(model), "peft": lambda: _set(wrapped)}, 2 * size.rounds)
    yield against(f"switch between two trained adapters and back, {count} Linears", times, size.limit(1 / 40))

    def off_and_on() -> None:
        peftkit.activate(model)
        peftkit.activate(model, "first")

    def peft_off_and_on() -> None:
        wrapped.base_model.disable_adapter_layers()
        wrapped.base_model.enable_adapter_layers()

    times = timed({"peftkit": off_and_on, "peft": peft_off_and_on}, 2 * size.rounds)
    yield against(f"switch a trained adapter off and on, {count} Linears", times, size.limit(1 / 40))

    def ours_block() -> None:
        with peftkit.disabled(model):
            pass

    def peft_block() -> None:
        with wrapped.disable_adapter():
            pass

    times = timed({"peftkit": ours_block, "peft": peft_block}, 2 * size.rounds)
    yield against(f"a block without adapters, {count} Linears", times, size.limit(1 / 40))

    large, small = _with_two_loaded(size.layers), _with_two_loaded(size.fewer)
    times = timed({"larger": _there_and_back(large), "smaller": _there_and_back(small)}, 20 * size.rounds, inner=20)
    yield Row(
        f"switch between loaded adapters: {count} Linears against {7 * size.fewer}",
        times["larger"] / times["smaller"],
        "× fewer Linears",
        size.limit(1.1),  # independent of their number, up to the clock's noise
        times,
    )


def _there_and_back(model: nn.Module) -> Callable[[], Any]:
    def switch() -> None:
        peftkit.activate(model, "first")
        peftkit.activate(model, "second")

    return switch


def _set(wrapped: peft.PeftModel) -> None:
    wrapped.set_adapter("first")
    wrapped.set_adapter("second")


def _with_two_loaded(layers: int) -> nn.Module:
    """A model with two frozen adapters from disk."""
    model = llama(layers)
    with tempfile.TemporaryDirectory() as folder:
        peftkit.inject(model, ours())
        peftkit.save(model, folder)
        peftkit.eject(model)
        for name in ("first", "second"):
            peftkit.load(model, folder, name=name)
    return model
