"""`nn.Embedding`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.hosts.base import Host
from peftkit.sites import Site


class EmbeddingHost(Host):
    """`nn.Embedding`: a table `(V, d)`, which as a linear map of one-hot rows is the matrix `(d, V)`."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.cols, self.rows = self.weight.shape
        self.intact = self.why_not_dense() is None and self.known_forward()

    @property
    def embed_scale(self) -> float | Tensor:
        """Gemma-like embeddings multiply what they look up."""
        return getattr(self.module, "embed_scale", 1.0)

    def pair_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.cols), (self.rows, r)

    def add_low_rank(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        m = self.module
        rows = F.embedding(x.to(a.device), a.t(), m.padding_idx, None, 2.0, m.scale_grad_by_freq)
        delta = F.linear(rows * scale, b).to(device=y.device, dtype=y.dtype)
        return y + (
            delta if isinstance(self.embed_scale, float) and self.embed_scale == 1.0 else delta * self.embed_scale
        )

    def matrices(self, weight: Tensor) -> list[Tensor]:
        return [weight.t()]

    def from_matrices(self, pieces: list[Tensor]) -> Tensor:
        return pieces[0].t()

    def probe(self) -> Tensor:
        return torch.arange(min(3, self.cols), device=self.weight.device)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight) * self.embed_scale
