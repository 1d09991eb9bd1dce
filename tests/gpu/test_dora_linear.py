"""`dora_linear` on every way, and the norm as an operator."""

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
from test_ways import TRITON, WAYS, changed

from peftkit.kernels import dora_norm_op
from peftkit.kernels.dora_linear import dora_linear, reference
from peftkit.kernels.lora_linear import lora_linear

SCALE = 1.7


def operands(t=24, k=40, n=32, r=4, dtype=torch.float32, pair=None, layout="plain", bias=True):
    """x, weight, bias, gain, a, b; x, gain, a and b need gradients."""
    return (
        draw(t, k, dtype=dtype, layout=layout).requires_grad_(),
        draw(n, k, dtype=dtype),
        draw(n, dtype=dtype) if bias else None,
        (1 + 0.1 * draw(n)).to(dtype).float().requires_grad_(),
        draw(r, k, dtype=pair or dtype).requires_grad_(),
        draw(n, r, dtype=pair or dtype).requires_grad_(),
    )


def results(function, given, dy, *rest, **more):
    x, _, _, gain, a, b = given
    y = function(*given, SCALE, *rest, **more)
    return y.detach(), *torch.autograd.grad(y, (x, gain, a, b), dy)


@pytest.mark.parametrize("way", WAYS)
@quick
@given(
    t=tokens, k=sizes, n=sizes, r=ranks, dtype=dtypes, pair=pairs, p=dropouts, layout=layouts, bias=st.booleans()
)  # fmt: skip
def test_is_the_reference(way, t, k, n, r, dtype, pair, p, layout, bias):
    given = operands(t, k, n, r, dtype, pair, layout, bias)
    dy = draw(t, n, dtype=dtype, layout=layout)
    found = results(dora_linear, given, dy, p, seed=a_seed(), way=way)
    rounded = changed(given, lambda x: x.to(dtype))
    plain = results(reference, rounded, dy, p, a_seed())
    exact = results(reference, changed(rounded, lambda x: x.double()), dy.double(), p, a_seed())
    size = results(reference, changed(rounded, lambda x: x.double().abs()), dy.double().abs(), p, a_seed())
    for group in zip(found, plain, exact, size, strict=True):
        assert_close(*group, dtype)
    assert found[2].dtype is torch.float32 and found[3].dtype is found[4].dtype is (pair or dtype)


@pytest.mark.parametrize("way", TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gain_of_one_changes_no_bit(way, dtype):
    x, weight, bias, gain, a, b = operands(dtype=dtype, pair=torch.float32)
    ones = torch.ones_like(gain).requires_grad_()
    found = dora_linear(x, weight, bias, ones, a, b, SCALE, way=way)
    assert torch.equal(found, lora_linear(x, weight, bias, a, b, SCALE, way=way))


@pytest.mark.parametrize("frozen", ["x", "gain", "a b", "x a b", "x gain", "gain a b"])
@pytest.mark.parametrize("way", TRITON)
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(way, frozen):
    names = "x", "w", "bias", "gain", "a", "b"
    given = dict(zip(names, operands(), strict=True))
    dy = draw(24, 32)
    true = dict(zip(("y", "x", "gain", "a", "b"), results(reference, given.values(), dy, 0.3, a_seed()), strict=True))
    given |= {name: given[name].detach() for name in frozen.split()}
    y = dora_linear(*given.values(), SCALE, 0.3, seed=a_seed(), way=way)
    left = [name for name in ("x", "gain", "a", "b") if given[name].requires_grad]
    for name, gradient in zip(left, torch.autograd.grad(y, [given[n] for n in left], dy), strict=True):
        torch.testing.assert_close(gradient, true[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", TRITON)
@pytest.mark.parametrize("trained", [True, False])
def test_saved_are_x_and_s_and_z_where_the_gain_is_trained(way, trained):
    x, weight, bias, gain, a, b = operands(64, 96, 48, 8)
    gain = gain.detach().requires_grad_(trained)
    held = {t.data_ptr() for t in (weight, bias, gain, a, b)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dora_linear(x, weight, bias, gain, a, b, SCALE, 0.3, seed=a_seed(), way=way)
    more = sum(t.nbytes for t in saved if t.data_ptr() not in held)
    assert more == x.nbytes + 64 * 8 * 4 + trained * 64 * 48 * 4 + a_seed().nbytes


@pytest.mark.parametrize("way", TRITON)
def test_the_same_bits_twice(way):
    given, dy = operands(70, 64, 48, 17), draw(70, 48)
    one, other = (results(dora_linear, given, dy, 0.3, seed=a_seed(), way=way) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("way", TRITON)
def test_second_derivatives(way):
    x, weight, bias, gain, a, b = operands(6, 8, 8, 2)
    given = x, gain, a, b

    def second(function, **more):
        y = function(x, weight, bias, gain, a, b, SCALE, 0.3, **more)
        first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    for one, other in zip(second(dora_linear, seed=a_seed(), way=way), second(reference, seed=a_seed()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("way", TRITON)
def test_opcheck(way):
    x, weight, bias, gain, a, b = operands(8, 16, 24, 4)
    dora_linear(x, weight, bias, gain, a, b, SCALE, way=way)  # registers the operators
    arguments = x, None, weight, bias, gain, a, b, SCALE, 0.0, None, way
    torch.library.opcheck(torch.ops.peftkit.lora_linear.default, arguments)
    _, s, z = torch.ops.peftkit.lora_linear(*arguments)
    saved = x.detach(), z, weight, bias, gain.detach(), a.detach(), b.detach(), s
    torch.library.opcheck(
        torch.ops.peftkit.lora_linear_backward.default, (draw(8, 24), *saved, SCALE, 0.0, None, way, [True] * 4)
    )


def test_opcheck_of_the_norm():
    torch.library.opcheck(dora_norm_op.OPERATOR, (draw(40, 50), draw(3, 50), draw(40, 3), 1.5))


@pytest.mark.gpu
def test_it_compiles_in_one_graph():
    given, dy = operands(256, 256, 256, 16, torch.bfloat16, torch.float32), draw(256, 256, dtype=torch.bfloat16)
    x, weight, bias, m, a, b = given

    def run(x, m, a, b):
        gain = m / dora_norm_op.OPERATOR(weight, a.detach(), b.detach(), SCALE)
        return dora_linear(x, weight, bias, gain, a, b, SCALE)

    leaves = x, m, a, b
    found, plain = (torch.autograd.grad(f(*leaves), leaves, dy) for f in (torch.compile(run, fullgraph=True), run))
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_starts_at_the_base_to_the_bit(dtype):
    import peftkit

    model = torch.nn.Sequential(torch.nn.Linear(700, 300), torch.nn.Linear(300, 200)).to(DEVICE, dtype)
    x = draw(64, 700, dtype=dtype)
    before = model(x)
    for pair in (None, torch.bfloat16):
        peftkit.inject(model, peftkit.DoRAConfig(r=8, targets="all-linear", dtype=pair))
        assert torch.equal(model(x), before)
        with torch.no_grad():
            assert torch.equal(model(x), before)
        peftkit.eject(model)


@pytest.mark.gpu
def test_what_follows_may_write_over_the_output():
    import peftkit

    for options in ({}, {"magnitude_only": "**"}):
        model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(inplace=True)).to(DEVICE, torch.bfloat16)
        peftkit.inject(model, peftkit.DoRAConfig(r=4, targets="0", **options))
        model(draw(7, 64, dtype=torch.bfloat16)[None]).sum().backward()
        assert all(p.grad is not None for p in peftkit.parameters(model))
