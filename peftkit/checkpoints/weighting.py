"""Stored adapters and the weight of each, as functions take them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

Folder = str | os.PathLike[str]
Weighted = Folder | Sequence[Folder | tuple[Folder, float]] | Mapping[Folder, float]


def weighted(adapters: Weighted) -> list[tuple[Path, float]]:
    """Directories with their weights, in the order given; 1 where none is.

    Raises:
        TypeError: neither a path nor paths with weights. ValueError: there is none, or a weight is no finite number.
    """
    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    pairs = list(adapters.items()) if isinstance(adapters, Mapping) else list(adapters)
    found = []
    for one in pairs:
        folder, weight = one if isinstance(one, tuple) and len(one) == 2 else (one, 1.0)
        if not isinstance(folder, str | os.PathLike):
            raise TypeError(f"adapters: directories, or pairs of one and its weight, not {one!r}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"adapters: the weight of {os.fspath(folder)!r} is {weight!r}, expected a finite number")
        found.append((Path(folder), float(weight)))
    if not found:
        raise ValueError("adapters: none is given")
    return found
