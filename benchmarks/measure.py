"""Timing that can be compared, and the file that a result is kept in.

What is compared runs in one process and takes turns, so that a slow minute of the machine is shared by all.
Run the scripts from anywhere: `python benchmarks/lora_linear.py` finds this module beside itself.
"""

import contextlib
import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int = 30,
    setup: Callable[[], Any] | None = None,
    *,
    warmup: int = 2,
    inner: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of one call of each candidate.

    In every round each candidate runs once, in an order drawn anew, after an untimed `setup()`; `inner` calls
    are timed together where one is too short for the clock. Garbage is collected between rounds only. On a machine
    that others use as well, `clock=time.process_time` leaves out the waiting for a turn, and for the disk.
    """
    for _ in range(warmup):
        for run in candidates.values():
            if setup is not None:
                setup()
            run()

    times: dict[str, list[float]] = {name: [] for name in candidates}
    turns = list(candidates.items())
    order = random.Random(0)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for round_ in range(rounds):
            order.shuffle(turns)
            for name, run in turns:
                if setup is not None:
                    setup()
                start = clock()
                for _ in range(inner):
                    run()
                times[name].append((clock() - start) / inner)
            if round_ % 10 == 9:
                gc.collect()
    finally:
        if was_enabled:
            gc.enable()
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def saved_bytes(forward: Callable[[], torch.Tensor], kept: Iterable[torch.Tensor]) -> int:
    """What a forward pass leaves for backward: each storage once, without those of `kept`, which a model holds anyway."""
    held = {tensor.untyped_storage().data_ptr() for tensor in kept}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()  # alive until the storages are counted, so that no address is used twice
    del y
    return sum(storages.values())


def machine() -> dict[str, Any]:
    """What the figures depend on; nothing that says whose machine it is."""
    found = {
        "cpu": _cpu_name(),
        "arch": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    for name in ("peft", "transformers", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def write_result(name: str, rows: Any) -> Path:
    """Writes `benchmarks/results/<name>.json`: the machine, and `rows` as given."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    return path


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
