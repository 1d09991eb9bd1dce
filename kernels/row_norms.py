"""DoRA's norms, ‖W + s·BA‖ of every row, the way that is best here.

On a GPU with Triton they are one read of W, at every forward: whether A and B are what they were could only be known by
comparing them, and the answer would have to come back to the CPU, which costs more. Elsewhere, and for groups, they are
three thin products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

from peftkit.kernels.dora_norm import factored


@torch.no_grad()
def row_norms(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, squares: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """‖W + s·BA‖ of every row, and ‖W‖² where it was needed, to be given again as `squares` while W is the same; both
    detached: (out).

    weight: (out in), in any memory layout, a: (r in), b: (out r); or all three with groups in front. In fp32, or fp64
    where an operand is. No norm is zero: the least is the root of the dtype's smallest normal number, so that a row of
    zeros can be divided by its norm.
    """
    if not weight.is_meta and torch.is_autocast_enabled(weight.device.type):
        with torch.autocast(weight.device.type, enabled=False):
            return row_norms(weight, a, b, scale, squares)
    if weight.is_cuda and weight.dim() == 2 and maybe_current_level() is None:
        from peftkit.kernels.dora_norm_op import OPERATOR  # registers an operator, and imports Triton

        return OPERATOR(weight, a, b, scale), None
    return factored(weight, a, b, scale, squares)
