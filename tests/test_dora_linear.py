"""`dora_linear` is its reference, whatever path is taken on a CPU; and what it saves, draws and refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora_linear import floats, laid_out, layouts, wide
from torch.utils.checkpoint import checkpoint

from peftkit.kernels import lora_linear as lora
from peftkit.kernels.dora_linear import dora_linear, reference
from peftkit.kernels.lora_linear import lora_linear

SCALE = 1.7


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(lora, "SMALL", 0)


def inputs(lead=(40,), k=48, n=24, r=4, dtype=torch.float32, master=None, bias=True, seed=0):
    """x, weight, bias, gain, a, b; x, gain, a and b need gradients."""
    torch.manual_seed(seed)
    master = master or dtype
    gain = 1 + 0.2 * torch.randn(n, dtype=torch.promote_types(dtype, torch.float32))
    return (
        torch.randn(*lead, k, dtype=dtype, requires_grad=True),
        torch.randn(n, k, dtype=dtype) / k**0.5,
        torch.randn(n, dtype=dtype) if bias else None,
        gain.requires_grad_(),
        (torch.randn(r, k, dtype=master) / k**0.5).requires_grad_(),
        torch.randn(n, r, dtype=master, requires_grad=True),
    )


def results(function, given, dy, *rest):
    x, _, _, gain, a, b = given
    y = function(*given, SCALE, *rest)
    return y, *torch.autograd.grad(y, (x, gain, a, b), dy, retain_graph=True)


def roundings(given, dy):
    sizes = [t if t is None else t.detach().abs().requires_grad_(t.requires_grad) for t in wide(given)]
    return [3 * torch.finfo(dy.dtype).eps * t.norm().item() for t in results(reference, sizes, dy.double().abs())]


@pytest.mark.parametrize("small", [0, 2**62], ids=["kernel", "composed"])
@settings(max_examples=50, deadline=None)
@given(
    lead=st.lists(st.integers(0, 5), max_size=3), k=st.integers(1, 40), n=st.integers(1, 40), r=st.integers(1, 9),
    dtypes=floats, bias=st.booleans(), x_layout=layouts, dy_layout=layouts, transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_is_the_reference(small, lead, k, n, r, dtypes, bias, x_layout, dy_layout, transposed, seed):
    x, weight, *rest = inputs(tuple(lead), k, n, r, *dtypes, bias, seed)
    x = laid_out(x.detach(), x_layout).requires_grad_()
    given = (x, weight.t().contiguous().t() if transposed else weight, *rest)
    dy = laid_out(torch.randn(*lead, n, dtype=dtypes[0]), dy_layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "SMALL", small)
        found = results(dora_linear, given, dy)
        with torch.no_grad():
            inferred = dora_linear(*given, SCALE)
    plain = results(reference, given, dy)
    truth = results(reference, wide(given), dy.double())
    names, room = ("y", "dx", "dgain", "da", "db"), roundings(given, dy)
    for name, ours, theirs, true, more in zip(names, found, plain, truth, room, strict=True):
        assert ours.shape == true.shape and torch.isfinite(ours).all(), name
        assert (ours.double() - true).norm() <= 2 * (theirs.double() - true).norm() + more, name
    assert (inferred.double() - truth[0]).norm() <= 2 * (plain[0].double() - truth[0]).norm() + room[0]
    assert [t.dtype for t in found] == [dtypes[0], dtypes[0], given[3].dtype, dtypes[1], dtypes[1]]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_is_as_exact_as_the_reference(kernel, dtypes):
    given = inputs((300,), 257, 129, 8, *dtypes)
    dy = torch.randn(300, 129, dtype=dtypes[0])
    found, plain = results(dora_linear, given, dy), results(reference, given, dy)
    truth = results(reference, wide(given), dy.double())
    for ours, theirs, true in zip(found, plain, truth, strict=True):
        assert (ours.double() - true).norm() <= 2 * (theirs.double() - true).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_gain_of_one_changes_no_bit(kernel, dtype, bias):
    x, weight, c, gain, a, b = inputs(dtype=dtype, bias=bias)
    for trains in (True, False):
        ones = torch.ones_like(gain).requires_grad_(trains)
        with torch.set_grad_enabled(trains):
            found = dora_linear(x, weight, c, ones, a, b, SCALE)
            assert torch.equal(found, lora_linear(x, weight, c, a, b, SCALE))
        zero = torch.zeros_like(b)
        assert torch.equal(dora_linear(x, weight, c, ones, a, zero, SCALE), F.linear(x, weight, c))


@pytest.mark.parametrize("trained", ["x", "gain", "a", "b", "x gain", "a b", "gain b"])
def test_only_what_is_needed(kernel, trained):
    given, dy = inputs(), torch.randn(40, 24)
    names = "x", "weight", "bias", "gain", "a", "b"

    def gradients(wanted):
        leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in zip(names, given, strict=True)}
        torch.manual_seed(3)
        dora_linear(*leaves.values(), SCALE, 0.4).backward(dy)
        return {n: leaves[n].grad for n in ("x", "gain", "a", "b")}

    everything, found = gradients(("x", "gain", "a", "b")), gradients(trained.split())
    for name, gradient in found.items():
        assert (gradient is not None) == (name in trained.split())
        if gradient is not None:
            torch.testing.assert_close(gradient, everything[name])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("trained", [True, False])
def test_saved_bytes(kernel, dtypes, dropout, trained):
    """x and S, a byte a number of x with dropout, z where the gain is trained, and nothing else of such a size."""
    tokens, k, n, r = 256, 512, 64, 4
    x, weight, bias, gain, a, b = inputs((2, tokens // 2), k, n, r, *dtypes)
    gain = gain.detach().requires_grad_(trained)
    held = {t.untyped_storage().data_ptr() for t in (weight, bias, gain, a, b)}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in held:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = dora_linear(x, weight, bias, gain, a, b, SCALE, dropout)
    assert y.requires_grad
    size = dtypes[0].itemsize
    assert sum(saved.values()) == tokens * (k + r + trained * n) * size + bool(dropout) * tokens * k


def test_what_follows_may_write_over_the_output(kernel):
    given, dy = inputs(), torch.randn(40, 24)
    plain = results(lambda *t: F.relu(dora_linear(*t)), given, dy)
    over = results(lambda *t: F.relu(dora_linear(*t), inplace=True), given, dy)
    assert all(torch.equal(a, b) for a, b in zip(plain, over, strict=True))


def test_a_gain_of_zero_still_learns(kernel):
    x, weight, bias, gain, a, b = inputs()
    with torch.no_grad():
        gain[3] = 0
    dy = torch.randn(40, 24)
    found = torch.autograd.grad(dora_linear(x, weight, bias, gain, a, b, SCALE), gain, dy)[0]
    true = torch.autograd.grad(reference(x, weight, bias, gain, a, b, SCALE), gain, dy)[0]
    assert abs(float(true[3])) > 0.1
    torch.testing.assert_close(found, true)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_second_derivatives(kernel, dropout):
    given = wide(inputs((3,), 5, 4, 2))
    leaves = (given[0], *given[3:])

    def probed(*leaves):
        torch.manual_seed(1)
        return dora_linear(leaves[0], *given[1:3], *leaves[1:], SCALE, dropout)

    assert torch.autograd.gradcheck(probed, leaves)
    assert torch.autograd.gradgradcheck(probed, leaves)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_second_derivatives_with_a_frozen(kernel, dropout):
    x, weight, bias, gain, a, b = wide(inputs((3,), 5, 4, 2))

    def probed(gain, b):
        torch.manual_seed(1)
        return dora_linear(x.detach(), weight, bias, gain, a.detach(), b, SCALE, dropout)

    assert torch.autograd.gradgradcheck(probed, (gain, b))


def test_a_second_derivative_by_an_x_that_is_not_saved_is_refused(kernel):
    x, weight, bias, gain, a, b = inputs()
    y = dora_linear(x, weight, bias, gain, a.detach(), b, SCALE)
    for leaves in ((x, gain), (x, b)):
        with pytest.raises(RuntimeError, match="`a` frozen"):
            torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", ["bias", "gain", "expanded"])
def test_vectors_of_any_stride(kernel, dtype, spread):
    given, dy = list(inputs(dtype=dtype)), torch.randn(40, 24).to(dtype)
    if spread == "bias":
        given[2] = torch.randn(24, 3, dtype=dtype)[:, 0]
    elif spread == "gain":
        given[3] = torch.rand(24, 3, dtype=given[3].dtype)[:, 0].requires_grad_()
    else:
        given[3] = given[3].detach()[:1].expand(24).requires_grad_()
    found, plain = results(dora_linear, given, dy), results(reference, given, dy)
    for name, ours, theirs in zip(("y", "dx", "dgain", "da", "db"), found, plain, strict=True):
        assert (ours - theirs).norm() <= 8 * torch.finfo(dtype).eps * theirs.norm(), name


def test_an_infinite_bias_stays_what_it_is(kernel):
    """That of a class which is masked out."""
    x, weight, bias, gain, a, b = inputs()
    bias[3] = float("-inf")
    for g in (torch.ones_like(gain), gain.detach()):
        y = dora_linear(x, weight, bias, g.requires_grad_(), a, b, SCALE)
        assert bool((y[:, 3] == float("-inf")).all()) and bool(torch.isfinite(y[:, :3]).all())
        with torch.no_grad():
            assert torch.equal(dora_linear(x, weight, bias, g, a, b, SCALE), y)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_draws_the_same_mask(kernel, reentrant):
    x, *given = inputs()
    leaves, runs = (x, *given[2:]), []

    def run(x):
        return dora_linear(x, *given, SCALE, 0.5)

    for forward in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        torch.manual_seed(9)
        for leaf in leaves:
            leaf.grad = None
        forward(x).square().sum().backward()  # a reentrant checkpoint knows no other
        runs.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("base", ["weight", "bias"])
def test_a_trained_base_gets_its_gradient(kernel, base):
    given = dict(zip(("x", "weight", "bias", "gain", "a", "b"), inputs(), strict=True))
    given[base].requires_grad_()
    found, true = (
        torch.autograd.grad(f(*given.values(), SCALE).sin().sum(), given[base]) for f in (dora_linear, reference)
    )
    torch.testing.assert_close(found, true)


def test_a_gain_that_does_not_fit_is_refused():
    x, weight, bias, gain, a, b = inputs()
    with pytest.raises(ValueError, match=r"gain: expected \(24,\)"):
        dora_linear(x, weight, bias, gain[:5], a, b, SCALE)
    with pytest.raises(ValueError, match="weight"):
        dora_linear(x, weight[:, :5], bias, gain, a, b, SCALE)
