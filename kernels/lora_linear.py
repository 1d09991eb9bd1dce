"""A linear layer with a low-rank update, in one function.

    y  = x Wᵀ + bias + s · x̂ Aᵀ Bᵀ        x̂ = mask ∘ x / (1 − p)     LoRA, arXiv 2106.09685, equation 3

    S  = x̂ Aᵀ                             (tokens r), kept for backward
    dS = s · dY B
    dX = dY W + mask ∘ (dS A) / (1 − p)
    dA = dSᵀ x̂        dB = s · dYᵀ S

W and bias are frozen in the kernel, so there is no dW: what is left beside the base's two products are six
of width r, and memory traffic, which is what the ways of `choice` differ in. Saved for backward are x once, in its
own dtype, and S. A and B may be wider than x (fp32 masters over a bf16 base): they are rounded to the dtype of x
for the products, r · (in + out) numbers, and their gradients come back in their own.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from peftkit.kernels import choice
from peftkit.kernels.choice import INTERPRETED
from peftkit.kernels.lora_autograd import LoraLinear, rows
from peftkit.kernels.philox import keep_mask, kept

# Below this many numbers in x an autograd.Function written in Python costs more than it saves: measured on a
# CPU in fp32, at widths of 64 to 4096.
SMALL = 2**15

_PLAIN = (Tensor, Parameter)
_TRACED = (*_PLAIN, FakeTensor)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`lora_linear` in plain torch: what it is tested against, and what runs where the kernel cannot."""
    return reference_delta(x, F.linear(x, weight, bias), a, b, scale, dropout, seed)


def reference_delta(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """`lora_delta` in plain torch."""
    if dropout and seed is not None:
        x = x * keep_mask(seed, x.shape[:-1].numel(), x.shape[-1], dropout).view(x.shape)
        scale = scale / kept(dropout)
    elif dropout:
        x = F.dropout(x, dropout)
    # of x and a wider A the smaller one is cast: for a few tokens that is x
    dtype = a.dtype if a.dtype.itemsize > x.dtype.itemsize and x.numel() < a.numel() else x.dtype
    s, b = F.linear(x.to(dtype), a.to(dtype)), b.to(dtype)
    if torch.compiler.is_compiling():  # inductor fuses the products of a scaled sum, and forgets the scale
        return y + F.linear(s * scale, b).to(y.dtype)
    return torch.add(y, F.linear(s, b).to(y.dtype), alpha=scale)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    *,
    seed: Tensor | None = None,
    way: str | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ, in the dtype of x and weight.

    x: (... in), weight: (out in), in any memory layout, bias: (out) or None, a: (r in), b: (out r);
    dropout: the probability to apply now, so 0 when not training; seed: (1) in int64, on the device of x, that draws
    the mask, the same one on every way and device (`philox`); None draws from torch's own generator, alike with and
    without gradients; way: forces one of `choice.WAYS`.

    Where weight or bias is trained, under the transforms of torch.func, for a few rows, and on a CPU under autocast,
    torch.compile and torch.export, this runs `reference`. Second derivatives work, forward-mode ones only through
    `reference`.
    Raises a TypeError or ValueError that names the argument which does not fit, before anything is launched.
    """
    try:
        trains = torch.is_grad_enabled() and (
            x.requires_grad
            or a.requires_grad
            or b.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
        )
        # torch multiplies a tensor without memory with one that has some, and says nothing.
        is_meta = weight.is_meta or a.is_meta or b.is_meta
        composed = is_meta or torch.compiler.is_compiling() or maybe_current_level() is not None
        if not (dropout or trains or way or composed):
            y = F.linear(x, weight, bias)
            if bias is not None and bias.numel() != b.shape[0]:
                raise ValueError("bias")  # which F.linear would have broadcast
            if b.dtype is y.dtype and x.dim() == 2:
                return y.addmm_(F.linear(x, a), b.t(), alpha=scale)
            return _add_to_fresh(y, x, a, b, scale)
        check(x, weight, bias, a, b, dropout, None, seed)
        # asked even where nothing is trained now: a checkpoint runs both ways, and must draw the same mask
        base_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        if base_trains or must_compose(x, weight, way):
            return reference(x, weight, bias, a, b, scale, dropout, seed)
        return kernel(x, None, weight, bias, None, a, b, scale, dropout, seed, way)
    except Exception:
        check(x, weight, bias, a, b, dropout, None, seed)
        raise


def lora_delta(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    *,
    seed: Tensor | None = None,
    way: str | None = None,
) -> Tensor:
    """y + scale · (drop(x) Aᵀ) Bᵀ, for a base output y: (... out) that came about in another way.

    y is not changed. Otherwise as `lora_linear`.
    """
    check(x, None, None, a, b, dropout, y, seed)
    if x.dtype is not y.dtype or must_compose(x, y, way):
        return reference_delta(x, y, a, b, scale, dropout, seed)
    return kernel(x, y, None, None, None, a, b, scale, dropout, seed, way)


def kernel(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    way: str | None,
) -> Tensor:
    """The operator; on a CPU the function behind it."""
    if not x.is_cuda and not INTERPRETED and not torch._C._len_torch_dispatch_stack():
        if forced := way or os.environ.get(choice.VARIABLE):
            choice.checked(forced, x.device, x.dtype, a.shape[0])  # as the operator does itself
        return LoraLinear.apply(x, y, weight, bias, gain, a, b, scale, dropout, seed)  # type: ignore[return-value]
    from peftkit.kernels import lora_op  # registers the operators, which takes too long for an import of peftkit

    if dropout and seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
    return lora_op.FORWARD(x, y, weight, bias, gain, a, b, scale, dropout, seed, way or "")[0]


def _add_to_fresh(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Adds the update to y, which nothing else has seen, in y's dtype."""
    a, b = a.to(y.dtype), b.to(y.dtype)
    y.view(-1, y.shape[-1]).addmm_(F.linear(rows(x), a), b.t(), alpha=scale)
    return y


def must_compose(x: Tensor, base: Tensor, way: str | None) -> bool:
    """Whether plain operators are needed, or cheaper.

    It does not ask for gradients: a checkpoint runs without them first, and must then draw the same mask.
    """
    traced = x.is_cuda or INTERPRETED  # the operator can be traced, faked and cast
    known = _TRACED if traced else _PLAIN
    return (
        x.is_meta
        or maybe_current_level() is not None
        or (x.numel() < SMALL and way is None)
        or type(x) not in known
        or type(base) not in known
        or (not traced and (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)))
    )


def check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    dropout: float,
    y: Tensor | None,
    seed: Tensor | None,
) -> None:
    """Raises what `lora_linear` documents. Inference calls it only when a product has failed."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), found {dropout}")
    device = x.device if isinstance(x, Tensor) else None
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("a", a), ("b", b), ("y", y)):
        if tensor is None and name in ("weight", "bias", "y"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, found {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating dtype, found {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected it on {device}, where x is, found {tensor.device}")

    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected (... in) with at least one feature, found {tuple(x.shape)}")
    _check_shape("a", a, ("r", x.shape[-1]))
    if weight is None:
        _check_shape("b", b, ("out", a.shape[0]))
    else:
        _check_shape("weight", weight, ("out", x.shape[-1]))
        _check_shape("b", b, (weight.shape[0], a.shape[0]))
        if weight.dtype is not x.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            raise TypeError(f"weight: expected {x.dtype}, the dtype of x, found {weight.dtype}")
    if bias is not None:
        _check_shape("bias", bias, (b.shape[0],))
    if seed is not None and (seed.dtype is not torch.int64 or seed.shape != (1,) or seed.device != device):
        raise ValueError(
            f"seed: expected (1) in int64 on {device}, found {tuple(seed.shape)} in {seed.dtype}, {seed.device}"
        )
    if y is not None and (y.shape[-1:] != b.shape[:1] or y.shape[:-1] != x.shape[:-1]):
        raise ValueError(f"y: expected {(*x.shape[:-1], b.shape[0])} for the x and b given, found {tuple(y.shape)}")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    found = tensor.shape
    fits = len(found) == len(expected) and all(
        isinstance(size, str) or size == found[axis] for axis, size in enumerate(expected)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name}: expected ({wanted}) for the other arguments given, found {tuple(found)}")
