"""Law 11: every kernel is its reference in fp64, for any shape, dtype, layout and rank; and gives the same bits twice."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import (
    DEVICE,
    a_seed,
    assert_close,
    draw,
    dropouts,
    dtypes,
    layouts,
    pairs,
    quick,
    ranks,
    sizes,
    tokens,
)
from hypothesis import given
from hypothesis import strategies as st

from peftkit.kernels import dora_norm, dora_norm_tiles, dys_dyb, expand, rescale, rescale_rows, shrink
from peftkit.kernels.philox import keep_mask, threshold


def against(kernel, reference, operands, dtype, *rest):
    """`kernel(*operands, *rest)` beside its reference on the same numbers; a tensor or None each."""
    found = kernel(*operands, *rest)
    rounded = [t if t is None else t.to(dtype) for t in operands]  # as the kernel rounds a wider pair
    plain, exact, size = (
        reference(*[t if t is None else change(t) for t in rounded], *rest)
        for change in (lambda t: t, lambda t: t.double(), lambda t: t.double().abs())
    )
    many = isinstance(found, tuple)
    for group in zip(*((r if many else (r,)) for r in (found, plain, exact, size)), strict=True):
        assert_close(*group, dtype)
    again = kernel(*operands, *rest)
    for one, other in zip(found if many else (found,), again if many else (again,), strict=True):
        assert torch.equal(one, other), "the same input gave other bits"


@quick
@given(t=tokens, k=sizes, r=ranks, dtype=dtypes, pair=pairs, p=dropouts, layout=layouts)
def test_shrink(t, k, r, dtype, pair, p, layout):
    operands = draw(t, k, dtype=dtype, layout=layout), draw(r, k, dtype=pair or dtype)
    against(shrink.shrink, shrink.reference, operands, dtype, p, a_seed())


@quick
@given(t=tokens, k=sizes, r=ranks, dtype=dtypes, p=dropouts, layout=layouts)
def test_gradient_of_a(t, k, r, dtype, p, layout):
    operands = draw(t, r, dtype=dtype), draw(t, k, dtype=dtype, layout=layout)
    against(shrink.shrink_da, shrink.reference_da, operands, dtype, p, a_seed())
    assert shrink.shrink_da(*operands, p, a_seed()).dtype is torch.float32


@quick
@given(t=tokens, k=sizes, r=ranks, dtype=dtypes, pair=pairs, p=dropouts)
def test_gradient_of_x_is_added(t, k, r, dtype, pair, p):
    operands = draw(t, k, dtype=dtype), draw(t, r, dtype=dtype), draw(r, k, dtype=pair or dtype)

    def out_of_place(dx, *rest):
        return shrink.add_shrink_dx(dx.clone(), *rest)

    against(out_of_place, shrink.reference_dx, operands, dtype, p, a_seed())


@quick
@given(t=tokens, n=sizes, r=ranks, dtype=dtypes, pair=pairs, layout=layouts)
def test_dys_dyb(t, n, r, dtype, pair, layout):
    operands = draw(t, n, dtype=dtype, layout=layout), draw(n, r, dtype=pair or dtype), draw(t, r, dtype=dtype)
    against(dys_dyb.dys_dyb, dys_dyb.reference, operands, dtype, 0.75)
    assert dys_dyb.dys_dyb(*operands, 0.75)[1].dtype is torch.float32


@quick
@given(t=tokens, k=sizes, n=sizes, r=ranks, dtype=dtypes, pair=pairs, p=dropouts, x=layouts, w=layouts)
def test_expand(t, k, n, r, dtype, pair, p, x, w):
    operands = (
        draw(t, k, dtype=dtype, layout=x),
        draw(k, n, dtype=dtype, layout=w),
        draw(n, dtype=dtype) if r % 2 else None,
        draw(t, r, dtype=dtype),
        draw(n, r, dtype=pair or dtype).t() if k % 2 else draw(r, n, dtype=pair or dtype),
    )
    against(expand.expand, expand.reference, operands, dtype, 0.75, p, a_seed())


def gains(n, dtype):
    """Gains near 1 that the dtype can hold."""
    return (1 + 0.1 * draw(n)).to(dtype).float()


@quick
@given(t=tokens, n=sizes, dtype=dtypes, bias=st.booleans())
def test_rescale_rows(t, n, dtype, bias):
    z, c = draw(t, n, dtype=dtype), draw(n, dtype=dtype) if bias else None
    against(rescale_rows.rescale_rows, rescale.reference, (z, gains(n, dtype), c), dtype)
    ones = torch.ones(n, device=DEVICE)
    assert torch.equal(rescale_rows.rescale_rows(z, ones, c), z), "a gain of 1 changes no bit"
    g = gains(n, dtype)
    apart = rescale_rows.rescale_rows(z, g, c)
    assert torch.equal(rescale_rows.rescale_rows(z, g, c, z), apart) and torch.equal(z, apart)


@quick
@given(t=tokens, n=sizes, r=ranks, dtype=dtypes, pair=pairs, layout=layouts, bias=st.booleans())
def test_dys_dyb_with_gains(t, n, r, dtype, pair, layout, bias):
    dy, b, s = (
        draw(t, n, dtype=dtype, layout=layout), draw(n, r, dtype=pair or dtype), draw(t, r, dtype=dtype),
    )  # fmt: skip
    operands = draw(t, n, dtype=dtype), gains(n, dtype), draw(n, dtype=dtype) if bias else None

    def run(function):
        return lambda dy, b, s, z, gain, bias: function(dy, b, s, 0.75, z, gain, bias)

    against(run(dys_dyb.dys_dyb_gained), run(dys_dyb.reference_gained), (dy, b, s, *operands), dtype)


@quick
@given(t=tokens, k=sizes, n=sizes, r=ranks, dtype=dtypes, pair=pairs, x=layouts, w=layouts)
def test_expand_with_gains(t, k, n, r, dtype, pair, x, w):
    operands = (
        draw(t, k, dtype=dtype, layout=x),
        draw(k, n, dtype=dtype, layout=w),
        draw(n, dtype=dtype) if r % 2 else None,
        gains(n, dtype),
        draw(t, r, dtype=dtype),
        draw(n, r, dtype=pair or dtype).t() if k % 2 else draw(r, n, dtype=pair or dtype),
    )
    against(expand.expand_gained, expand.reference_gained, operands, dtype, 0.75)
    x, w, bias, gain, s, b = operands
    y, z = expand.expand_gained(x, w, bias, torch.ones_like(gain), s, b, 0.75)
    assert torch.equal(y, z) and torch.equal(y, expand.expand(x, w, bias, s, b, 0.75))


@quick
@given(n=sizes, k=sizes, r=ranks, dtype=dtypes, pair=pairs, layout=layouts, opposite=st.booleans())
def test_dora_norm(n, k, r, dtype, pair, layout, opposite):
    """Near the true norm even where s·BA is nearly −W."""
    a, b = draw(r, k, dtype=pair or dtype), draw(n, r, dtype=pair or dtype)
    w = draw(n, k, dtype=dtype, layout=layout)
    if opposite:
        w = (-1.5 * (b.double() @ a.double()) + 0.01 * w.double()).to(dtype)
    found = dora_norm_tiles.dora_norm(w, a, b, 1.5)
    true = dora_norm.reference(w.double(), a.double(), b.double(), 1.5)
    size = (w.double().abs() + 1.5 * b.double().abs() @ a.double().abs()).norm(dim=1)
    assert found.dtype is torch.float32
    assert ((found - true).abs() <= 8 * torch.finfo(torch.float32).eps * size).all()
    assert torch.equal(found, dora_norm_tiles.dora_norm(w, a, b, 1.5))


def test_the_norm_of_a_row_of_zeros_divides():
    w, a, b = draw(5, 40), draw(3, 40), draw(5, 3)
    w[2] = b[2] = 0
    n = dora_norm_tiles.dora_norm(w, a, b, 2.0)
    assert n[2] > 0 and torch.isfinite(1 / n).all()
    torch.testing.assert_close(dora_norm_tiles.dora_norm(w, a[:0], b[:, :0], 2.0), w.norm(dim=1).clamp_min(n[2]))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mask_depends_on_the_position_alone(p):
    rows, cols, seed = 37, 100, a_seed(2**62 + 12345)
    ones, identity = torch.ones(rows, cols, device=DEVICE), torch.eye(cols, device=DEVICE)
    for m, k in ((16, 32), (32, 64), (64, 16)):
        drawn = shrink.shrink(ones, identity, p, seed, shrink.Tiles(m, k, 4, 1))
        assert torch.equal(drawn, keep_mask(seed, rows, cols, p).float())


def test_what_the_kernel_keeps_it_keeps_in_every_product():
    t, k, r, p, seed = 20, 48, 16, 0.4, a_seed()
    mask = keep_mask(seed, t, k, p).float()
    ds, a = torch.ones(t, r, device=DEVICE), torch.ones(r, k, device=DEVICE)
    zero = torch.zeros(t, k, device=DEVICE)
    assert torch.equal(shrink.add_shrink_dx(zero.clone(), ds, a, p, seed), r * mask)
    assert torch.equal(expand.expand(zero, torch.zeros(k, k, device=DEVICE), None, ds, a, 1.0, p, seed), r * mask)
    assert torch.equal(shrink.shrink_da(ds, torch.ones(t, k, device=DEVICE), p, seed), mask.sum(0).expand(r, k))


def test_a_threshold_leaves_something():
    assert threshold(0.0) == 0 and threshold(1 - 1e-9) == 2**16 - 1


@pytest.mark.parametrize("tile", [(16, 32, 4, 1), (64, 64, 4, 2)])
def test_sums_over_parts_do_not_depend_on_the_order_of_programs(tile):
    dy, b, s = draw(100, 130), draw(130, 5), draw(100, 5)
    exact = dys_dyb.reference(dy.double(), b.double(), s.double(), 0.5)
    for found, true in zip(dys_dyb.dys_dyb(dy, b, s, 0.5, dys_dyb.Tiles(*tile)), exact, strict=True):
        assert (found.double() - true).norm() <= 1e-6 * true.norm()


@pytest.mark.parametrize("p", [2**-16, 3e-5, 1 - 2**-16])
def test_the_ends_of_the_probabilities(p):
    """The bar is then 1, which Triton compiles as a constant, and the last."""
    ones, identity, seed = torch.ones(33, 40, device=DEVICE), torch.eye(40, device=DEVICE), a_seed()
    assert torch.equal(shrink.shrink(ones, identity, p, seed), keep_mask(seed, 33, 40, p).float())


def test_what_is_drawn_at_the_bar_is_kept():
    """Seed 0 draws 0xE8D5 first (Random123's known answer)."""
    one = torch.ones(1, 1, device=DEVICE)
    for above, kept in ((0, 1.0), (1, 0.0)):
        assert shrink.shrink(one, one, (0xE8D5 + above) / 2**16, a_seed(0)).item() == kept
