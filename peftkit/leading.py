"""Initial pairs taken from the weight itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit.hosts import ConvHost, EmbeddingHost, Host

INITS = ("pissa", "olora")


def pair(weight: Tensor, r: int, init: str, scale: float) -> tuple[Tensor, Tensor]:
    """A: `(r in)` and B: `(out r)` of `weight: (out in)`.

    PiSSA (arXiv 2404.02948, eq. 2 and 3): the leading singular vectors and values, the scale divided out. OLoRA (arXiv
    2406.01775, algorithm 1): the first columns and rows of a QR decomposition, the scale left in, as peft has it.
    """
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r], q[:, :r]
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (sigma[:r] / scale).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def why_not(host: Host) -> str | None:
    """Why no pair can be taken from the host's weight; None where one can."""
    if isinstance(host, ConvHost | EmbeddingHost):
        return "it is no Linear"
    if (reason := host.why_not_dense()) is not None:
        return reason
    return "it is on the meta device" if host.weight.is_meta else None


def stacked(
    weight: Tensor, blocks: Sequence[tuple[int, int]], r: int, init: str, scale: float
) -> tuple[Tensor, Tensor]:
    """The pairs of several blocks of rows, one below the other."""
    pairs = [pair(weight[start:stop].float(), r, init, scale) for start, stop in blocks]
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
