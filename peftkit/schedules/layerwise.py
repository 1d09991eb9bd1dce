"""A learning rate for each depth (ULMFiT's discriminative fine-tuning, arXiv 1801.06146, section 3.1)."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from peftkit import stacks
from peftkit.schedules.schedule import check_count
from peftkit.schedules.turns import check_nobody_else


def layerwise_lr(
    model: nn.Module,
    lr: float,
    decay: float = 0.95,
    *,
    frozen: int = 0,
    weight_decay: float = 0.0,
    blocks: stacks.Blocks | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups: `lr` above the blocks, and `decay` times less with every block on the way down.

    The group at depth d of L blocks learns at `lr · decay^(L + 1 − d)`: heads are at L + 1, embeddings at 0. That is
    ULMFiT's η^(l−1) = η^l / 2.6 with `decay=1 / 2.6`, and with `decay=0.95, frozen=10` on 12 blocks the adaptive
    fine-tuning of arXiv 2405.13181, η_l = η · 0.95^(12 − l) for l = 10 and 11 and the head (what its text says; its code
    compares a name wrongly and trains everything at η).

    Args:
        decay: in (0, 1].
        frozen: this many blocks from below, and what lies below them, are turned off and in no group.
        blocks: as of `LISA`.

    Groups go from the top down and hold what is trainable, adapters included, which learn at the rate of the block they
    hang in. A parameter in several places, as a tied embedding, counts as in the lowest.

    Raises:
        ValueError: a rate or decay out of range, more frozen blocks than there are, nothing trainable left, a
            schedule that was not closed.
        TargetError: no blocks.
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is positive, not {lr!r}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay is in (0, 1], not {decay!r}; ULMFiT's factor of 2.6 is decay=1 / 2.6")
    found = stacks.find(model, blocks)
    check_count("frozen", frozen, 0)
    if frozen > len(found):
        raise ValueError(f"frozen={frozen}, and the model has {len(found)} blocks")
    check_nobody_else(stacks.unwrapped(model))
    depths = stacks.depths(model, found)
    of: dict[nn.Parameter, int] = {}
    for module in stacks.unwrapped(model).modules():
        for p in module._parameters.values():
            if p is not None and p.requires_grad:
                of[p] = min(of.get(p, depths[id(module)]), depths[id(module)])
    lowest = frozen + 1 if frozen else 0
    if all(depth < lowest for depth in of.values()):
        raise ValueError(f"no parameter above the {frozen} frozen blocks is trainable")
    by_depth: dict[int, list[nn.Parameter]] = {}
    for p, depth in of.items():
        if depth < lowest:
            p.requires_grad_(False)
        else:
            by_depth.setdefault(depth, []).append(p)
    return [
        {"params": by_depth[d], "lr": lr * decay ** (len(found) + 1 - d), "weight_decay": weight_decay}
        for d in sorted(by_depth, reverse=True)
    ]
