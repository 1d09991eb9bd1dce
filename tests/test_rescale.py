"""`rescale`: a gain of 1 changes no bit, gradients are exact in every layout, and images stay as they lie in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.kernels import rescale as kernel
from peftkit.kernels.rescale import rescale

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40), width=st.integers(1, 40), dtype=DTYPES, bias=st.booleans(), axis=st.sampled_from([-1, -3]),
    turned=st.booleans(), dy_turned=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_rescaling_and_its_gradients(rows, width, dtype, bias, axis, turned, dy_turned, seed):
    torch.manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    z = torch.randn(rows, width).to(dtype) if axis == -1 else torch.randn(rows, width, 2, 3).to(dtype)
    z = z.transpose(0, 1).contiguous().transpose(0, 1) if turned else z
    g, c = torch.randn(width, dtype=wide), torch.randn(width).to(dtype) if bias else None
    z.requires_grad_(), g.requires_grad_()
    y = rescale(z, g, c, axis)
    dy = torch.randn(y.shape).to(dtype)
    dy = dy.transpose(0, 1).contiguous().transpose(0, 1) if dy_turned else dy
    found = torch.autograd.grad(y, (z, g), dy)
    with torch.no_grad():
        assert torch.equal(rescale(z.detach().clone(), g, c, axis, own=True), y)
        ones = torch.ones_like(g)
        assert torch.equal(rescale(z, ones, c, axis), z), "a gain of 1 changes no bit"
    z64, g64 = z.detach().double().requires_grad_(), g.detach().double().requires_grad_()
    true = kernel.reference(z64, g64, None if c is None else c.double(), axis)
    wanted = torch.autograd.grad(true, (z64, g64), dy.double())
    eps = torch.finfo(dtype).eps
    assert y.dtype is dtype and [t.dtype for t in found] == [dtype, wide]
    torch.testing.assert_close(y.double(), true, rtol=2 * eps, atol=16 * torch.finfo(wide).eps)
    least = torch.finfo(dtype).smallest_normal * eps  # between numbers too small to be normal
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=2 * eps, atol=least)
    size = (dy.double().abs().sum() + 1) * 10
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=0, atol=float(size * torch.finfo(wide).eps))


@pytest.mark.parametrize("shape", [(100_000, 3), (50, 3, 2000)])
def test_long_sums_keep_their_digits(shape):
    """Numbers of one sign added up one by one lose a digit or two in a hundred thousand."""
    torch.manual_seed(0)
    z, dy, g = torch.rand(shape), torch.rand(shape), torch.rand(3, requires_grad=True)
    axis = -1 if len(shape) == 2 else -2
    found = torch.autograd.grad(rescale(z, g, None, axis), g, dy)[0]
    true = (z.double() * dy.double()).sum([i for i in range(len(shape)) if i != len(shape) + axis])
    assert float(((found - true) / true).abs().max()) < 2e-6
    dz = torch.autograd.grad(rescale(z.requires_grad_(), g, None, axis), z, dy)[0]
    assert torch.equal(dz, dy * g.detach().view(-1, *(1,) * (-axis - 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_keep_their_layout(dtype):
    z = torch.randn(2, 8, 5, 6).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    y = rescale(z, torch.rand(8, requires_grad=True), torch.randn(8).to(dtype), -3)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(torch.randn(2, 8, 5, 6).to(dtype))
    assert z.grad.is_contiguous(memory_format=torch.channels_last)
