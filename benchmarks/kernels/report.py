"""What comes out: the result file of a device, the table that `choice` reads, and a table to look at."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.kernels.measure import NAMES, Row
from benchmarks.kernels.norms import NormRow
from benchmarks.measure import RESULTS, machine

KIND = "lora_kernels"

# Relative errors in the root mean square beyond which a result is wrong and not merely rounded.
_WRONG = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    commit = _said("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    if commit and _said("git", "-C", str(Path(__file__).parent), "status", "--porcelain", "--untracked-files=no"):
        commit += ", changed"
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        **machine(),
        "device": name,
        "driver": driver and driver.splitlines()[0],
        "cuda": torch.version.cuda,
        "commit": commit,
    }


def result_path(device: str) -> Path:
    """Where the figures of a device are kept, by its name."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def write(rows: list[Row], found: dict[str, Any], path: Path, norms: Sequence[NormRow] = ()) -> None:
    """Writes a result file: the environment, and every row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": KIND,
        "machine": found,
        "rows": [row.as_json() for row in rows],
        "norms": [asdict(row) for row in norms],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


# -- the chooser ----------------------------------------------------------------------------------------------------------


def chosen(rows: list[Row]) -> list[dict[str, Any]]:
    """For every case that was measured, the fastest of the ways that are right, as `choice` reads it."""
    entries = []
    for _, group in groupby(rows, key=lambda row: row.case):
        ways = [row for row in group if row.way is not None and row.overhead is not None and _is_right(row)]
        if not ways:
            continue
        best = min(ways, key=lambda row: row.overhead or 0.0)
        shape = dict(tokens=best.tokens, fan_in=best.fan_in, fan_out=best.fan_out, r=best.r)
        gained = {"gained": True} if best.kind == "dora" else {}
        entries.append({**shape, "dropout": best.dropout, **gained, "way": best.way})
    return entries


def choose(rows: list[Row], device: str, path: Path) -> None:
    """Replaces what the table at `path` says of this device by what `rows` say; other devices stay."""
    table = json.loads(path.read_text()) if path.exists() else {}
    if entries := chosen(rows):
        table[device] = entries
    path.write_text(json.dumps(table, indent=2) + "\n")


def _is_right(row: Row) -> bool:
    limit = _WRONG[row.dtype]
    return bool(row.errors) and all(math.isfinite(e) and e < limit for e in row.errors.values())


# -- to look at -----------------------------------------------------------------------------------------------------------


def table(rows: list[Row], title: str) -> Table:
    """Every row, in sections by case."""
    found = Table(
        "", "ms", "over base, %", "forward", "backward", "at most", "", "error y", "dX", "dA", "dB", "dm", "saved MiB",
        "peak", "timed by", title=title,
    )  # fmt: skip
    for case, group in groupby(rows, key=lambda row: row.case):
        found.add_section()
        found.add_row(f"[bold]{case}")
        for row in group:
            if row.failed is not None:
                found.add_row(f"  {row.by}", f"[red]failed: {row.failed[:60]}")
                continue
            milliseconds = row.both_ms if row.timed_by != "CUDA graph" else row.graph_ms
            found.add_row(
                f"  {row.by}",
                "" if milliseconds is None else f"{milliseconds:.4g}",
                *(percent(v) for v in (row.overhead, row.forward_overhead, row.backward_overhead, row.target)),
                {True: "[green]met", False: "[red]missed", None: ""}[row.met],
                *(f"{row.errors[k]:.1e}" if k in row.errors else "" for k in NAMES),
                *("" if v is None else f"{v:.4g}" for v in (row.saved_mib, row.peak_mib)),
                row.timed_by,
            )
    return found


def norm_table(rows: Sequence[NormRow]) -> Table:
    """Every way to the norms of W + s·BA."""
    found = Table("", "ms", "× one read of W", "peft's is × slower", "error", "peak MiB", title="DoRA's norm")
    for row in rows:
        if row.failed is not None:
            found.add_row(row.by, f"[red]failed: {row.failed[:60]}")
            continue
        cells = row.ms, row.over_read, row.under_peft, row.error, row.peak_mib
        found.add_row(row.by, *("" if v is None else f"{v:.3g}" for v in cells))
    return found


def percent(share: float | None) -> str:
    """A share in per cent, to one place after the point."""
    return "" if share is None else f"{100 * share:.1f}"


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
