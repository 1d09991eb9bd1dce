"""What reports of files have in common: names that are many, and numbers that JSON has no words for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_SHOWN = 8


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def plain(value: Any) -> Any:
    """The same as JSON can hold it: None for what is no finite number."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
