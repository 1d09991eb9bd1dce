"""Row blocks of a weight that is several in one, such as a fused qkv: one low-rank pair for each, kept stacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit.hosts import Host, LinearHost
from peftkit.targets import TargetError

Blocks = Sequence[tuple[int, int]]


def check(blocks: Blocks, host: Host) -> None:
    """Refuse blocks `(start, stop)` that are not disjoint ranges of the host's rows.

    Raises:
        TargetError: naming the block.
    """
    if blocks and not isinstance(host, LinearHost):
        raise TargetError(f"rows: {host.name!r} is no Linear, so it has no row blocks")
    end = 0
    for start, stop in sorted(blocks):
        if not 0 <= start < stop <= host.rows:
            raise TargetError(f"rows: ({start}, {stop}) does not lie in the {host.rows} rows of {host.name!r}")
        if start < end:
            raise TargetError(f"rows: the blocks {list(blocks)} of {host.name!r} overlap")
        end = stop


def spread(b: Tensor, blocks: Blocks, r: int, rows: int) -> Tensor:
    """Stacked B: `(sum of the blocks' rows, r)` -> `(rows, r · blocks)`, each at its rows and columns, zeros between."""
    if not blocks:
        return b
    whole = b.new_zeros(rows, r * len(blocks))
    pieces = b.split([stop - start for start, stop in blocks])
    for i, ((start, stop), piece) in enumerate(zip(blocks, pieces, strict=True)):
        whole[start:stop, r * i : r * (i + 1)] = piece
    return whole


def stacked(b: Tensor, blocks: Blocks, r: int) -> Tensor:
    """The inverse of `spread`."""
    pieces = [b[start:stop, r * i : r * (i + 1)] for i, (start, stop) in enumerate(blocks)]
    return torch.cat(pieces) if pieces else b.contiguous()
