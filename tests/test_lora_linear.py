"""`lora_linear` is its reference: law 11, and what the kernel promises about memory, masks and errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from peftkit.kernels import lora_linear as module
from peftkit.kernels import torch_way
from peftkit.kernels.lora_linear import lora_delta, lora_linear, reference, reference_delta

SCALE = 1.7
NAMES = ("y", "dx", "da", "db")


@pytest.fixture(params=["kernel", "composed"])
def path(request, monkeypatch):
    """Both ways to compute, whatever the size."""
    monkeypatch.setattr(module, "SMALL", 0 if request.param == "kernel" else 2**62)
    monkeypatch.setattr(torch_way, "PIECE", 2**10)
    return request.param


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(torch_way, "PIECE", 2**10)


def inputs(lead=(40,), fan_in=48, fan_out=24, r=4, dtype=torch.float32, master=None, bias=True, seed=None):
    """x, weight, bias, a, b; x, a and b need gradients."""
    if seed is not None:
        torch.manual_seed(seed)
    master = master or dtype
    return (
        torch.randn(*lead, fan_in, dtype=dtype, requires_grad=True),
        torch.randn(fan_out, fan_in, dtype=dtype) / fan_in**0.5,
        torch.randn(fan_out, dtype=dtype) if bias else None,
        (torch.randn(r, fan_in, dtype=master) / fan_in**0.5).requires_grad_(),
        torch.randn(fan_out, r, dtype=master, requires_grad=True),
    )


def with_gradients(function, given, dy):
    """y, dx, da, db of `function`, which takes the inputs."""
    x, weight, bias, a, b = given
    y = function(x, weight, bias, a, b)
    return y, *torch.autograd.grad(y, (x, a, b), dy, retain_graph=True)


def wide(given):
    """The inputs in fp64, as leaves of their own."""
    return tuple(t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in given)


def error(found, truth):
    return (found.double() - truth).norm().item()


def assert_as_good_as(found, plain, truth, room=(0, 0, 0, 0)):
    """Each error at most twice that of plain torch; `room` is for sizes where torch is exact by luck."""
    for name, ours, theirs, true, more in zip(NAMES, found, plain, truth, room, strict=True):
        assert ours.shape == true.shape, name
        assert torch.isfinite(ours).all(), name
        assert error(ours, true) <= 2 * error(theirs, true) + more, name


def roundings(function, given, dy):
    """Two roundings of every term: what the results would be if nothing cancelled, times the dtype's step."""
    magnitudes = tuple(t if t is None else t.detach().abs().requires_grad_(t.requires_grad) for t in wide(given))
    results = with_gradients(function, magnitudes, dy.double().abs())
    return [2 * torch.finfo(dy.dtype).eps * t.norm().item() for t in results]


floats = st.sampled_from(
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ]
)
layouts = st.sampled_from(["plain", "transposed", "sliced", "expanded"])


def laid_out(x, layout):
    """A tensor of the same shape whose memory is arranged in another way."""
    if layout == "transposed" and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "sliced":
        x = torch.stack((x, x), dim=-1)[..., 0]
    elif layout == "expanded" and x.dim() > 1 and x.shape[0]:
        x = x[:1].expand(x.shape)
    return x


@pytest.mark.parametrize("small", [0, 2**62], ids=["kernel", "composed"])
@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 5), max_size=3),
    fan_in=st.integers(1, 40),
    fan_out=st.integers(1, 40),
    r=st.integers(1, 9),
    dtypes=floats,
    bias=st.booleans(),
    x_layout=layouts,
    w_transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_is_reference(small, lead, fan_in, fan_out, r, dtypes, bias, x_layout, w_transposed, seed):
    given = inputs(tuple(lead), fan_in, fan_out, r, *dtypes, bias, seed)
    x, weight, *rest = given
    x = laid_out(x.detach(), x_layout).requires_grad_()
    weight = weight.t().contiguous().t() if w_transposed else weight
    given = (x, weight, *rest)
    dy = laid_out(torch.randn(*lead, fan_out, dtype=dtypes[0]), x_layout)
    before = torch.random.get_rng_state()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALL", small)
        found = with_gradients(lambda *args: lora_linear(*args, SCALE), given, dy)
        with torch.no_grad():
            inferred = lora_linear(*given, SCALE)
    plain = with_gradients(lambda *args: reference(*args, SCALE), given, dy)
    truth = with_gradients(lambda *args: reference(*args, SCALE), wide(given), dy.double())

    room = roundings(lambda *args: reference(*args, SCALE), given, dy)
    assert_as_good_as(found, plain, truth, room)
    assert_as_good_as((inferred, *found[1:]), plain, truth, room)
    assert [t.dtype for t in found] == [dtypes[0], dtypes[0], dtypes[1], dtypes[1]]
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("shape", [(300, 257, 129, 8), (64, 64, 512, 16), (1000, 96, 33, 1)])
def test_is_as_exact_as_reference(path, dtypes, shape):
    tokens, *sizes = shape
    given = inputs((tokens,), *sizes, *dtypes)
    dy = torch.randn(tokens, sizes[1], dtype=dtypes[0])
    found = with_gradients(lambda *args: lora_linear(*args, SCALE), given, dy)
    plain = with_gradients(lambda *args: reference(*args, SCALE), given, dy)
    truth = with_gradients(lambda *args: reference(*args, SCALE), wide(given), dy.double())
    assert_as_good_as(found, plain, truth)


@settings(max_examples=25, deadline=None)
@given(lead=st.lists(st.integers(0, 5), max_size=3), dtypes=floats, seed=st.integers(0, 2**31))
def test_delta_is_reference(lead, dtypes, seed):
    x, _, _, a, b = inputs(tuple(lead), dtype=dtypes[0], master=dtypes[1], seed=seed)
    base = torch.randn(*lead, b.shape[0], dtype=dtypes[0], requires_grad=True)
    kept = base.detach().clone()
    dy = torch.randn_like(base)

    def with_base(function):
        return lambda x, base, _, a, b: function(x, base, a, b, SCALE)

    given = (x, base, None, a, b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALL", 0)
        found = with_gradients(with_base(lora_delta), given, dy)
        assert torch.equal(torch.autograd.grad(lora_delta(x, base, a, b, SCALE), base, dy)[0], dy)
    plain = with_gradients(with_base(reference_delta), given, dy)
    truth = with_gradients(with_base(reference_delta), wide(given), dy.double())
    assert_as_good_as(found, plain, truth, roundings(with_base(reference_delta), given, dy))
    assert torch.equal(base, kept)


def test_output_at_initialisation_is_the_base(path):
    for dtype, lead in itertools.product((torch.float32, torch.bfloat16), ((), (40,), (3, 7))):
        x, weight, bias, a, b = inputs(lead, dtype=dtype)
        b = torch.zeros_like(b, requires_grad=True)
        assert torch.equal(lora_linear(x, weight, bias, a, b, SCALE), F.linear(x, weight, bias))
        with torch.no_grad():
            assert torch.equal(lora_linear(x, weight, bias, a, b, SCALE), F.linear(x, weight, bias))


def test_backward_twice_and_new_inputs(path):
    for dropout in (0.0, 0.3):
        for _ in range(3):
            given = inputs((50,))
            y = lora_linear(*given, SCALE, dropout)
            leaves = (given[0], *given[3:])
            first = torch.autograd.grad(y.sin().sum(), leaves, retain_graph=True)
            second = torch.autograd.grad(y.sin().sum(), leaves)
            assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_only_what_is_needed(kernel, dropout):
    given = inputs((50,), seed=0)
    dy = torch.randn(50, 24)

    def gradients(trained):
        leaves = dict(zip("xab", (given[0], *given[3:]), strict=True))
        x, a, b = (t.detach().requires_grad_(name in trained) for name, t in leaves.items())
        torch.manual_seed(3)
        lora_linear(x, *given[1:3], a, b, SCALE, dropout).backward(dy)
        return {name: t.grad for name, t in zip("xab", (x, a, b), strict=True)}

    everything = gradients("xab")
    for trained in ("x", "a", "b", "xa", "xb", "ab"):
        found = gradients(trained)
        for name in "xab":
            assert (found[name] is not None) == (name in trained)
            assert name not in trained or torch.equal(found[name], everything[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_poisoned_memory_does_not_leak(kernel, dtype):
    given, dy = inputs((50,), dtype=dtype), torch.ones(50, 24, dtype=dtype)
    torch.use_deterministic_algorithms(True)  # fills what is allocated and not written with NaN
    try:
        for dropout in (0.0, 0.3):
            found = with_gradients(lambda *args, p=dropout: lora_linear(*args, SCALE, p), given, dy)
            assert all(torch.isfinite(t).all() for t in found)
    finally:
        torch.use_deterministic_algorithms(False)


def test_second_derivatives(path):
    given = wide(inputs((3,), 5, 4, 2, seed=0))
    leaves = (given[0], *given[3:])

    def twice(function, **options):
        first = torch.autograd.grad(function(*given, SCALE, **options).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for ours, theirs in zip(twice(lora_linear), twice(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    def probed(*leaves):
        torch.manual_seed(1)
        return lora_linear(leaves[0], *given[1:3], *leaves[1:], SCALE, 0.4)

    y = probed(*leaves).sin().sum()
    plain, again = (torch.autograd.grad(y, leaves, retain_graph=True, create_graph=again) for again in (False, True))
    torch.testing.assert_close(again, plain)
    assert torch.autograd.gradgradcheck(probed, leaves)


def test_second_derivative_without_saved_x(kernel):
    x, weight, bias, a, b = inputs()
    y = lora_linear(x, weight, bias, a.detach(), b, SCALE)
    with pytest.raises(RuntimeError, match="`a` frozen"):
        torch.autograd.grad(y.sin().sum(), (x, b), create_graph=True)


# Dropout


def mask_of(shape, dropout, seed):
    """The mask, scaled, that `lora_linear` draws after this seed: A is the identity and B passes it on."""
    torch.manual_seed(seed)
    fan_in = shape[-1]
    eye = torch.eye(fan_in, dtype=torch.float64)
    probe = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    y = lora_linear(probe, torch.zeros(fan_in, fan_in, dtype=torch.float64), None, eye, eye, 1.0, dropout)
    return y.detach()


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2])
@pytest.mark.parametrize("lead", [(64,), (3, 37), (4000,)])
def test_dropout_with_the_same_mask(path, dtypes, lead):
    given = inputs(lead, dtype=dtypes[0], master=dtypes[1], seed=0)
    dy = torch.randn(*lead, 24, dtype=dtypes[0])
    mask = mask_of(given[0].shape, 0.3, seed=7)
    kept = mask[mask > 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / 0.7), rtol=1e-4)

    torch.manual_seed(7)
    found = with_gradients(lambda *args: lora_linear(*args, SCALE, 0.3), given, dy)

    def masked(mask):
        def run(x, weight, bias, a, b):
            return reference_delta(x * mask, F.linear(x, weight, bias), a, b, SCALE)

        return run

    plain = with_gradients(masked(mask.to(dtypes[0])), given, dy)
    truth = with_gradients(masked(mask), wide(given), dy.double())
    assert_as_good_as(found, plain, truth)


def test_delta_draws_the_same_mask(kernel):
    x, weight, bias, a, b = inputs()
    torch.manual_seed(2)
    y = lora_linear(x, weight, bias, a, b, SCALE, 0.3)
    torch.manual_seed(2)
    delta = lora_delta(x, F.linear(x, weight, bias), a, b, SCALE, 0.3)
    torch.testing.assert_close(delta, y)
    dy = torch.randn_like(y)
    of_y, of_delta = (torch.autograd.grad(out, (x, a, b), dy) for out in (y, delta))
    torch.testing.assert_close(of_delta, of_y)


@pytest.mark.parametrize("dropout", [0.001, 0.1, 0.5, 0.99])
def test_mask_statistics(path, dropout):
    mask = mask_of((4096, 64), dropout, seed=11)
    count = mask.numel()
    sigma = (dropout * (1 - dropout) / count) ** 0.5
    assert abs((mask == 0).double().mean() - dropout) < 5 * sigma + 2**-16
    dropped = (mask == 0).double() - dropout
    for rows, columns in ((1, 0), (0, 1), (0, 4), (16, 0), (17, 3)):
        product = dropped[rows:, columns:] * dropped[: len(dropped) - rows, : 64 - columns]
        assert abs(product.mean()) < 5 * dropout * (1 - dropout) / product.numel() ** 0.5 + 1e-4
    assert not torch.equal(mask, mask_of((4096, 64), dropout, seed=12))
    assert torch.equal(mask, mask_of((4096, 64), dropout, seed=11))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_draws_the_same_mask(path, reentrant):
    x, weight, bias, a, b = inputs((3, 37), seed=0)
    leaves = (x, a, b)

    def run(x):
        return lora_linear(lora_linear(x, weight, bias, a, b, SCALE, 0.3), *square, SCALE, 0.5)

    square = inputs(fan_in=24, fan_out=24, r=2)[1:]
    gradients = []
    for forward in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        torch.manual_seed(9)
        for leaf in leaves:
            leaf.grad = None
        forward(x).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


# Memory


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_saved_bytes(dtypes, dropout):
    tokens, fan_in, r = 256, 512, 4
    given = inputs((2, tokens // 2), fan_in, 64, r, *dtypes)
    parameters = {t.untyped_storage().data_ptr() for t in given[1:]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = lora_linear(*given, SCALE, dropout)
    assert y.requires_grad
    assert given[0].untyped_storage().data_ptr() in saved
    size = dtypes[0].itemsize
    assert sum(saved.values()) <= tokens * (fan_in + r) * size + bool(dropout) * tokens * fan_in


def test_a_frozen_a_saves_no_x(kernel):
    x, weight, bias, a, b = inputs()
    y = lora_linear(x, weight, bias, a.detach(), b, SCALE)
    assert not any(t is x for t in y.grad_fn.saved_tensors)


# The company it keeps


def test_trained_base(path):
    x, weight, bias, a, b = (t.detach().requires_grad_() for t in inputs())
    for frozen in (weight, bias):
        leaves = [t for t in (x, weight, bias, a, b) if t is not frozen]
        frozen.requires_grad_(False)
        ours, plain = (
            torch.autograd.grad(f(x, weight, bias, a, b, SCALE).sin().sum(), leaves) for f in (lora_linear, reference)
        )
        torch.testing.assert_close(ours, plain)
        frozen.requires_grad_(True)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtypes", list(itertools.product((torch.float32, torch.bfloat16), repeat=3)))
def test_autocast_is_torchs(path, amp, dtypes):
    x, weight, bias, a, b = inputs(seed=0)
    x, a, b = (t.detach().to(dtype).requires_grad_() for t, dtype in ((x, dtypes[0]), (a, dtypes[2]), (b, dtypes[2])))
    given = (x, weight.to(dtypes[1]), bias.to(dtypes[1]), a, b)
    results = []
    for function in (lora_linear, reference):
        with torch.autocast("cpu", dtype=amp):
            y = function(*given, SCALE)
            with torch.no_grad():
                inferred = function(*given, SCALE)
        results.append((y, *torch.autograd.grad(y.float().sin().sum(), (x, a, b)), inferred))
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=4e-2)


def test_backward_under_autocast(kernel):
    given = inputs()
    y = lora_linear(*given, SCALE)
    outside = torch.autograd.grad(y.sum(), (given[0], *given[3:]), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y.sum(), (given[0], *given[3:]))
    assert all(torch.equal(one, two) for one, two in zip(outside, inside, strict=True))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiles_without_a_break(path, grad, dropout):
    x, weight, bias, a, b = inputs((2, 20), dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, a, b: lora_linear(x, weight, bias, a, b, SCALE, dropout),
        fullgraph=True,
        backend="aot_eager",
    )
    with torch.set_grad_enabled(grad):
        y = compiled(x, a, b)
        plain = reference(x, weight, bias, a, b, SCALE)
        if not dropout:
            torch.testing.assert_close(y, plain)
    if grad:
        found = torch.autograd.grad(y.sin().sum(), (x, a, b))
        if not dropout:
            torch.testing.assert_close(found, torch.autograd.grad(plain.sin().sum(), (x, a, b)))


@pytest.mark.parametrize("strict", [True, False])
def test_exports(path, strict):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            _, weight, bias, a, b = inputs()
            self.weight, self.bias = (torch.nn.Parameter(t, requires_grad=False) for t in (weight, bias))
            self.a, self.b = (torch.nn.Parameter(t.detach()) for t in (a, b))

        def forward(self, x):
            return lora_linear(x, self.weight, self.bias, self.a, self.b, SCALE)

    layer, x = Layer(), torch.randn(3, 7, 48)
    exported = torch.export.export(layer, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), layer(x))


def test_transforms(path):
    x, weight, bias, a, b = inputs(seed=0)
    many = torch.stack([a, 2 * a, -a]).detach()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = torch.vmap(lambda a: lora_linear(x, weight, bias, a, b, SCALE))(many)
        torch.testing.assert_close(y[1], reference(x, weight, bias, 2 * a, b, SCALE))

    def loss(function):
        return lambda a, x: function(x, weight, bias, a, b, SCALE).sin().sum()

    each = [torch.vmap(torch.func.grad(loss(f)), (None, 0))(a, x) for f in (lora_linear, reference)]
    torch.testing.assert_close(*each)
    tangents = [torch.func.jvp(loss(f), (a, x), (a, x))[1] for f in (lora_linear, reference)]
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_meta(path, dropout):
    x, weight, bias, a, b = (t.detach().to("meta").requires_grad_(t.requires_grad) for t in inputs((2, 3)))
    y = lora_linear(x, weight, bias, a, b, SCALE, dropout)
    assert y.is_meta
    assert y.shape == (2, 3, 24)
    y.sum().backward()
    assert a.grad.shape == a.shape


# Bad input


def changed(**arguments):
    names = ("x", "weight", "bias", "a", "b")
    return {**dict(zip(names, inputs(), strict=True)), "scale": SCALE, **arguments}


BAD = [
    (ValueError, "a", {"a": torch.randn(4, 47)}),
    (ValueError, "a", {"a": torch.randn(48)}),
    (ValueError, "b", {"b": torch.randn(24, 5)}),
    (ValueError, "b", {"b": torch.randn(23, 4)}),
    (ValueError, "b", {"b": torch.randn(24)}),
    (ValueError, "b", {"weight": torch.randn(1, 48), "bias": None}),
    (ValueError, "weight", {"weight": torch.randn(24, 47)}),
    (ValueError, "weight", {"weight": torch.randn(24)}),
    (ValueError, "bias", {"bias": torch.randn(1)}),
    (ValueError, "bias", {"bias": torch.randn(23)}),
    (ValueError, "x", {"x": torch.tensor(1.0)}),
    (TypeError, "x", {"x": torch.ones(4, 48, dtype=torch.int64)}),
    (TypeError, "x", {"x": [1.0] * 48}),
    (TypeError, "weight", {"weight": torch.ones(24, 48, dtype=torch.int8)}),
    (TypeError, "weight", {"weight": torch.randn(24, 48, dtype=torch.bfloat16)}),
    (TypeError, "a", {"a": torch.ones(4, 48, dtype=torch.int64)}),
    (TypeError, "b", {"b": None}),
    (ValueError, "weight", {"weight": torch.randn(24, 48, device="meta")}),
    (ValueError, "a", {"a": torch.randn(4, 48, device="meta")}),
    (ValueError, "b", {"b": torch.randn(24, 4, device="meta")}),
    (ValueError, "dropout", {"dropout": 1.0}),
    (ValueError, "dropout", {"dropout": -0.1}),
    (ValueError, "dropout", {"dropout": float("nan")}),
]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("kind", "name", "arguments"), BAD)
def test_errors_name_the_argument(path, kind, name, arguments, grad):
    with torch.set_grad_enabled(grad), pytest.raises(kind, match=f"^{name}: expected"):
        lora_linear(**changed(**arguments))


@pytest.mark.parametrize("shape", [(40, 23), (40, 1), (1, 24), (24,), (2, 20, 24)])
def test_delta_refuses_another_y(path, shape):
    x, _, _, a, b = inputs()
    with pytest.raises(ValueError, match=r"^y: expected"):
        lora_delta(x, torch.randn(shape), a, b, SCALE)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_of_a_wide_pair_are_not_rounded(kernel, p):
    given = inputs((64,), dtype=torch.bfloat16, master=torch.float32)
    y = lora_linear(*given, SCALE, p)
    for gradient in torch.autograd.grad(y, given[3:], torch.randn_like(y)):
        assert gradient.dtype is torch.float32
        assert not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize(("dtype", "pair"), [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)])
def test_a_narrower_pair_does_not_narrow_x(dtype, pair):
    given = inputs((1,), r=8, dtype=dtype, master=pair, seed=0)
    y = lora_linear(*given, SCALE)
    assert y.dtype is dtype
    truth = reference(*wide(given), SCALE)
    assert error(y, truth) <= 8 * torch.finfo(dtype).eps * truth.norm()
