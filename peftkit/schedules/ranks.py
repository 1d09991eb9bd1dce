"""Schedules on several ranks: all must switch the same parameters, and what they train must stay equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn


def _gathered(value: Any) -> list[Any]:
    """`value` of every rank; nothing where there is one rank alone."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return []
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def check_settings(settings: Mapping[str, Any], who: str) -> None:
    """Every rank must have made the schedule alike, since no rank tells another what it draws.

    Raises:
        ValueError: naming the setting and the ranks.
    """
    for rank, theirs in enumerate(every := _gathered(dict(settings))):
        for key, value in every[0].items():
            if theirs.get(key) != value:
                raise ValueError(
                    f"{who} was made with {key}={value!r} on rank 0 and {key}={theirs.get(key)!r} on rank {rank}; "
                    "all ranks must switch the same parameters"
                )


def check_equal(trained: Mapping[str, nn.Parameter], who: str) -> None:
    """One number of every parameter that was trained, compared between the ranks; shards of one are left out.

    Raises:
        RuntimeError: naming a parameter that is no longer the same on all ranks.
    """
    whole = {name: p for name, p in trained.items() if type(p.data) is Tensor and p.numel()}
    if not whole or not distributed.is_available() or not distributed.is_initialized():
        return
    sample = torch.stack([p.detach().reshape(-1)[p.numel() // 2].double().cpu() for p in whole.values()]).tolist()
    for rank, theirs in enumerate(every := _gathered(sample)):
        for name, ours, other in zip(whole, every[0], theirs, strict=True):
            if ours != other and not (ours != ours and other != other):
                raise RuntimeError(
                    f"{name!r} is no longer the same on ranks 0 and {rank}: nothing sums the gradients of what {who} "
                    "turned on. Wrap the model in DistributedDataParallel while all of it is on, and make the schedule "
                    "afterwards; where ranks differ on purpose, check_ranks=False"
                )
