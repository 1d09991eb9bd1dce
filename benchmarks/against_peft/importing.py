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
before, start = resident(), time.perf_counter()
import {}
print(json.dumps([time.perf_counter() - start, resident() - before]))
"""


def measure(size: Size) -> Iterator[Row]:
    """Time and memory of the import."""
    runs: dict[str, list[list[float]]] = {"peftkit": [], "peft": []}
    for i in range(1 + size.rounds):
        for library, found in runs.items():
            if library == "peft" and i > 3:
                continue  # seconds each
            done = subprocess.run(
                [sys.executable, "-c", _SCRIPT.format(library)], capture_output=True, text=True, check=True
            )
            if i:  # the first compiles
                found.append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {name: statistics.median(s for s, _ in found) for name, found in runs.items()}
    megabytes = {f"{name} MB": statistics.median(b for _, b in found) / 1e6 for name, found in runs.items()}
    yield Row("import over import torch, time", seconds["peftkit"] * 1e3, "ms", size.limit(150), seconds)
    yield Row("import over import torch, memory", megabytes["peftkit MB"], "MB", size.limit(25), megabytes)
