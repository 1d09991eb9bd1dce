"""The runs of the result file as lines of a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.schedules.asked import ALLOCATOR
from benchmarks.schedules.recipes import RECIPES

HEAD = ("configuration", "trained at a time", "held-out loss", "optimizer state", "gradients", "peak of the steps")
PARTS = ("configuration", "allocator", "weights", "gradients", "optimizer state", "resident before", "peak")
STYLES = {
    "full": ("black", "-", "o"),
    "lisa-1": ("#4299e1", "-", "v"),
    "lisa-2": ("#2c5aa0", "--", "s"),
    "lisa-4": ("#1a365d", "-.", "^"),
    "lora": ("#c05621", "-", "D"),
    "half": ("#2f855a", ":", "P"),
}


def summarised(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Configuration, parameters trained at a time, last held-out loss, state, gradients, peak memory."""
    lines = []
    for r in found["runs"]:
        sizes = [f"{r[k] / 1e9:.2f} GB" if k in r else "" for k in ("state_bytes", "gradient_bytes", "peak_bytes")]
        lines.append((RECIPES[r["recipe"]].title, f"{r['trained']:,}", f"{list(r['losses'].values())[-1]:.3f}", *sizes))
    return lines


def parts(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What the peaks on few tokens are made of, in MB: configuration, allocator, weights, gradients, state, both ends."""
    keys = ("weight_bytes", "gradient_bytes", "state_bytes", "resident_before", "peak_bytes")
    rows = sorted(
        (r for r in found["memory"] if r["measure"] == "peaks"), key=lambda r: list(ALLOCATOR).index(r["allocator"])
    )
    return [
        (RECIPES[r["arm"]].title, ALLOCATOR[r["allocator"]], *(f"{r[key] / 1e6:,.0f}" for key in keys)) for r in rows
    ]


def plot(found: Mapping[str, Any], title: str, path: Path) -> None:
    """Held-out loss over steps: a line for each configuration, named at its end."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "peftkit"  # the same file for the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    runs = {r["recipe"]: {int(step): loss for step, loss in r["losses"].items()} for r in found["runs"]}
    ends = {}
    for recipe, losses in runs.items():
        last = list(losses.values())[-1]
        if recipe == "none":
            axes.axhline(last, color="0.6", linestyle="--", linewidth=1)
            axes.annotate(RECIPES[recipe].title, (1, last), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                          color="0.4", fontsize=8)  # fmt: skip
            continue
        color, line, marker = STYLES[recipe]
        axes.plot(list(losses), list(losses.values()), color=color, linestyle=line, marker=marker, markersize=4)
        ends[recipe] = last
    axes.set(xlabel="steps", ylabel="held-out loss, nats a token", title=title)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_ylim()
    for recipe, y in zip(ends, apart(list(ends.values()), 0.045 * (high - low)), strict=True):
        axes.annotate(RECIPES[recipe].title, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8,
                      color=STYLES[recipe][0], annotation_clip=False)  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def apart(values: Sequence[float], least: float) -> list[float]:
    """The values moved as little as needed for neighbours to lie `least` from each other, in the same order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    groups: list[list[int]] = []
    middles: list[float] = []
    for i in order:
        groups.append([i])
        middles.append(values[i])
        while len(groups) > 1 and middles[-1] - middles[-2] < least * (len(groups[-1]) + len(groups[-2])) / 2:
            last = groups.pop()
            groups[-1] += last
            middles.pop()
            middles[-1] = sum(values[j] for j in groups[-1]) / len(groups[-1])
    moved = list(values)
    for group, middle in zip(groups, middles, strict=True):
        for place, i in enumerate(group):
            moved[i] = middle + least * (place - (len(group) - 1) / 2)
    return moved
