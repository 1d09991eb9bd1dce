"""Measure the kernels of LoRA and DoRA beside the frozen base and the baselines, and print a table.

On a GPU this takes about four minutes at most and writes `benchmarks/results/<device>.json`; with `--choose` also which way
is fastest on it, for `lora_linear` to take. Without a GPU it runs small cases, to show that it works, and writes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from rich.console import Console

from benchmarks.kernels import norms, report
from benchmarks.kernels.cases import GPU, for_device
from benchmarks.kernels.measure import Row, measure
from peftkit.kernels import choice

OURS = "lora_linear", "dora_linear", "peftkit"
MOST = 8.0  # seconds of timing for a case, beyond which medians gain nothing


def main(arguments: list[str] | None = None) -> int:
    """Measure; 1 where one of our own ways failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--choose", action="store_true", help=f"write {choice.TABLE.name} for this GPU")
    parser.add_argument("--seconds", type=float, default=180, help="for all cases, of which compiling takes a part")
    parser.add_argument("--name", action="store_true", help="print what the files of this GPU are called, and stop")
    parser.add_argument("--compile", action="store_true", help="torch.compile without a GPU too")
    args = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.name and device.type != "cuda":
        sys.exit(f"torch {torch.__version__} finds no GPU here")
    found = report.environment(device)
    path = report.result_path(found["device"])
    if args.name:
        print(path.stem)
        return 0
    console = Console(width=190)
    cases = for_device(device)
    rows: list[Row] = []
    start = time.perf_counter()
    for i, case in enumerate(cases):
        left = args.seconds - (time.perf_counter() - start)
        # torch.compile takes longer than everything else, so it goes first where time runs short
        compiled = args.compile or (device.type == "cuda" and left > args.seconds / 3)
        seconds = min(MOST, max(1.0, left / (len(cases) - i) / 2)) if device.type == "cuda" else 1.0
        with console.status(f"measuring: {case}"):
            rows += measure(case, device, seconds, compiled)
        if device.type == "cuda":
            report.write(rows, found, path)  # each time, so that a run cut short leaves something

    of_norm = norms.measure(device, min(MOST, args.seconds / 20))
    console.print(report.table(rows, f"LoRA and DoRA kernels, {found['device']}"))
    console.print(report.norm_table(of_norm))
    if device.type != "cuda":
        console.print(
            f"No GPU: these cases are small, to try the benchmark; none of the {len(GPU)} cases was measured, "
        )
        console.print("no figure of a GPU came about, and nothing was written.")
    else:
        report.write(rows, found, path, of_norm)
        console.print(f"wrote {path.name} in {time.perf_counter() - start:.0f} s")
        if args.choose:
            report.choose(rows, found["device"], choice.TABLE)
            console.print(f"wrote {choice.TABLE.name}")
    return int(any(row.failed and row.by.startswith(OURS) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
