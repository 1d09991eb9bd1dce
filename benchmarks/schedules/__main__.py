"""Runs what is asked for, one process after the other, and keeps the rows; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, write_result
from benchmarks.schedules.asked import asked, norm_ratio
from benchmarks.schedules.memory import ALLOCATORS, MEASURES
from benchmarks.schedules.recipes import RECIPES
from benchmarks.schedules.summary import HEAD, summarised

NAME = "schedules-smollm2"


def main() -> None:
    """Train, keep, show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules", description="Train with every schedule.")
    parser.add_argument("--only", nargs="+", choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--memory", nargs="*", choices=MEASURES, help="what was promised of memory")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the runs do
    console = Console()
    for measure in [] if options.memory is None else options.memory or MEASURES:
        for arm in MEASURES[measure].arms:
            for allocator, environment in ALLOCATORS.items():
                row = run("memory", "--measure", measure, "--arm", arm, environment=environment)
                console.print(f"{measure}, {arm}, {allocator}")
                keep("memory", row | {"allocator": allocator}, ("measure", "arm", "allocator"))
    for name in [n for n in RECIPES if n in (options.only or RECIPES)] if options.memory is None else []:
        row = run("one", "--recipe", name)
        console.print(f"{name}: {list(row['losses'].values())[-1]:.4f}")
        keep("runs", row, ("recipe",))
    console.print(table())


def run(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.schedules.{module}", *arguments]
    made = os.environ | (environment or {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=made)
    return json.loads(done.stdout.splitlines()[-1])


def keep(kind: str, row: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Put a row of `runs` or `memory` in the place of the one with the same keys."""
    found = read()
    found[kind] = [r for r in found[kind] if any(r[k] != row[k] for k in keys)] + [row]
    found["runs"].sort(key=lambda r: list(RECIPES).index(r["recipe"]))
    write_result(NAME, found | {"asked": asked(found), "norm_ratio": norm_ratio(found["runs"])})


def read() -> dict[str, Any]:
    """The rows that are there."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else {"runs": [], "memory": []}


def table() -> Table:
    """A line for each run."""
    rows = Table(title="SmolLM2-135M", title_justify="left")
    for title in HEAD:
        rows.add_column(title)
    for line in summarised(read()):
        rows.add_row(*line)
    return rows


if __name__ == "__main__":
    main()
