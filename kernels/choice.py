"""Which way a LoRA linear is computed here, and why.

    torch       products of torch, with kept masks: a CPU, or no Triton
    addmm       the library's products, the low-rank term added by another; masks drawn again by Triton
    epilogue    Triton adds the low-rank term inside the base's product, and reads dY once for dS and dB
    augmented   one product of the library's for base and low-rank term, over widened operands

`ways.json` holds, by name of device, what was fastest for the shapes that were measured on it; the nearest shape
counts. A device that was never measured takes `addmm`. PEFTKIT_LORA_LINEAR=epilogue, or `way="epilogue"`, forces one.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

WAYS = "torch", "addmm", "epilogue", "augmented"
VARIABLE = "PEFTKIT_LORA_LINEAR"
TABLE = Path(__file__).with_name("ways.json")
LARGEST_RANK = 256  # of the Triton kernels, which hold a whole rank in registers
# Triton decides by this, at its own import, whether kernels are interpreted, on tensors of the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = torch.float32, torch.float16, torch.bfloat16


def way(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    fan_in: int,
    fan_out: int,
    r: int,
    dropout: float,
    gained: bool = False,
) -> str:
    """The way to take for a product of this shape; gained: whether its features are multiplied by gains.

    Raises:
        ValueError: the environment names a way that there is not, or that cannot run here.
    """
    forced = os.environ.get(VARIABLE)
    if forced:
        return checked(forced, device, dtype, r)
    if why_not_triton(device, dtype, r) is not None:
        return "torch"
    found = _nearest(torch.cuda.get_device_name(device), (tokens, fan_in, fan_out, r), dropout > 0, gained)
    return found or "addmm"


def checked(name: str, device: torch.device, dtype: torch.dtype, r: int) -> str:
    """`name`, if it is a way that can run here.

    Raises:
        ValueError: it is not.
    """
    if name not in WAYS:
        raise ValueError(f"way: expected one of {', '.join(WAYS)}, found {name!r} (argument, or {VARIABLE})")
    if name != "torch" and (reason := why_not_triton(device, dtype, r)) is not None:
        raise ValueError(f"way: {name!r} cannot run here: {reason}; 'torch' can")
    return name


def why_not_triton(device: torch.device, dtype: torch.dtype | None = None, r: int = 1) -> str | None:
    """Why the Triton kernels cannot run; None where they can."""
    if not _has_triton():
        return "Triton is not installed"
    if INTERPRETED:
        return None if device.type == "cpu" else "Triton's interpreter works on tensors of the CPU"
    if device.type != "cuda":
        return f"no GPU: the tensors are on {device.type}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than the kernels, which were made for NVIDIA's from Ampere on"
    if dtype is not None and dtype not in _DTYPES:
        return f"no kernel for {dtype}"
    return f"r = {r}, and the kernels take {LARGEST_RANK} at most" if r > LARGEST_RANK else None


def line(device: torch.device) -> str:
    """Which way is in use on a device, and why, in one line."""
    forced = os.environ.get(VARIABLE)
    if forced:
        return f"{forced} ({VARIABLE} is set)"
    reason = why_not_triton(device)
    if reason is not None:
        return f"torch ({reason})"
    name = torch.cuda.get_device_name(device)
    if name in table():
        return f"Triton and cuBLAS (as measured on this {name})"
    return f"addmm, with masks by Triton ({name} was not measured)"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def table() -> dict[str, list[dict[str, Any]]]:
    """What was measured: by name of device, shapes and their fastest way."""
    return json.loads(TABLE.read_text())


@functools.lru_cache(1024)
def _nearest(device: str, shape: tuple[int, int, int, int], dropout: bool, gained: bool = False) -> str | None:
    rows = [row for row in table().get(device, ()) if (row["dropout"] > 0) is dropout]
    rows = [row for row in rows if row.get("gained", False) is gained] or rows
    if not rows:
        return None
    keys = "tokens", "fan_in", "fan_out", "r"

    def distance(row: dict[str, Any]) -> float:
        return sum(abs(math.log(n / row[key])) for key, n in zip(keys, shape, strict=True))

    return min(rows, key=distance)["way"]
