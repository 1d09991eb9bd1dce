"""What is typed, as functions take it."""

from __future__ import annotations

from pathlib import Path

import torch


def adapter_and_weight(text: str) -> tuple[Path, float]:
    """`DIR` or `DIR=WEIGHT`; a directory of that very name, `=` and all, comes first.

    Raises:
        ValueError: what stands behind `=` is no number.
    """
    folder, sign, weight = text.rpartition("=")
    if not sign or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise ValueError(
            f"{text!r}: expected a directory, or a directory, '=' and a number, as in adapter=0.5"
        ) from None


def dtype_named(name: str | None) -> torch.dtype | None:
    """`float32`, or torch's other names.

    Raises:
        ValueError: torch has no such dtype.
    """
    found = getattr(torch, name.removeprefix("torch."), None) if name is not None else None
    if name is not None and not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: {name!r} is none; expected float32, bfloat16 or float16")
    return found


def rank_or_full(text: str | None) -> int | str | None:
    """A number or `full`.

    Raises:
        ValueError: neither.
    """
    if text is None or text == "full":
        return text
    if not text.isdigit():
        raise ValueError(f"rank: a number or 'full', not {text!r}")
    return int(text)
