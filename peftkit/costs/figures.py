"""What `cost` and `compare` return: figures, their table, and the same as plain values."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from peftkit.costs.plot import Panel, draw
from peftkit.printing import printed

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

BASE = "full fine-tuning"


@dataclass(frozen=True)
class Cost:
    """What training and calling a model costs, with the adapters that act.

    Attributes:
        label: the methods that act, or "full fine-tuning" where none does.
        trained: parameters that are trained.
        total: parameters of the model, its adapters' included.
        stored_bytes: the tensor file that `peftkit.save` writes, header and all; without adapters, the trained parameters.
        optimizer_bytes: the optimizer's state after its first step.
        saved_bytes: activations that a forward keeps for its backward.
        forward_flops, backward_flops: floating-point operations of the products in a step.
        base_forward_flops: the same forward with no adapter acting.
        base_seconds, forward_seconds, merged_seconds: median time of one forward, in eval mode and without gradients:
            with no adapter acting, with them, with them merged.
        added_latency, added_latency_merged: what the adapters add to the time of a forward, beside the weights and
            merged, as a share of the base's: 0.1 is a tenth longer. Medians of ratios of neighbouring calls, which other
            work on the machine disturbs less than it does the times.
        joules: energy of one step, forward and backward.
        base: the same base fully fine-tuned, where adapters act: all that was trainable before they were attached.
        notes: by attribute, why it is None, or what is missing in it.
    """

    label: str
    trained: int
    total: int
    stored_bytes: int | None
    optimizer_bytes: int
    saved_bytes: int
    forward_flops: int
    backward_flops: int
    base_forward_flops: int
    base_seconds: float | None
    forward_seconds: float | None
    merged_seconds: float | None
    added_latency: float | None
    added_latency_merged: float | None
    joules: float | None
    base: Cost | None = None
    notes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and None, for JSON; sizes in bytes, times in seconds, energy in joules."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return found | {"base": self.base.to_dict() if self.base else None, "notes": dict(self.notes)}

    def plot(self, where: str | os.PathLike[str] | Figure | None = None) -> Figure:
        """Bars of every figure, beside those of full fine-tuning.

        Args:
            where: a file to write, or a figure of matplotlib to draw in.

        Raises:
            ImportError: matplotlib is not there.
        """
        return _drawn({BASE: self.base, self.label: self} if self.base else {self.label: self}, where)

    def __str__(self) -> str:
        return printed(self, 100)

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(
            title=f"cost of {self.label}", title_justify="left", caption=self._caption(), caption_justify="left"
        )
        table.add_column("")
        table.add_column(self.label, justify="right", overflow="fold")
        if self.base:
            table.add_column(BASE, justify="right")
            table.add_column("relative", justify="right")
        for what in QUANTITIES:
            cells = [what.title, what.text(self)]
            if self.base:
                cells += [what.text(self.base), what.relative(self, self.base)]
            table.add_row(*cells)
        return table

    def _caption(self) -> str:
        found = [f"{titles(name)}: {note}" for name, note in self.notes.items()]
        return "\n".join([*found, LEGEND])


@dataclass(frozen=True)
class Comparison(Mapping[str, Cost]):
    """The costs of several configs on one model and batch, by name, in the order they were given in."""

    costs: Mapping[str, Cost]

    def __getitem__(self, name: str) -> Cost:
        return self.costs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.costs)

    def __len__(self) -> int:
        return len(self.costs)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """`Cost.to_dict` of each."""
        return {name: cost.to_dict() for name, cost in self.costs.items()}

    def plot(self, where: str | os.PathLike[str] | Figure | None = None) -> Figure:
        """Bars of every figure, one for each config; as `Cost.plot`."""
        return _drawn(self.costs, where)

    def __str__(self) -> str:
        return printed(self, 150)

    def __rich__(self) -> Table:
        from rich.table import Table

        notes: dict[str, list[str]] = {}
        for name, cost in self.costs.items():
            for attribute, note in cost.notes.items():
                notes.setdefault(f"{titles(attribute)}: {note}", []).append(name)
        caption = [line if len(names) == len(self) else f"{', '.join(names)}: {line}" for line, names in notes.items()]
        table = Table(caption="\n".join([*caption, LEGEND]), caption_justify="left")
        table.add_column("", overflow="fold")
        shown = _known(self.costs)
        for what in shown:
            table.add_column(what.title, justify="right")
        for name, cost in self.costs.items():
            table.add_row(name, *(what.text(cost) for what in shown))
        return table


class Quantity(NamedTuple):
    """A line of the table and a panel of the plot: how an attribute is called and written."""

    attribute: str
    title: str
    written: Callable[[float], str]

    def value(self, cost: Cost) -> float | None:
        return getattr(cost, self.attribute)

    def text(self, cost: Cost) -> str:
        value = self.value(cost)
        return "–" if value is None else self.written(value)

    def relative(self, cost: Cost, base: Cost) -> str:
        """To full fine-tuning; empty where the figure is relative already, or nothing is there to divide by."""
        mine, other = self.value(cost), self.value(base)
        if mine is None or not other or self.written is signed:
            return ""
        return f"{100 * mine / other:.3g} %"


def si(value: float, unit: str = "") -> str:
    """Three figures and a prefix by thousands."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m")):
        if abs(value) >= factor:
            return f"{_three(value / factor)} {prefix}{unit}".rstrip()
    return f"{_three(value * 1e6)} µ{unit}" if value else f"0 {unit}".rstrip()


def size(value: float) -> str:
    """Bytes by 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:,.0f} B" if unit == "B" else f"{value:,.1f} {unit}"


def signed(value: float) -> str:
    """A share that was added, in percent."""
    return f"{100 * value:+.1f} %"


def _three(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:.0f}"


QUANTITIES = (
    Quantity("trained", "trained parameters", lambda n: f"{n:,.0f}"),
    Quantity("stored_bytes", "on disk", size),
    Quantity("optimizer_bytes", "optimizer state", size),
    Quantity("saved_bytes", "saved activations", size),
    Quantity("forward_flops", "forward FLOPs", si),
    Quantity("backward_flops", "backward FLOPs", si),
    Quantity("forward_seconds", "forward time", lambda s: si(s, "s")),
    Quantity("added_latency", "added latency", signed),
    Quantity("added_latency_merged", "added when merged", signed),
    Quantity("joules", "energy of a step", lambda j: si(j, "J")),
)
LEGEND = "FLOPs are of products; time is of a forward in eval mode; activations are what a forward in train mode keeps"


def titles(attribute: str) -> str:
    """What the table calls an attribute."""
    named = {q.attribute: q.title for q in QUANTITIES} | {"base": BASE, "flops": "FLOPs"}
    return named.get(attribute, attribute)


def _known(costs: Mapping[str, Cost]) -> list[Quantity]:
    """Those that are known of at least one."""
    return [q for q in QUANTITIES if any(q.value(c) is not None for c in costs.values())]


def _drawn(costs: Mapping[str, Cost], where: str | os.PathLike[str] | Figure | None) -> Figure:
    each = costs.values()
    panels = [
        Panel(q.title, [q.value(c) for c in each], [q.text(c) for c in each], q.written is signed)
        for q in _known(costs)
    ]
    return draw(list(costs), panels, where)
