"""Measure peftkit's verbs beside peft's, in one process and on one thread, and print a table.

Times are CPU time, which other users of the machine do not stretch; saving, which waits for the disk, is timed on the wall.

`python -m benchmarks.against_peft` takes minutes. With `--full` it takes most of an hour, nearly all of it peft's, and
writes the result file. `--only switching files` measures some groups, and with `--write` renews their rows in it.
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be looked up while the clock runs

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, write_result

from . import attaching, calling, dora, files, importing, merging, prefix, switching
from .common import FULL, QUICK, Group, Row

GROUPS: dict[str, Group] = {
    "importing": importing.measure,
    "attaching": attaching.measure,
    "memory": attaching.measure_memory,
    "calling": calling.measure,
    "merging": merging.measure,
    "dora": dora.measure,
    "switching": switching.measure,
    "files": files.measure,
    "prefix": prefix.measure,
}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against_peft", description=__doc__)
    parser.add_argument("--full", action="store_true", help="100 adapters, more rounds; writes the result file")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="some groups")
    parser.add_argument("--write", action="store_true", help="keep the outcome of a smaller run too")
    args = parser.parse_args()

    torch.set_num_threads(1)
    console = Console()
    rows: list[Row] = []
    found: dict[str, list[dict[str, Any]]] = {}
    for name in args.only:
        found[name] = []
        with console.status(f"measuring: {name}"):
            for row in GROUPS[name](FULL if args.full else QUICK):
                rows.append(row)
                found[name].append({"group": name, **row.as_json()})
                console.print(f"{row.what}: {figure(row.measured)} {row.unit}", highlight=False)
    console.print(table(rows))
    if args.write or args.full:
        write_result("against_peft", [row for name in GROUPS for row in (found[name] if name in found else kept(name))])


def kept(group: str) -> list[dict[str, Any]]:
    """The rows of a group that was not measured now, as they stand in the result file."""
    return [row for row in json.loads((RESULTS / "against_peft.json").read_text())["rows"] if row["group"] == group]


def table(rows: list[Row]) -> Table:
    """All rows with their verdicts."""
    made = Table(title="peftkit beside peft")
    made.add_column("what", overflow="fold")
    for title in ("measured", "at most"):
        made.add_column(title, justify="right")
    made.add_column("of")
    made.add_column("")
    for row in rows:
        limit = "" if row.limit is None else figure(row.limit)
        verdict = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[row.met]
        made.add_row(row.what, figure(row.measured), limit, row.unit, verdict)
    return made


def figure(value: float) -> str:
    """Small ratios as fractions, as they are promised."""
    return f"1/{1 / value:.3g}" if 0 < value < 0.4 else f"{value:.3g}"


if __name__ == "__main__":
    main()
