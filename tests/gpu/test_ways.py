"""The LoRA linear is the same function on every way: output, gradients, masks, memory, and what torch sees of it."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import (
    DEVICE,
    INTERPRETED,
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
from torch.utils.checkpoint import checkpoint

from peftkit.kernels import augmented, choice
from peftkit.kernels.gpu import dot_constants
from peftkit.kernels.lora_linear import lora_delta, lora_linear, reference, reference_delta

TRITON = [way for way in choice.WAYS if way != "torch"]
WAYS = choice.WAYS if INTERPRETED else TRITON  # on a GPU the torch way is for where Triton is not
SCALE = 1.7


def operands(t=24, k=40, n=32, r=4, dtype=torch.float32, pair=None, layout="plain"):
    """x, weight, bias, a, b; x, a and b need gradients."""
    return (
        draw(t, k, dtype=dtype, layout=layout).requires_grad_(),
        draw(n, k, dtype=dtype),
        draw(n, dtype=dtype),
        draw(r, k, dtype=pair or dtype).requires_grad_(),
        draw(n, r, dtype=pair or dtype).requires_grad_(),
    )


def results(function, given, dy, *rest, **more):
    x, _, _, a, b = given
    y = function(*given, SCALE, *rest, **more)
    return y.detach(), *torch.autograd.grad(y, (x, a, b), dy)


def changed(given, change):
    """Leaves of their own: changed, and gradients asked where they were."""
    return [t if t is None else change(t.detach()).requires_grad_(t.requires_grad) for t in given]


@pytest.mark.parametrize("way", WAYS)
@quick
@given(t=tokens, k=sizes, n=sizes, r=ranks, dtype=dtypes, pair=pairs, p=dropouts, layout=layouts)
def test_is_the_reference(way, t, k, n, r, dtype, pair, p, layout):
    given = operands(t, k, n, r, dtype, pair, layout)
    dy = draw(t, n, dtype=dtype, layout=layout)
    found = results(lora_linear, given, dy, p, seed=a_seed(), way=way)
    rounded = changed(given, lambda x: x.to(dtype))
    plain = results(reference, rounded, dy, p, a_seed())
    exact = results(reference, changed(rounded, lambda x: x.double()), dy.double(), p, a_seed())
    size = results(reference, changed(rounded, lambda x: x.double().abs()), dy.double().abs(), p, a_seed())
    for group in zip(found, plain, exact, size, strict=True):
        assert_close(*group, dtype)
    assert found[2].dtype is found[3].dtype is (pair or dtype)


@pytest.mark.parametrize("way", TRITON)
def test_gradients_of_a_wide_pair_are_not_rounded(way):
    given = operands(64, 64, 64, dtype=torch.bfloat16, pair=torch.float32)
    *_, da, db = results(lora_linear, given, draw(64, 64, dtype=torch.bfloat16), 0.1, seed=a_seed(), way=way)
    for gradient in (da, db):
        assert not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_delta_is_the_reference(way, p):
    x, _, _, a, b = operands()
    y, dy = draw(24, 32).requires_grad_(), draw(24, 32)
    found = lora_delta(x, y, a, b, SCALE, p, seed=a_seed(), way=way)
    true = reference_delta(x, y, a, b, SCALE, p, a_seed())
    pairs = zip(*((o, *torch.autograd.grad(o, (x, y, a, b), dy)) for o in (found, true)), strict=True)
    assert all((one - other).norm() <= 1e-6 * other.norm() for one, other in pairs)


@pytest.mark.parametrize("way", TRITON)
def test_the_same_bits_twice(way):
    given, dy = operands(70, 64, 48, 17), draw(70, 48)
    one, other = (results(lora_linear, given, dy, 0.3, seed=a_seed(), way=way) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("frozen", ["x", "a", "b", "x a", "x b", "a b"])
@pytest.mark.parametrize("way", TRITON)
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(way, frozen):
    given = dict(zip(("x", "w", "bias", "a", "b"), operands(), strict=True))
    dy = draw(24, 32)
    true = dict(zip("yxab", results(reference, given.values(), dy, 0.3, a_seed()), strict=True))
    given |= {name: given[name].detach() for name in frozen.split()}
    y = lora_linear(*given.values(), SCALE, 0.3, seed=a_seed(), way=way)
    left = [name for name in "xab" if given[name].requires_grad]
    for name, gradient in zip(left, torch.autograd.grad(y, [given[n] for n in left], dy), strict=True):
        torch.testing.assert_close(gradient, true[name])


@pytest.mark.parametrize("way", TRITON)
def test_saved_are_x_and_s(way):
    x, weight, bias, a, b = operands(64, 96, 48, 8)
    held = {t.data_ptr() for t in (weight, bias, a, b)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, weight, bias, a, b, SCALE, 0.3, seed=a_seed(), way=way)
    more = sum(t.nbytes for t in saved if t.data_ptr() not in held)
    assert more == x.nbytes + 64 * 8 * 4 + a_seed().nbytes


@pytest.mark.parametrize("way", TRITON)
def test_a_checkpoint_draws_the_same_mask(way):
    given = operands(64, 512, 64)

    def run(x):
        return lora_linear(x, *given[1:], SCALE, 0.5, way=way)

    torch.manual_seed(1)
    plain = torch.autograd.grad(run(given[0]).sum(), (given[0], given[3]))
    torch.manual_seed(1)
    again = torch.autograd.grad(checkpoint(run, given[0], use_reentrant=False).sum(), (given[0], given[3]))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("way", TRITON)
def test_second_derivatives(way):
    x, weight, bias, a, b = operands(6, 8, 8, 2)
    given = x, a, b

    def second(function, **more):
        y = function(x, weight, bias, a, b, SCALE, 0.3, **more)
        first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    for one, other in zip(second(lora_linear, seed=a_seed(), way=way), second(reference, seed=a_seed()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("way", TRITON)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(way, p):
    x, weight, bias, a, b = operands(8, 16, 24, 4)
    seed = a_seed() if p else None
    arguments = x, None, weight, bias, None, a, b, SCALE, p, seed, way
    lora_linear(x, weight, bias, a, b, SCALE, way=way)  # registers the operators
    torch.library.opcheck(torch.ops.peftkit.lora_linear.default, arguments)
    _, s, _ = torch.ops.peftkit.lora_linear(*arguments)
    dy = draw(8, 24)
    backward = dy, x.detach(), None, weight, bias, None, a.detach(), b.detach(), s
    torch.library.opcheck(
        torch.ops.peftkit.lora_linear_backward.default,
        (*backward, SCALE, p, seed, way, [True, True, True, False]),
    )


@pytest.mark.parametrize("way", TRITON)
def test_autocast_is_the_base_in_its_dtype(way):
    given = operands(24, 64, 32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = lora_linear(*given, SCALE, way=way)
    assert found.dtype is torch.bfloat16
    rounded = [t.detach().bfloat16() for t in given[:3]]
    torch.testing.assert_close(found, lora_linear(*rounded, given[3], given[4], SCALE, way=way))


def test_a_weight_with_room_is_not_copied_and_not_changed():
    weight, x, s, b = draw(24, 40), draw(9, 40), draw(9, 5), draw(24, 5)
    roomy = augmented.with_room(weight, 5)
    assert torch.equal(roomy, weight) and roomy.stride() == (56, 1)
    version = roomy._version
    wide = augmented.beside(roomy, b, 0.5)
    assert wide.data_ptr() == roomy.data_ptr() and torch.equal(roomy, weight)
    assert torch.equal(augmented.forward(x, roomy, None, s, b, 0.5), augmented.forward(x, weight, None, s, b, 0.5))
    # nor does it count as a change of the weight, which others may have saved
    assert roomy._version == version
    # somebody else's columns behind a slice are not room, nor are the weight's own behind a slice of it
    assert augmented.beside(roomy[:, :16], b).data_ptr() != roomy.data_ptr() and torch.equal(roomy, weight)
    slice_ = draw(24, 48)[:, :40]
    assert augmented.beside(slice_, b).data_ptr() != slice_.data_ptr()
    assert augmented.beside(roomy, draw(24, 17)).data_ptr() != roomy.data_ptr()  # more than there is


@pytest.mark.gpu
@pytest.mark.parametrize("way", TRITON)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compiles_in_one_graph(way, p):
    given, dy = operands(256, 256, 256, 16, torch.bfloat16, torch.float32), draw(256, 256, dtype=torch.bfloat16)
    compiled = torch.compile(lambda *t: lora_linear(*t, SCALE, p, seed=a_seed(), way=way), fullgraph=True)
    x, _, _, a, b = given
    found = torch.autograd.grad(compiled(*given), (x, a, b), dy)
    for one, other in zip(found, results(lora_linear, given, dy, p, seed=a_seed(), way=way)[1:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
def test_draws_its_own_seed_when_compiled():
    given = operands(256, 256, 256, 16, torch.bfloat16, torch.float32)
    compiled = torch.compile(lambda *t: lora_linear(*t, SCALE, 0.5), fullgraph=True)
    one, other = (compiled(*given) for _ in range(2))
    assert torch.isfinite(one).all() and not torch.equal(one, other)
    torch.autograd.grad(one.sum(), (given[0], given[3], given[4]))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_the_tensors_are():
    given = [t.detach().to("cuda:1") for t in operands()]
    seed = a_seed().to("cuda:1")
    torch.testing.assert_close(
        lora_linear(*given, SCALE, 0.3, seed=seed, way="epilogue"), reference(*given, SCALE, 0.3, seed)
    )


@pytest.mark.parametrize("way", TRITON)
def test_a_bias_of_any_stride(way):
    x, weight, _, a, b = operands()
    for bias in (draw(32, 2)[:, 0], draw(1).expand(32)):
        found = lora_linear(x, weight, bias, a, b, SCALE, way=way)
        assert (found - reference(x, weight, bias, a, b, SCALE)).norm() <= 1e-5 * found.norm()


@pytest.mark.parametrize("way", TRITON)
def test_a_weight_with_room_serves_two_passes_before_one_backward(way):
    x, weight, bias, a, b = operands()
    roomy = augmented.with_room(weight, 4)
    both = sum(lora_linear(x, roomy, bias, a, b, SCALE, way=way) for _ in range(2))
    true = 2 * reference(x, weight, bias, a, b, SCALE)
    pairs = zip(*(torch.autograd.grad(y.sum(), (x, a, b)) for y in (both, true)), strict=True)
    assert all((one - other).norm() <= 1e-5 * other.norm() for one, other in pairs)


@pytest.mark.parametrize("flag", ["tf32", "ieee"])
def test_fp32_is_what_torch_has_been_told(monkeypatch, flag):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the older flag alone")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = flag
        assert dot_constants(torch.float32)["PRECISION"] == flag
        assert dot_constants(torch.bfloat16)["PRECISION"] == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.parametrize("way", TRITON)
def test_a_cuda_graph_holds_a_step_and_draws_anew(way):
    given = operands(256, 256, 256, 16, torch.bfloat16, torch.float32)
    dy = draw(256, 256, dtype=torch.bfloat16)

    def step():
        y = lora_linear(*given, SCALE, 0.5, way=way)
        return y, *torch.autograd.grad(y, (given[0], given[3], given[4]), dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    runs = []
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        runs.append([t.clone() for t in held])
    assert all(torch.isfinite(t).all() for t in runs[0])
    assert not torch.equal(runs[0][0], runs[1][0])  # another mask
