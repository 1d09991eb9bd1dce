"""What `import peftkit` adds to `import torch`, each time in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator

from .common import Row, Size

_SCRIPT = """
import json, time
import torch
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
before, wall, cpu = resident(), time.perf_counter(), time.process_time()
import {}
print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall, resident() - before]))
"""


def measure(size: Size) -> Iterator[Row]:
    """Time and memory of the import."""
    runs: dict[str, list[list[float]]] = {"peftkit": [], "peft": []}
    for i in range(1 + size.rounds):
        for library, found in runs.items():
            if library == "peft" and i > 1:
                continue  # seconds each
            done = subprocess.run(
                [sys.executable, "-c", _SCRIPT.format(library)], capture_output=True, text=True, check=True
            )
            if i:  # the first compiles
                found.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in runs.items()}
    cpu, wall, resident = ({name: m[i] for name, m in medians.items()} for i in range(3))
    # of the processor, since a process that waits for its turn says nothing about the import
    yield Row(
        "import over import torch, CPU time",
        cpu["peftkit"] * 1e3,
        "ms",
        size.limit(150),
        {**cpu, **{f"{name} on the wall": value for name, value in wall.items()}},
    )
    yield Row(
        "import over import torch, memory",
        resident["peftkit"] / 1e6,
        "MB",
        size.limit(25),
        {f"{name} bytes": value for name, value in resident.items()},
    )
