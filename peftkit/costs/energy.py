"""The energy of a step, by the machine's own counters: NVML for an NVIDIA GPU, RAPL for the CPU.

A counter is of the whole GPU or the whole machine's CPUs: what else runs there is in it, and so is what they draw idle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RAPL = Path("/sys/class/powercap")
Reading = Callable[[], float]  # joules since some moment


class NotMeasured(Exception):
    """The machine does not tell, with the reason."""


def energy_of(step: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Joules of one step: the mean over as many as go into `seconds`, at least one.

    Raises:
        NotMeasured: with the reason.
    """
    wait: Callable[[], Any] = lambda: None  # noqa: E731
    if device.type == "cuda":
        wait, joules = lambda: torch.cuda.synchronize(device), nvml_counter(device)
    elif device.type == "cpu":
        joules = rapl_counter(RAPL)
    else:
        raise NotMeasured(f"nothing is known of energy counters of {device.type} devices")
    step()
    wait()
    count, before, begun = 0, joules(), time.perf_counter()
    while not count or time.perf_counter() - begun < seconds:
        step()
        count += 1
    wait()
    return (joules() - before) / count


def nvml_counter(device: torch.device) -> Reading:
    """What the GPU has drawn since its driver was loaded (nvmlDeviceGetTotalEnergyConsumption, in millijoules).

    Raises:
        NotMeasured: no pynvml, or NVML refuses: GPUs before Volta and slices of one have no such counter.
    """
    try:
        import pynvml  # type: ignore[import-not-found]
    except ImportError:
        raise NotMeasured("NVML is read through pynvml: pip install 'peftkit[energy]'") from None
    try:
        pynvml.nvmlInit()
        # CUDA numbers the devices that it may see, NVML all of them
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        raise NotMeasured(f"NVML: {error}") from None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def rapl_counter(root: Path) -> Reading:
    """What all CPU packages and their memory have drawn (`intel-rapl:*/energy_uj`, in microjoules; AMD's too).

    A counter that ran over between two readings is taken to have done so once. Zones within a package are part of it,
    but for `dram`; `psys` is the whole machine and left out.

    Raises:
        NotMeasured: no such files, or only root may read them.
    """
    zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if _counts(zone)]
    if not zones:
        raise NotMeasured(f"no RAPL counter of a CPU package in {root}")
    try:
        ranges = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in zones}
        last = _read(zones)
    except (OSError, ValueError) as error:
        raise NotMeasured(f"RAPL: {error}") from None
    drawn = 0

    def joules() -> float:
        nonlocal last, drawn
        now = _read(zones)
        drawn += sum((now[z] - last[z]) + (ranges[z] if now[z] < last[z] else 0) for z in zones)
        last = now
        return drawn / 1e6

    return joules


def _counts(zone: Path) -> bool:
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"


def _read(zones: list[Path]) -> Mapping[Path, int]:
    return {zone: int((zone / "energy_uj").read_text()) for zone in zones}
