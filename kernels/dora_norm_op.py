"""The norm as `torch.compile` sees it on a GPU, whichever way it is computed.

peftkit::dora_norm(weight, a, b, scale) -> n: (out) in fp32 or wider, without a gradient
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit.kernels.choice import why_not_triton
from peftkit.kernels.dora_norm import factored, wide
from peftkit.kernels.dora_norm_tiles import dora_norm


@torch.no_grad()
def _norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """By tiles where Triton runs, which is decided here, where no tracer looks on."""
    if any(why_not_triton(weight.device, t.dtype) is not None for t in (weight, a, b)):
        return factored(weight, a, b, scale)[0]
    return dora_norm(weight, a, b, scale)


_library = torch.library.Library("peftkit", "FRAGMENT")
_library.define("dora_norm(Tensor weight, Tensor a, Tensor b, float scale) -> Tensor")
_library.impl("dora_norm", _norms, "CompositeExplicitAutograd")
torch.library.register_fake(
    "peftkit::dora_norm",
    lambda weight, a, b, scale: weight.new_empty(weight.shape[0], dtype=wide(weight, a, b)),
    lib=_library,
)
OPERATOR = torch.ops.peftkit.dora_norm.default
