"""Figures as bars."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Panel(NamedTuple):
    """One figure of several things: its title, their values and how these are written; a `share` may be negative."""

    title: str
    values: Sequence[float | None]
    texts: Sequence[str]
    share: bool


def draw(names: Sequence[str], panels: Sequence[Panel], where: str | os.PathLike[str] | Figure | None) -> Figure:
    """A bar for each of `names` in each panel; written to `where` if that is a path.

    Raises:
        ImportError: matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure, SubFigure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: pip install 'peftkit[plots]' ({error})") from error
    rows = math.ceil(len(panels) / _COLUMNS)
    on: Any = where
    if not isinstance(where, Figure | SubFigure):
        on = Figure(figsize=(3.6 * _COLUMNS, rows * (0.75 + 0.27 * len(names))), layout="constrained")
    axes = list(on.subplots(rows, _COLUMNS, squeeze=False, sharey=True).flat)
    for panel, ax in zip(panels, axes, strict=False):
        _bars(ax, panel, names)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    if on is not where and where is not None:
        on.savefig(where, dpi=150)
    return on


def _bars(ax: Any, panel: Panel, names: Sequence[str]) -> None:
    places, values = range(len(names)), [v or 0 for v in panel.values]
    ax.barh(places, values, color=[_COLOURS[i % len(_COLOURS)] for i in places], height=0.7)
    low, high = min(0, *values), max(_LEAST if panel.share else 0, *values)
    span = (high - low) or 1
    for place, value, text in zip(places, values, panel.texts, strict=True):
        ax.text(max(value, 0) + 0.02 * span, place, text, va="center", fontsize=8)
    ax.set_xlim(low - (0.02 * span if low else 0), high + 0.42 * span)
    ax.set_yticks(places, list(names), fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_title(panel.title, fontsize=9, loc="left")
    ax.set_xticks([])
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    if low:  # the names stay at the side
        ax.spines["left"].set_visible(False)
        ax.axvline(0, color="black", linewidth=0.8)
