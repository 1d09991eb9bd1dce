"""Runs what is asked for, one process after the other, and keeps the rows; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, write_result
from benchmarks.methods import steps
from benchmarks.methods.recipes import METHODS, RECIPES, SEEDS
from benchmarks.methods.summary import summarised


def main() -> None:
    """Train, keep, show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description="Train every method.")
    parser.add_argument("--model", choices=RECIPES, default="minilm")
    parser.add_argument("--only", nargs="+", choices=["none", *METHODS], metavar="METHOD")
    parser.add_argument("--steps", action="store_true", help="time training steps, taking turns, instead of training")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the runs do
    possible = [m for m, of in METHODS.items() if options.model in of.models]
    wanted = [m for m in ["none", *possible] if m in (options.only or ["none", *possible])]
    console = Console()
    if options.steps:
        keep(options.model, steps=steps.measure(options.model, [m for m in wanted if m != "none"]))
    for seed in SEEDS if not options.steps else ():
        for method in [m for m in wanted if m != "none" or seed == 0]:
            row = run(options.model, method, seed)
            console.print(f"{method}, seed {seed}: {row['accuracy']:.1%}")
            keep(options.model, row)
    console.print(table(options.model))


def run(model: str, method: str, seed: int) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.methods.one",
        "--model",
        model,
        "--method",
        method,
        "--seed",
        str(seed),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def keep(model: str, row: dict[str, Any] | None = None, *, steps: dict[str, float] | None = None) -> None:
    """Put a row in the place of the one of the same method and seed, or step times in place of those of the same methods."""
    path = RESULTS / f"methods-{model}.json"
    found = json.loads(path.read_text())["rows"] if path.exists() else {"runs": [], "steps": {}}
    if row is not None:
        key = (row["method"], row["seed"])
        found["runs"] = [r for r in found["runs"] if (r["method"], r["seed"]) != key] + [row]
        order = ["none", *METHODS]
        found["runs"].sort(key=lambda r: (order.index(r["method"]), r["seed"]))
    found["steps"] |= steps or {}
    write_result(path.stem, found)


def table(model: str) -> Table:
    """The means over the seeds."""
    rows = Table(title=model, title_justify="left")
    for title in ("method", "trained", "held out", "seeds", "step", "peak"):
        rows.add_column(title)
    for line in summarised(json.loads((RESULTS / f"methods-{model}.json").read_text())["rows"]):
        rows.add_row(*line)
    return rows


if __name__ == "__main__":
    main()
