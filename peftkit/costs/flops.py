"""The floating-point operations of a forward and its backward, counted by torch's counter with what it does not know.

Counted are products, two operations for each multiplication, as everywhere in the literature: Linears, convolutions,
attention. Not counted are elementwise operations, norms, softmax and lookups.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftkit.costs.calling import differentiate

# Products that torch's counter has no formula for, and there is none here either.
_OPAQUE = (
    "_cudnn_rnn",
    "_cudnn_rnn_backward",
    "_grouped_mm",
    "_int_mm",
    "_native_multi_head_attention",
    "_scaled_grouped_mm",
    "_transformer_encoder_layer_fwd",
    "_trilinear",
    "_weight_int4pack_mm",
    "_weight_int4pack_mm_for_cpu",
    "_weight_int8pack_mm",
    "miopen_rnn",
    "mkldnn_rnn_layer",
    "mkldnn_rnn_layer_backward",
)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations; `unknown` names operators that were called and could not be counted."""

    forward: int
    backward: int
    unknown: tuple[str, ...]


def count_flops(run: Callable[[], Any], loss: Callable[[Any], Tensor], of: Sequence[Tensor]) -> Flops:
    """Of `run()` and of the gradients of its loss for the tensors `of`; what checkpoints compute again is backward's.

    Compiled code is run eagerly, since no counter sees into it. A gradient is dropped as soon as it is there. Norms of
    DoRA are computed, as in every step of training: under a mode such as this one it keeps none.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for tensor in of:
            stack.callback(tensor.register_hook(_drop).remove)
        counter = stack.enter_context(_Counter())
        result = loss(run())
        forward = counter.total
        differentiate(result, of)
        return Flops(forward, counter.total - forward, tuple(sorted(counter.unknown)))


def _drop(gradient: Tensor) -> Tensor:
    return gradient.new_zeros(()).expand_as(gradient)


class _Counter(TorchDispatchMode):
    """Adds up what torch's formulas say of every operator.

    torch's own counter also tracks modules, for which it hooks into backward in a way that `torch.autograd.grad` refuses.

    Attributes:
        total: operations so far.
        unknown: operators that compute products which nobody counts: other libraries' own, and a few of torch's.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.formulas, self.total = _formulas(), 0
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self.formulas.get(getattr(func, "_overloadpacket", func))
        if formula is None and isinstance(func, torch._ops.OpOverload):
            with self:  # in inference mode, operators come here that are made of others
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            space, _, name = func._schema.name.partition("::")
            if name in _OPAQUE or space not in ("aten", "peftkit", "prim", "prims", "profiler"):
                self.unknown.add(f"{space}::{name}")
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def _formulas() -> dict[Any, Callable[..., int]]:
    """torch's, and those of what it passes over: products in place, products with vectors, attention on a CPU."""
    from torch.utils import flop_counter  # slow to import, and with it Triton

    import peftkit.kernels.lora_op  # noqa: F401 - registers the formulas of our operators

    aten, shaped = torch.ops.aten, flop_counter.shape_wrapper

    def matrix_vector(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * prod(next(s for s in shapes if len(s) == 2))

    def dot(a: Any, b: Any, out_shape: Any = None) -> int:
        return 2 * prod(a)

    def attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return flop_counter.sdpa_flop_count(query, key, value)

    def attention_back(
        grad: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **kwargs: Any
    ) -> int:
        return flop_counter.sdpa_backward_flop_count(grad, query, key, value)

    return {
        **flop_counter.flop_registry,
        aten.addmm_: flop_counter.addmm_flop,
        aten._addmm_activation: flop_counter.addmm_flop,
        aten.baddbmm_: flop_counter.baddbmm_flop,
        aten.mv: shaped(matrix_vector),
        aten.addmv: shaped(matrix_vector),
        aten.addmv_: shaped(matrix_vector),
        aten.dot: shaped(dot),
        aten._scaled_dot_product_flash_attention_for_cpu: shaped(attention),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: shaped(attention_back),
    }
