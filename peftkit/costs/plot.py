"""The figures as bars."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftkit.costs.figures import QUANTITIES, Cost, Quantity, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 3
_LEAST = 0.1  # of an added share, the scale: below, bars would show noise
_COLOURS = (
    "#4c72b0",
    "#dd8452",
    "#55a868",
    "#c44e52",
    "#8172b3",
    "#937860",
    "#da8bc3",
    "#8c8c8c",
    "#ccb974",
    "#64b5cd",
)


def draw(costs: Mapping[str, Cost], where: str | os.PathLike[str] | Figure | None) -> Figure:
    """A panel for each figure that any of `costs` has, a bar for each of them; written to `where` if that is a path.

    Raises:
        ImportError: matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure, SubFigure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: pip install 'peftkit[plots]' ({error})") from error
    shown = [q for q in QUANTITIES if any(q.value(c) is not None for c in costs.values())]
    rows = math.ceil(len(shown) / _COLUMNS)
    on: Any = where
    if not isinstance(where, Figure | SubFigure):
        on = Figure(figsize=(3.6 * _COLUMNS, rows * (0.75 + 0.27 * len(costs))), layout="constrained")
    axes = on.subplots(rows, _COLUMNS, squeeze=False, sharey=True).flat
    for what, ax in zip(shown, axes, strict=False):
        _panel(ax, what, costs)
    for ax in list(axes)[len(shown) :]:
        ax.set_axis_off()
    if on is not where and where is not None:
        on.savefig(where, dpi=150)
    return on


def _panel(ax: Any, what: Quantity, costs: Mapping[str, Cost]) -> None:
    values = [what.value(c) for c in costs.values()]
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(values))]
    places = range(len(values))
    ax.barh(places, [v or 0 for v in values], color=colours, height=0.7)
    there = [v for v in values if v is not None]
    least = _LEAST if what.written is signed else 0
    low, high = min(0, *there), max(least, *there)
    span = (high - low) or 1
    for place, value in zip(places, values, strict=True):
        text = "–" if value is None else what.written(value)
        ax.text(max(value or 0, 0) + 0.02 * span, place, text, va="center", fontsize=8)
    ax.set_xlim(low - (0.02 * span if low else 0), high + 0.42 * span)
    ax.set_yticks(places, list(costs), fontsize=8)
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.set_title(what.title, fontsize=9, loc="left")
    ax.set_xticks([])
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    if low:  # labels stay at the side
        ax.spines["left"].set_visible(False)
        ax.axvline(0, color="black", linewidth=0.8)
