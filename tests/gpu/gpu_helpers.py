"""Random operands in any layout, and how far a result may be from fp64."""

from __future__ import annotations

import os

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# The interpreter takes milliseconds for a step of a tile.
SIZE = 70 if INTERPRETED else 700
quick = settings(max_examples=12 if INTERPRETED else 25, deadline=None, derandomize=True)

sizes = st.integers(1, SIZE)
tokens = st.sampled_from([0, 1, 2, 15, 16, 33, 64, SIZE])
ranks = st.sampled_from([1, 2, 5, 8, 16, 17, 64, 100, 256])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
pairs = st.sampled_from([None, torch.float32])  # None: the dtype of x
dropouts = st.sampled_from([0.0, 0.1, 0.5])
layouts = st.sampled_from(["plain", "transposed", "sliced", "expanded"])


def draw(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "plain") -> Tensor:
    """Random numbers of mean square 1, in memory as `layout` says; what is not theirs is NaN."""
    t = torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "sliced":
        wide = torch.full((shape[0], 2 * shape[1] + 1), float("nan"), dtype=dtype, device=DEVICE)
        wide[:, : 2 * shape[1] : 2] = t
        return wide[:, : 2 * shape[1] : 2]
    if layout == "expanded" and shape[0]:
        return t[:1].expand(shape)
    return t


def a_seed(value: int = 0x1234_5678_9ABC_DEF) -> Tensor:
    return torch.tensor([value], device=DEVICE)


def assert_close(found: Tensor, plain: Tensor, exact: Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    """Error at most twice that of plain torch in the same dtype, and two roundings of every term.

    plain: the reference in that dtype; exact: in fp64; magnitude: in fp64 of the operands' absolute values, where nothing
    cancels.
    """
    assert found.shape == exact.shape
    assert torch.isfinite(found).all()
    error, theirs = (found.double() - exact).norm(), (plain.double() - exact).norm()
    room = 2 * torch.finfo(dtype).eps * magnitude.norm()
    assert error <= 2 * theirs + room, f"{error:.3g} from fp64, plain torch {theirs:.3g}, roundings {room:.3g}"
