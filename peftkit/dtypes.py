"""The dtype of an adapter's parameters."""

from __future__ import annotations

import torch


def own_dtype(base: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """An adapter's dtype over a base of dtype `base`: that of a wide base, fp32 over a half-precision one."""
    return asked or (base if base.itemsize >= 4 else torch.float32)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse what cannot be trained.

    Raises:
        ValueError: a dtype that is not floating-point.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: a floating-point dtype, not {dtype}")
