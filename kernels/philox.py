"""The dropout mask as a function of a seed, so that it is drawn again rather than stored.

    w₀ w₁ w₂ w₃ = Philox4x32-10(key = seed, counter = (j div 8, t, 0, 0))     Salmon et al., SC 2011
    u(t, j)     = the (j mod 8)-th sixteen bits of w₀ w₁ w₂ w₃, low half before high
    mask(t, j)  = u(t, j) ≥ ⌊p · 2¹⁶⌉

t is the row of x and j its column, so the mask depends on neither tiles, launches nor devices. Sixteen bits make
p a multiple of 2⁻¹⁶; what is kept is scaled by one over that very multiple's complement, so the mean is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The least of the 2¹⁶ values that is kept; some are kept, whatever p < 1."""
    return min(round(p * 2**16), 2**16 - 1)


def kept(p: float) -> float:
    """The probability that a number is kept: 1 − p, as far as sixteen bits tell."""
    return 1 - threshold(p) / 2**16


def keep_mask(seed: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """The mask in plain torch, (rows cols) in bool, on the device of `seed`: (1) in int64."""
    device = seed.device
    c0 = torch.arange((cols + 7) // 8, device=device)[None].expand(rows, -1)
    c1 = torch.arange(rows, device=device)[:, None].expand_as(c0)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (p1 >> 32 & _LOW) ^ c1 ^ k0, (p0 >> 32 & _LOW) ^ c3 ^ k1
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    words = torch.stack((c0, c1, c2, c3), dim=-1)
    # halves as int16, low before high; with the sign bit turned they order as the unsigned numbers do
    drawn = words.to(torch.int32).view(torch.int16) ^ -(2**15)
    return (drawn >= threshold(p) - 2**15).reshape(rows, 8 * c0.shape[1])[:, :cols]
