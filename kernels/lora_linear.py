"""A linear layer with a low-rank update, in one function.

    y  = x Wᵀ + bias + s · x̂ Aᵀ Bᵀ        x̂ = mask ∘ x / (1 − p)     LoRA, arXiv 2106.09685, equation 3

    S  = x̂ Aᵀ                             (tokens r), kept for backward
    dS = s · dY B
    dX = dY W + mask ∘ (dS A) / (1 − p)
    dA = dSᵀ x̂        dB = s · dYᵀ S

W and bias are frozen in the kernel, so there is no dW: what is left beside the base's two products are six
of width r, and memory traffic. The kernel avoids that: x is never copied or widened, both updates are added
into the base's result by the product that makes them, and 1/(1 − p) is folded into s.

A and B may be wider than x (fp32 masters over a bf16 base). They are cast down, r · (in + out) numbers, and
their gradients come back in their own dtype: summed over tokens in fp32 inside the product, which rounds its
result once to the dtype of x; with dropout on a CPU that holds for each piece, and pieces are summed in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.nn import Parameter

# Below this many numbers in x an autograd.Function written in Python costs more than it saves: measured on a
# CPU in fp32, at widths of 64 to 4096.
SMALL = 2**15

# With dropout a CPU works through x in pieces of this many numbers, so that masked copies stay in the cache.
PIECE = 2**18

_PLAIN = (Tensor, Parameter)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """`lora_linear` in plain torch: what it is tested against, and what runs where the kernel cannot."""
    return reference_delta(x, F.linear(x, weight, bias), a, b, scale, dropout)


def reference_delta(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """`lora_delta` in plain torch."""
    if dropout:
        x = F.dropout(x, dropout)
    s = F.linear(x, a.to(x.dtype))
    return torch.add(y, F.linear(s, b.to(x.dtype)), alpha=scale)


# The Triton kernels will stand here: shrink with dropout, the epilogue of the base product, and dS with dB in
# one read of dY.


class _LoraLinear(torch.autograd.Function):
    """Adds `scale · x̂ Aᵀ Bᵀ` to `F.linear(x, weight, bias)`, or to `y` where `weight` is None.

    Saves x as it is where A is trained, S: (tokens r) where B is, and with dropout a byte a number of x.
    """

    @staticmethod
    def forward(ctx, x, y, weight, bias, a, b, scale, dropout):
        _, _, _, _, a_trains, b_trains, _, _ = ctx.needs_input_grad
        s, keep, kept = _shrink(_rows(x), a.to(x.dtype), dropout)
        bt = b.to(x.dtype).t()
        ctx.shape, ctx.alpha = x.shape, scale / kept
        ctx.save_for_backward(x if a_trains else None, weight, a, b, s if b_trains else None, keep)
        if weight is None:
            return torch.addmm(_rows(y), s, bt, alpha=ctx.alpha).view(y.shape)
        out = F.linear(x, weight, bias)
        out.view(-1, out.shape[-1]).addmm_(s, bt, alpha=ctx.alpha)
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        run = _backward_again if torch.is_grad_enabled() else _backward
        if torch.is_autocast_enabled(grad.device.type):  # forward ran without it
            with torch.autocast(grad.device.type, enabled=False):
                return run(ctx, grad)
        return run(ctx, grad)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, a, b, s, keep = ctx.saved_tensors
    x_needs, y_needs, _, _, a_needs, b_needs, _, _ = ctx.needs_input_grad
    dy = _rows(grad)
    alpha = ctx.alpha
    dx = da = db = None
    if x_needs and weight is not None:
        dx = dy @ weight
    if x_needs or a_needs:
        ds = dy.new_empty(len(dy), len(a)).addmm_(dy, b.to(dy.dtype), beta=0, alpha=alpha)
        low = a.to(dy.dtype)
        if keep is not None:
            if x_needs and dx is None:
                dx = dy.new_zeros(keep.shape)
            da = _backward_through_mask(None if x is None else _rows(x), keep, ds, low, dx)
        else:
            if x_needs:
                dx = ds @ low if dx is None else dx.addmm_(ds, low)
            if x is not None:
                da = ds.t() @ _rows(x)
    if b_needs:
        # Sᵀ dY rather than dYᵀ S: a third faster, since the long side is read along its rows.
        db = s.new_empty(s.shape[1], dy.shape[1]).addmm_(s.t(), dy, beta=0, alpha=alpha).t()
    return (
        None if dx is None else dx.view(ctx.shape),
        grad if y_needs else None,
        None,
        None,
        None if da is None else da.to(a.dtype),
        None if db is None else db.to(b.dtype),
        None,
        None,
    )


def _backward_again(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """`_backward` out of place, for autograd to go through: what `create_graph=True` asks for."""
    x, weight, a, b, s, keep = ctx.saved_tensors
    x_needs, y_needs, _, _, a_needs, b_needs, _, _ = ctx.needs_input_grad
    if x is None and x_needs and b_needs:
        raise RuntimeError("lora_linear: with `a` frozen x is not saved, so only first derivatives; use `reference`")
    dy = _rows(grad)
    low = a.to(dy.dtype)
    mask = 1 if keep is None else keep
    if x is not None:
        x = _rows(x) * mask
        s = F.linear(x, low)
    ds = dy @ b.to(dy.dtype) * ctx.alpha
    dx = ds @ low * mask if weight is None else dy @ weight + ds @ low * mask
    return (
        dx.view(ctx.shape) if x_needs else None,
        grad if y_needs else None,
        None,
        None,
        (ds.t() @ x).to(a.dtype) if a_needs else None,
        (dy.t() @ s * ctx.alpha).to(b.dtype) if b_needs else None,
        None,
        None,
    )


def _shrink(x: Tensor, a: Tensor, dropout: float) -> tuple[Tensor, Tensor | None, float]:
    """(mask ∘ x) Aᵀ: (tokens r); the mask as bytes: (tokens in); the probability that a number is kept."""
    if not dropout:
        return F.linear(x, a), None, 1.0
    keep = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    if not x.is_cpu:
        return F.linear(x * keep.bernoulli_(1 - dropout), a), keep, 1 - dropout

    # Sixteen random bits for each number, four to a draw, cost a fraction of bernoulli_. The probability is
    # then a multiple of 2**-16, and the rescaling uses that very multiple, so the mean is exact.
    threshold = min(round(dropout * 2**16), 2**16 - 1)
    rows = _rows_per_piece(x)
    noise = torch.empty((rows * x.shape[1] + 3) // 4, dtype=torch.int64)
    masked = x.new_empty(rows, x.shape[1])
    s = x.new_empty(x.shape[0], a.shape[0])
    for x_piece, keep_piece, s_piece in zip(x.split(rows), keep.split(rows), s.split(rows), strict=True):
        drawn = noise.random_(-(2**63), None).view(torch.int16)[: x_piece.numel()].view(x_piece.shape)
        torch.ge(drawn, threshold - 2**15, out=keep_piece)
        torch.mm(masked[: len(x_piece)].copy_(keep_piece).mul_(x_piece), a.t(), out=s_piece)
    return s, keep, 1 - threshold / 2**16


def _backward_through_mask(x: Tensor | None, keep: Tensor, ds: Tensor, a: Tensor, dx: Tensor | None) -> Tensor | None:
    """Adds mask ∘ (dS A) to dx; returns dSᵀ (mask ∘ x) where x was saved, in fp32 or wider."""
    rows = _rows_per_piece(keep)
    mask = ds.new_empty(rows, keep.shape[1])
    scratch = torch.empty_like(mask)
    da = torch.zeros_like(a, dtype=torch.promote_types(a.dtype, torch.float32))
    for start in range(0, len(keep), rows):
        piece = slice(start, start + rows)
        ds_piece = ds[piece]
        mask_piece = mask[: len(ds_piece)].copy_(keep[piece])
        scratch_piece = scratch[: len(ds_piece)]
        if dx is not None:
            dx[piece].addcmul_(torch.mm(ds_piece, a, out=scratch_piece), mask_piece)
        if x is not None:
            da += ds_piece.t() @ torch.mul(x[piece], mask_piece, out=scratch_piece)
    return None if x is None else da


def _rows(x: Tensor) -> Tensor:
    """(... in) -> (tokens in), without a copy where the strides allow it."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _rows_per_piece(x: Tensor) -> int:
    return max(1, min(len(x), PIECE // x.shape[1])) if x.is_cpu else len(x)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ, in the dtype of x and weight.

    x: (... in), weight: (out in), in any memory layout, bias: (out) or None, a: (r in), b: (out r);
    dropout: the probability to apply now, so 0 when not training.

    Where weight or bias is trained, under autocast, torch.compile, torch.export and the transforms of
    torch.func, and for a few rows, this runs `reference`. The mask is drawn from torch's own generator, alike
    with and without gradients. Second derivatives work, forward-mode ones only through `reference`.
    Raises a TypeError or ValueError that names the argument which does not fit.
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
        if not (dropout or is_meta or trains) and maybe_current_level() is None:
            y = F.linear(x, weight, bias)
            if bias is not None and bias.numel() != b.shape[0]:
                raise ValueError("bias")  # which F.linear would have broadcast
            if b.dtype is y.dtype and x.dim() == 2:
                return y.addmm_(F.linear(x, a), b.t(), alpha=scale)
            return _add_to_fresh(y, x, a, b, scale)
        _check(x, weight, bias, a, b, dropout)
        # asked even where nothing is trained now: a checkpoint runs both ways, and must draw the same mask
        base_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        if base_trains or _must_compose(x, weight):
            return reference(x, weight, bias, a, b, scale, dropout)
        return _LoraLinear.apply(x, None, weight, bias, a, b, scale, dropout)
    except Exception:
        _check(x, weight, bias, a, b, dropout)
        raise


def lora_delta(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """y + scale · (drop(x) Aᵀ) Bᵀ, for a base output y: (... out) that came about in another way.

    y is not changed. Otherwise as `lora_linear`.
    """
    _check(x, None, None, a, b, dropout, y)
    if x.dtype is not y.dtype or _must_compose(x, y):
        return reference_delta(x, y, a, b, scale, dropout)
    return _LoraLinear.apply(x, y, None, None, a, b, scale, dropout)


def _add_to_fresh(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Adds the update to y, which nothing else has seen, in y's dtype."""
    a, b = a.to(y.dtype), b.to(y.dtype)
    y.view(-1, y.shape[-1]).addmm_(F.linear(_rows(x), a), b.t(), alpha=scale)
    return y


def _must_compose(x: Tensor, base: Tensor) -> bool:
    """Whether plain operators are needed, or cheaper.

    It does not ask for gradients: a checkpoint runs without them first, and must then draw the same mask.
    """
    return (
        x.numel() < SMALL
        or x.is_meta
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
        or maybe_current_level() is not None
        or type(x) not in _PLAIN
        or type(base) not in _PLAIN
    )


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    dropout: float,
    y: Tensor | None = None,
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
