"""What training holds in memory: counted over its tensors, and as the system sees the process."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.demo.__main__ import peak_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Of the numbers, each tensor once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters, trained or not."""
    return nbytes(model.parameters())


def gradient_bytes(model: nn.Module) -> int:
    """Of the gradients that are there now."""
    return nbytes(p.grad for p in model.parameters() if p.grad is not None)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of every tensor in the optimizer's state."""
    return nbytes(v for of in optimizer.state.values() for v in of.values() if isinstance(v, Tensor))


def resident() -> int:
    """Bytes that are resident now."""
    with contextlib.suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
    return 0


def peak() -> int:
    """The most bytes that were resident since `forget_peak`; where the system forgets none, since the process began."""
    return peak_memory()


def forget_peak() -> None:
    """Begin `peak` anew."""
    gc.collect()
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")
