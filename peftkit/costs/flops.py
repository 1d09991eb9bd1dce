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
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftkit.kept_norms import KeptNorms

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


def count_flops(run: Callable[[], Any], loss: Callable[[Any], Tensor], model: nn.Module, of: Sequence[Tensor]) -> Flops:
    """Of `run()` and of the gradients of its loss for the tensors `of`; what checkpoints compute again is backward's.

    Compiled code is run eagerly, since no counter sees into it. A gradient is dropped as soon as it is there.
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, and with it Triton

    import peftkit.kernels.lora_op  # noqa: F401 - the counter takes over formulas when it is made

    _forget_norms(model)
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for tensor in of:
            stack.callback(tensor.register_hook(_drop).remove)
        counter = FlopCounterMode(display=False, custom_mapping=_further())
        seen = stack.enter_context(_Unknown())
        stack.enter_context(counter)
        result = loss(run())
        forward = counter.get_total_flops()
        if result.requires_grad:
            torch.autograd.grad(result, of, allow_unused=True)
        return Flops(forward, counter.get_total_flops() - forward, tuple(sorted(seen.names)))


def _drop(gradient: Tensor) -> Tensor:
    return gradient.new_zeros(()).expand_as(gradient)


def _forget_norms(model: nn.Module) -> None:
    """A step of training changes A and B, so that their norms are computed in every one."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, KeptNorms):
                value.forget()


class _Unknown(TorchDispatchMode):
    """Notes operators that compute products which nobody counts: other libraries' own, and a few of torch's."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.HigherOrderOperator):
            return func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        if name in _OPAQUE or space not in ("aten", "peftkit", "prim", "prims", "profiler"):
            self.names.add(f"{space}::{name}")
        return func(*args, **(kwargs or {}))


def _further() -> dict[Any, Callable[..., int]]:
    """Formulas for what torch's counter passes over: products in place, products with vectors, attention on a CPU."""
    from torch.utils import flop_counter

    aten = torch.ops.aten

    def matrix_vector(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
        matrix = next(s for s in shapes if len(s) == 2)
        return 2 * prod(matrix)

    def dot(a: Any, b: Any, out_shape: Any = None) -> int:
        return 2 * prod(a)

    def attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return flop_counter.sdpa_flop_count(query, key, value)

    def attention_backward(
        grad: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape=None, **kwargs: Any
    ) -> int:
        return flop_counter.sdpa_backward_flop_count(grad, query, key, value)

    return {
        aten.addmm_: flop_counter.addmm_flop,
        aten._addmm_activation: flop_counter.addmm_flop,
        aten.baddbmm_: flop_counter.baddbmm_flop,
        aten.mv: matrix_vector,
        aten.addmv: matrix_vector,
        aten.addmv_: matrix_vector,
        aten.dot: dot,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
