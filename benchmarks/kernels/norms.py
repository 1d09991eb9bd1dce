"""The norms of the rows of W + s·BA: ours, the dense sum, the factored formula, peft's, and one read of W."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.baselines import HAS_PEFT
from benchmarks.kernels.cases import SCALE
from benchmarks.kernels.measure import clock, take_turns
from peftkit.kernels.dora_norm import reference
from peftkit.kernels.row_norms import row_norms

READ = "one read of W"
Found = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class NormRow:
    """One way.

    Attributes:
        by: its name.
        width, r: of W: (width width), in bf16 on a GPU, and of the pair, in fp32.
        ms: median.
        over_read: that over the time of one read of W.
        under_peft: how many times as long peft takes.
        error: the largest, relative to the norm in fp64.
        peak_mib: allocated at most, beside what was there before; None on a CPU.
        failed: why there are no figures.
    """

    by: str
    width: int
    r: int
    ms: float | None = None
    over_read: float | None = None
    under_peft: float | None = None
    error: float | None = None
    peak_mib: float | None = None
    failed: str | None = None


def measure(device: torch.device, seconds: float, width: int | None = None, r: int = 16) -> list[NormRow]:
    """All of them, taking turns: at 8192² on a GPU."""
    width = width or (8192 if device.type == "cuda" else 96)
    torch.manual_seed(0)
    w = torch.randn(width, width, device=device).div_(width**0.5)
    w = w.bfloat16() if device.type == "cuda" else w
    a, b = torch.randn(r, width, device=device) / width**0.5, 0.1 * torch.randn(width, r, device=device)
    rows = {name: NormRow(name, width, r) for name in _ways()}
    runs: dict[str, Callable[[], Any]] = {}
    with torch.no_grad():
        true = reference(w.double(), a.double(), b.double(), SCALE)
        for name, way in _ways().items():
            try:
                _examine(rows[name], way, (w, a, b), true)
                runs[name] = lambda way=way: way(w, a, b)
            except Exception as error:
                rows[name].failed = f"{type(error).__name__}: {error}".splitlines()[0]
        mark, between = clock(device)
        times: dict[str, list[float]] = {name: [] for name in runs}

        def turn(name: str) -> Callable[[], None]:
            start = mark()
            runs[name]()
            end = mark()
            return lambda: times[name].append(between(start, end))

        take_turns(list(runs), turn, device, seconds)
    for name, found in times.items():
        rows[name].ms = statistics.median(found)
    read, theirs = rows[READ].ms, rows[_PEFT].ms if _PEFT in rows else None
    for row in rows.values():
        if row.ms is not None and read is not None:
            row.over_read = row.ms / read
            row.under_peft = None if theirs is None else theirs / row.ms
    return list(rows.values())


_PEFT = "peft"


def _ways() -> dict[str, Found]:
    found: dict[str, Found] = {
        READ: lambda w, a, b: torch.linalg.vector_norm(w, dim=1),
        "peftkit": lambda w, a, b: row_norms(w, a, b, SCALE)[0],
        "dense W + s·BA": lambda w, a, b: reference(w, a, b, SCALE),
        "factored": _factored,
    }
    return found | ({_PEFT: _peft} if HAS_PEFT else {})


def _factored(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The three terms of arXiv 2603.22276, nothing kept and nothing guarded."""
    wide = w.float()
    cross = ((wide @ a.t()) * b).sum(1)
    square = ((b @ (a @ a.t())) * b).sum(1)
    return (wide.square().sum(1) + 2 * SCALE * cross + SCALE**2 * square).sqrt()


def _peft(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """As its DoRA layer computes it at every forward: an identity goes through A and B."""
    from peft.tuners.lora.dora import DoraLinearLayer

    eye = torch.eye(w.shape[1], device=w.device, dtype=a.dtype)
    change = ((eye @ a.t()) @ b.t()).t()
    return DoraLinearLayer(fan_in_fan_out=False).get_weight_norm(w.to(a.dtype), change, SCALE)  # type: ignore[arg-type]


def _examine(row: NormRow, way: Found, given: tuple[Tensor, Tensor, Tensor], true: Tensor) -> None:
    cuda = given[0].is_cuda
    way(*given)
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    found = way(*given)
    if cuda:
        row.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    if row.by != READ:
        row.error = float(((found.double() - true) / true).abs().max())
