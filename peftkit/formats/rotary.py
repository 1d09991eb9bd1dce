"""The two orders in which a rotary head's rows are kept.

A rotation turns pairs of rows. Transformers keeps the first halves of a head's pairs, then the second halves; Meta's own
code, and torchtune and llama.cpp after it, keep the two of each pair side by side. The same model, its rows permuted:

    halves:      x₀ x₁ … x₍d/2₋₁₎ y₀ y₁ …        interleaved:  x₀ y₀ x₁ y₁ …
"""

from __future__ import annotations

from torch import Tensor


def interleaved(t: Tensor, heads: int) -> Tensor:
    """From halves to pairs side by side. t: `(heads·d …)`, the rows of a projection, of its B or of its magnitudes.

    Raises:
        ValueError: the rows are no whole number of pairs a head.
    """
    return t.unflatten(0, (heads, 2, _pairs(t, heads))).transpose(1, 2).reshape(t.shape)


def halves(t: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    return t.unflatten(0, (heads, _pairs(t, heads), 2)).transpose(1, 2).reshape(t.shape)


def _pairs(t: Tensor, heads: int) -> int:
    if len(t) % (2 * heads):
        raise ValueError(f"{len(t)} rows are not those of {heads} rotary heads, which have an even number of rows each")
    return len(t) // (2 * heads)
