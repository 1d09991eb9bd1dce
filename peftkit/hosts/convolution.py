"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.hosts.base import Host
from peftkit.sites import Site


class ConvHost(Host):
    """`nn.Conv1d/2d/3d`. A is a convolution with the host's own kernel, stride, padding, dilation and groups; B is 1×1
    and grouped likewise, so that the pair is again one convolution and can be merged.

    In the file, as in peft, A is not grouped: `(r, in, *kernel)`, with zeros between the groups. One that peft has
    trained has no such zeros; it computes what it computes there, but no grouped weight can hold it.
    """

    def __init__(self, site: Site):
        super().__init__(site)
        self.groups = self.module.groups
        self.rows = self.module.out_channels // self.groups
        self.cols = self.weight[0].numel()
        self.feature_axis = -1 - len(self.module.kernel_size)
        self.intact = self.why_not_dense() is None and self.known_forward()

    def pair_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        kernel = self.module.kernel_size
        if r % self.groups:
            raise ValueError(f"r={r} at {self.name!r} is no multiple of its {self.groups} groups")
        return (r, self.module.in_channels // self.groups, *kernel), (
            self.module.out_channels,
            r // self.groups,
            *(1 for _ in kernel),
        )

    def add_low_rank(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
        x = x.to(device=a.device, dtype=y.dtype)
        s = self._conv(F.dropout(x, dropout) if dropout else x, a.to(x.dtype), self.module.in_channels // a.shape[1])
        ones = (1,) * len(self.module.kernel_size)
        delta = self._function()(s * scale, b.to(x.dtype), None, ones, 0, ones, self.groups)
        return y + delta.to(y.device)

    def _function(self) -> Callable[..., Tensor]:
        return (F.conv1d, F.conv2d, F.conv3d)[len(self.module.kernel_size) - 1]

    def _conv(self, x: Tensor, weight: Tensor, groups: int, bias: Tensor | None = None) -> Tensor:
        m, padding = self.module, self.module.padding
        if m.padding_mode != "zeros":
            x, padding = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode), 0
        return self._function()(x, weight, bias, m.stride, padding, m.dilation, groups)

    def matrices(self, weight: Tensor) -> list[Tensor]:
        return list(weight.reshape(self.groups, self.rows, self.cols))

    @torch.no_grad()
    def add_pair_(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        packed = weight.contiguous()  # channels_last has no view as a matrix
        super().add_pair_(packed, a, b, scale)
        if packed is not weight:
            weight.copy_(packed)

    @torch.no_grad()
    def rescale_(self, weight: Tensor, base: Tensor | None, a: Tensor, b: Tensor, scale: float, gain: Tensor) -> None:
        packed = weight.contiguous()
        super().rescale_(packed, None if base is None else base.contiguous(), a, b, scale, gain)
        if packed is not weight:
            weight.copy_(packed)

    def as_matrices(self, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lead = (self.groups,) if self.groups > 1 else ()
        return (
            weight.reshape(*lead, -1, self.cols),
            a.reshape(*lead, b.shape[1], self.cols),
            b.reshape(*lead, self.rows, b.shape[1]),
        )

    def why_not_hold(self, a: Tensor) -> str | None:
        if a.shape[1] == self.module.in_channels // self.groups:
            return None
        return f"its A, as peft trains it, crosses the {self.groups} groups of the convolution, which its weight cannot"

    def to_stored(self, a: Tensor) -> Tensor:
        if self.groups == 1 or self.why_not_hold(a) is not None:
            return a
        r, wide, *kernel = a.shape
        full = a.new_zeros(self.groups, r // self.groups, self.groups, wide, *kernel)
        for g, part in enumerate(a.view(self.groups, r // self.groups, wide, *kernel)):
            full[g, :, g] = part
        return full.view(r, self.groups * wide, *kernel)

    def from_stored(self, a: Tensor) -> Tensor:
        if self.groups == 1:
            return a
        r, _, *kernel = a.shape
        full = a.view(self.groups, r // self.groups, self.groups, -1, *kernel)
        own = torch.cat([full[g, :, g] for g in range(self.groups)])
        return own if torch.equal(self.to_stored(own), a) else a

    def pair_matrices(self, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
        per = b.shape[1]
        am = a.reshape(self.groups, per, self.cols)
        bm = b.reshape(self.groups, self.rows, per)
        return list(zip(am, bm, strict=True))

    def probe(self) -> Tensor:
        size = [self.module.in_channels] + [
            2 * d * (k - 1) + 1 for d, k in zip(self.module.dilation, self.module.kernel_size, strict=True)
        ]
        n = torch.Size(size).numel()
        return torch.linspace(-1, 1, n, device=self.weight.device, dtype=self.weight.dtype).view(1, *size)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv(x, weight, self.groups, bias)
