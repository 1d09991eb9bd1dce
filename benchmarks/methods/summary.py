"""The runs of a result file as lines of a table and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

TITLES = {
    "none": "frozen base",
    "lora": "LoRA",
    "dora": "DoRA",
    "series": "series adapter",
    "parallel": "parallel adapter",
    "prefix": "prefix-tuning",
    "prompt": "prompt tuning",
    "ia3": "IA3",
    "vera": "VeRA",
    "bitfit": "BitFit",
    "loha": "LoHa",
    "lokr": "LoKr",
}


def grouped(found: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each method."""
    return {method: list(runs) for method, runs in groupby(found["runs"], key=lambda r: r["method"])}


def summarised(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Method, trained parameters, mean accuracy, the accuracy of each seed, step over the base's, peak memory."""
    lines = []
    for method, runs in grouped(found).items():
        accuracies = [r["accuracy"] for r in runs]
        step = found["steps"].get(method)
        lines.append(
            (
                TITLES[method],
                f"{runs[0]['trained']:,}",
                f"{statistics.mean(accuracies):.1%}",
                ", ".join(f"{a:.1%}" for a in accuracies) if method != "none" else "",
                "" if step is None else f"{step:.2f}",
                f"{max(r['peak_bytes'] for r in runs) / 1e9:.2f} GB",
            )
        )
    return lines


def plot(found: Mapping[str, Any], title: str, path: Path) -> None:
    """Held-out accuracy over trained parameters: the mean, a bar from the worst to the best seed, and the base's line."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "peftkit"  # the same file for the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    for method, runs in grouped(found).items():
        accuracies = [100 * r["accuracy"] for r in runs]
        mean = statistics.mean(accuracies)
        if method == "none":
            axes.axhline(mean, color="0.6", linestyle="--", linewidth=1)
            axes.annotate(TITLES[method], (1, mean), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                          color="0.4", fontsize=8)  # fmt: skip
            continue
        x = runs[0]["trained"]
        axes.errorbar(x, mean, [[mean - min(accuracies)], [max(accuracies) - mean]], fmt="o", color="#2b6cb0",
                      markersize=5, elinewidth=1, capsize=2)  # fmt: skip
        under = method == "series"  # between two others: its name stands under its bar
        left = under or method in ("lora", "vera", "parallel")  # whose neighbours' names stand on the right
        axes.annotate(TITLES[method], (x, min(accuracies) if under else mean), textcoords="offset points", fontsize=8,
                      xytext=(3, -3) if under else (-6 if left else 6, 4), ha="right" if left else "left",
                      va="top" if under else "baseline")  # fmt: skip
    axes.set(xscale="log", xlabel="trained parameters", ylabel="held-out accuracy, %", title=title)
    axes.margins(x=0.12)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
