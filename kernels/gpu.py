"""Triton, where there is one, and what every kernel needs of it; imported with the first kernel, not before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from peftkit.kernels.choice import INTERPRETED

if TYPE_CHECKING:
    import triton
    import triton.language as tl

    def jit(function: Callable[..., Any]) -> Any: ...  # noqa: D103
else:
    try:
        import triton
        import triton.language as tl

        jit = triton.jit
    except ImportError:  # not on Windows and macOS; the references of the kernels need none
        triton = tl = None

        def jit(function):
            """The function as it is."""
            return function


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, which can be run, or compiled for a chip that is not there.

    Attributes:
        kernel: what `jit` made.
        grid: programs along each axis; with a zero among them nothing is launched.
        arguments: tensors, strides, sizes and numbers, by name.
        constants: what the kernel is compiled for, by name.
        warps: to a program.
        stages: loads in flight ahead of the product that needs them.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int

    def __call__(self) -> None:
        if not all(self.grid):
            return
        place = next(t.device for t in self.arguments.values() if isinstance(t, torch.Tensor))
        # Triton launches on the current device, which need not be the tensors'
        with torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)


def dot_constants(dtype: torch.dtype) -> dict[str, Any]:
    """How `dot` multiplies numbers of this dtype.

    WIDE: the interpreter multiplies bf16 as if it were integers, so operands are widened there first.
    PRECISION: of fp32 products, as torch has it for its own.
    """
    return {"WIDE": INTERPRETED, "PRECISION": "tf32" if dtype is torch.float32 and _tf32() else "ieee"}


def _tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # whoever has set it may not read the older flag
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


@jit
def dot(x, y, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x y, summed in fp32."""
    if WIDE:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision=PRECISION)
    return tl.dot(x, y, acc, input_precision=PRECISION)


@jit
def keep_tile(seed, rows, first, bar, COLS: tl.constexpr):
    """The mask of `philox` for a tile: (len(rows) COLS), from column `first` on; `first` and COLS are multiples of 8.

    seed: a pointer; bar: `threshold(p)`.
    """
    zero = tl.zeros((rows.shape[0], COLS // 8), dtype=tl.uint32)
    blocks = (first // 8 + tl.arange(0, COLS // 8)).to(tl.uint32)[None, :] + zero
    w0, w1, w2, w3 = tl.philox(tl.load(seed), blocks, rows.to(tl.uint32)[:, None] + zero, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    drawn = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(drawn, (rows.shape[0], COLS)).to(tl.int32) >= bar


@jit
def shift(bias, gain):
    """`rescale.shift_of`: (1 − g) ∘ c in fp32, 0 where the bias is infinite."""
    found = bias.to(tl.float32) * (1.0 - gain)
    return tl.where(tl.abs(found) < float("inf"), found, 0.0)


def ceil_div(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)


def capability(x: torch.Tensor) -> int:
    """Of the device of x, as in sm_90; interpreted, a Hopper's."""
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def reachable(x: torch.Tensor) -> torch.Tensor:
    """x, or a dense copy where its columns lie further apart than the kernels' 32-bit offsets reach."""
    return x if (x.shape[1] - 1) * x.stride(1) < 2**31 else x.contiguous()


def rank_tile(r: int) -> int:
    """The rank as a kernel sees it: a power of two of at least 16, the least that a matrix instruction takes."""
    return max(16, 1 << (r - 1).bit_length())


def split(n: int, programs: int, others: int, tile: int) -> tuple[int, int]:
    """Into how many parts to cut `n`, and how long they are, so that `others` · parts is about `programs`.

    A part is a multiple of `tile`, and depends on shapes alone: sums over parts come out the same every time.
    """
    parts = max(1, min(ceil_div(programs, max(1, others)), ceil_div(n, tile)))
    length = ceil_div(ceil_div(n, parts), tile) * tile
    return ceil_div(n, length) if n else 1, max(tile, length)
