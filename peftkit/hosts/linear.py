"""`nn.Linear` and its kin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.hosts.base import Host, is_hf_conv1d
from peftkit.kernels.lora_linear import lora_delta
from peftkit.sites import Site


class LinearHost(Host):
    """`nn.Linear` and its kin; `(in, out)` weights of GPT-2's Conv1D are read through a transposed view."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.transposed = site.part is None and is_hf_conv1d(site.module)
        shape, dense = self.weight.shape, self.why_not_dense() is None
        if dense and len(shape) == 2:
            self.cols, self.rows = tuple(shape) if self.transposed else tuple(reversed(shape))
        else:  # packed weights have no shape of their own
            self.cols, self.rows = self.module.in_features, self.module.out_features  # type: ignore[assignment]
        self.intact = dense and not self.read and self.known_forward()

    def pair_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.cols), (self.rows, r)

    def add_low_rank(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        if x.dtype != y.dtype:
            x = x.to(y.dtype)
        if x.device != a.device:
            x = x.to(a.device)
        if y.device != a.device:
            return y + lora_delta(x, torch.zeros_like(y, device=a.device), a, b, scale, dropout).to(y.device)
        return lora_delta(x, y, a, b, scale, dropout)

    def matrices(self, weight: Tensor) -> list[Tensor]:
        return [weight.t() if self.transposed else weight]

    def from_matrices(self, pieces: list[Tensor]) -> Tensor:
        return pieces[0].t() if self.transposed else pieces[0]

    def probe(self) -> Tensor:
        return torch.linspace(-1, 1, self.cols, device=self.weight.device, dtype=self.weight.dtype)[None]

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t() if self.transposed else weight, bias)
