"""The norm of `W + s·BA` without that matrix: near the true one even where the two cancel, and never a stale one."""

from __future__ import annotations

import copy

import pytest
import torch
from adapting import gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dora import CASES, adapter_of, attached, formula, moved, one
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import peftkit
from peftkit import DoRAConfig, kept_norms
from peftkit.kernels import dora_norm
from peftkit.kernels.dora_norm import reference
from peftkit.kernels.row_norms import row_norms
from peftkit.testing import models
from peftkit.testing.models import evaluated, output

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])

# -- the norm ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 50), cols=st.integers(1, 50), r=st.integers(0, 9), dtype=DTYPES, groups=st.integers(1, 3),
    across=st.booleans(), piece=st.sampled_from([7, 64, 2**20]), scale=st.floats(-4, 4), alike=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_norms_of_every_layout_and_dtype(rows, cols, r, dtype, groups, across, piece, scale, alike, seed):
    torch.manual_seed(seed)
    lead = (groups,) if groups > 1 else ()
    w = torch.randn(*lead, cols, rows).to(dtype).mT if across else torch.randn(*lead, rows, cols).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    a, b = torch.randn(*lead, r, cols, dtype=wide), torch.randn(*lead, rows, r, dtype=wide)
    if alike and r:  # BA cancels within itself
        a, b = 0.01 * a + a[..., :1, :], b - b.mean(-1, keepdim=True)
    before, dora_norm.PIECE = dora_norm.PIECE, piece
    try:
        n, squares = row_norms(w, a, b, scale)
        again, same = row_norms(w, a, b, scale, squares)
    finally:
        dora_norm.PIECE = before
    true = reference(w.double(), a.double(), b.double(), scale)
    assert n.dtype is squares.dtype is wide and not n.requires_grad
    assert torch.equal(n, again) and torch.equal(squares, same)
    size = (w.double().abs() + abs(scale) * b.double().abs() @ a.double().abs()).norm(dim=-1)
    assert bool(((n - true).abs() <= 4 * torch.finfo(wide).eps * size).all())
    torch.testing.assert_close(squares.double(), w.double().square().sum(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("left", [0.5, 1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("across", [False, True])
def test_what_nearly_cancels_keeps_its_digits(left, dtype, across):
    """s·BA is −(1 − left)·W in some rows, so that n² is `left`² of its terms."""
    torch.manual_seed(0)
    b, a = torch.randn(30, 3), torch.randn(3, 40)
    w = (2 * b @ a + left * torch.randn(30, 40) / 10).to(dtype)
    w = w.t().contiguous().t() if across else w
    b[20:] = 0  # the others do not cancel
    n, _ = row_norms(w, a, -b, 2.0)
    true = reference(w.double(), a.double(), -b.double(), 2.0)
    size = w.double().norm(dim=1)
    assert bool(((n - true).abs() <= 4 * torch.finfo(torch.float32).eps * size).all())
    naive = w.double().norm(dim=1).float() ** 2
    if left < 0.01 and dtype is torch.float32:  # the three terms alone would not do
        cross = ((w @ a.t()) * -b).sum(1)
        three = (naive + 4 * cross + 4 * ((b @ (a @ a.t())) * b).sum(1)).clamp_min(0).sqrt()
        assert float(((three - true).abs() / size).max()) > 8 * torch.finfo(torch.float32).eps


def test_what_cancels_to_nothing_is_no_nan():
    w = torch.randn(5, 3) @ torch.randn(3, 8)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    a, b = vh[:3].contiguous(), -(u[:, :3] * s[:3])
    for traced in (False, True):
        run = torch.compile(row_norms, fullgraph=True, backend="eager") if traced else row_norms
        n, _ = run(w, a, b, 1.0)
        assert bool(n.isfinite().all()) and bool((n > 0).all()) and float(n.max()) < 1e-2
    n, _ = row_norms(torch.zeros(2, 4), torch.zeros(1, 4), torch.zeros(2, 1), 1.0)
    assert bool((n / n == 1).all())


def test_autocast_does_not_reach_the_norm():
    w, a, b = torch.randn(9, 8), torch.randn(2, 8), torch.randn(9, 2)
    want, _ = row_norms(w, a, b, 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = row_norms(w, a, b, 2.0)
    assert torch.equal(found, want)


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch) -> list[bool]:
    """One entry a computation: whether ‖W‖² was known already."""
    calls: list[bool] = []
    real = kept_norms.row_norms

    def counted(w: Tensor, a: Tensor, b: Tensor, scale: float, squares: Tensor | None = None):
        calls.append(squares is not None)
        return real(w, a, b, scale, squares)

    monkeypatch.setattr(kept_norms, "row_norms", counted)
    return calls


def test_it_is_kept_in_evaluation_and_over_micro_batches(computed):
    model, x = one(), torch.randn(3, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(peftkit.parameters(model), lr=0.1)
    for _ in range(3):
        model(x).sum().backward()
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    assert computed == [False]
    optimizer.step()
    model(x)
    model(x)
    assert computed == [False, True], "‖W‖² outlives a step of the optimizer"


def test_what_inference_mode_keeps_can_be_trained_with(computed):
    model, x = one(), torch.randn(3, 6, dtype=torch.float64)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert computed == [False]


CHANGES = {
    "a": lambda linear, adapter: adapter.lora_A.data[1, 3:4].add_(1e-3),
    "b": lambda linear, adapter: adapter.lora_B.data[4, 1:].mul_(1.01),
    "a in place": lambda linear, adapter: adapter.lora_A.detach().add_(0.1),
    "b replaced": lambda linear, adapter: setattr(adapter.lora_B, "data", adapter.lora_B.data * 2),
    "w": lambda linear, adapter: linear.weight.data.mul_(1.5),
    "w in place": lambda linear, adapter: linear.weight.detach()[0].add_(1),
    "w by its storage": lambda linear, adapter: linear.weight.untyped_storage().copy_(
        (linear.weight.detach() + 1).untyped_storage()
    ),
    "w replaced": lambda linear, adapter: setattr(linear.weight, "data", linear.weight.data + 1),
    "another w": lambda linear, adapter: setattr(
        linear, "weight", nn.Parameter(linear.weight.detach() + 1, requires_grad=False)
    ),
    "scale": lambda linear, adapter: setattr(adapter, "scale", 9.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_is_missed(change):
    model = one()
    x = torch.randn(3, 6, dtype=torch.float64)
    before = model(x)
    CHANGES[change](model[0], adapter_of(model))
    found = model(x)
    assert not torch.allclose(found, before, rtol=1e-7)
    torch.testing.assert_close(found, formula(model[0], adapter_of(model), x))


def test_a_row_of_a_large_weight_written_in_place_is_noticed():
    model = one(300, 200, torch.float32)
    x = torch.randn(2, 300)
    model(x)
    with torch.no_grad():
        model[0].weight[17, 5] += 100
    torch.testing.assert_close(model(x), formula(model[0], adapter_of(model), x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("what", ["bias", "lora_magnitude_vector", "lora_A", "lora_B"])
def test_a_few_tokens_follow_every_vector_written_through_data(what):
    """What is folded for them is kept too."""
    model, x = one(dtype=torch.float32), torch.randn(2, 6)
    adapter = adapter_of(model)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x), formula(model[0], adapter, x))
        (model[0].bias if what == "bias" else getattr(adapter, what)).data[1] += 3
        torch.testing.assert_close(model(x), formula(model[0], adapter, x))
        model[0].bias = None
        torch.testing.assert_close(model(x), formula(model[0], adapter, x))


def test_it_follows_a_change_of_dtype():
    model, x = one(dtype=torch.float32), torch.randn(3, 6)
    model(x)
    model.double()
    torch.testing.assert_close(model(x.double()), formula(model[0], adapter_of(model), x.double()))


# -- compiled, checkpointed, under autocast ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["linear", "attention", *(pytest.param(n, marks=pytest.mark.slow) for n in ("embedding", "conv2d", "gpt2"))]
)
def test_it_compiles_into_one_graph(name):
    case = CASES[name]
    model, x = attached(case, dtype=torch.float32), case.x()
    want, y = gradients(model, x), evaluated(model, x)
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=count)
    torch.testing.assert_close(evaluated(compiled, x), y, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    output(compiled, x).square().mean().backward()
    for p, grad in zip(peftkit.parameters(model), want, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-5)
    graphs = count.frame_count
    with torch.no_grad():
        adapter_of(model, next(n for n, m in model.named_modules() if n.endswith(".peftkit"))[:-8]).lora_B.add_(0.2)
    torch.testing.assert_close(evaluated(compiled, x), evaluated(model, x), rtol=1e-4, atol=1e-5)
    assert graphs <= 2 and count.frame_count == graphs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "llama"])
def test_inductor_compiles_it_too(name):
    case = CASES[name]
    model, x = attached(case, dtype=torch.float32), case.x()
    want = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True)
    model.zero_grad()
    output(compiled, x).square().mean().backward()
    for p, grad in zip(peftkit.parameters(model), want, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "conv2d", "attention"])
def test_it_is_exported(name):
    case = CASES[name]
    model, x = attached(case, dtype=torch.float32), case.x()
    exported = torch.export.export(model, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), output(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    from torch.utils.checkpoint import checkpoint

    model = models.drawn(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)))
    peftkit.inject(model, DoRAConfig(r=2, targets="all-linear", dropout=0.5))
    moved(model)
    x, found = torch.randn(1024, 64, requires_grad=True), []
    for again in (False, True):
        model.train().zero_grad()
        torch.manual_seed(1)
        y = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        y.square().mean().backward()  # type: ignore[union-attr]
        found.append([p.grad.clone() for p in peftkit.parameters(model) if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_autocast_computes_in_half_and_trains_in_full():
    model = one(32, 24, torch.float32)
    x = torch.randn(64, 32)
    true = formula(model[0], adapter_of(model), x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.float().square().mean().backward()
    assert y.dtype is torch.bfloat16
    assert float((y.detach().float() - true.detach()).abs().max()) <= 8e-3 * 3 * float(true.detach().abs().max())
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in peftkit.parameters(model))


def test_torch_func_goes_through_it():
    model = one(6, 5)
    x = torch.randn(4, 6, dtype=torch.float64)
    values = {k: v.detach() for k, v in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    each_row = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    twin = copy.deepcopy(model)
    twin(x).square().sum().backward()
    for name, p in twin.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(each_row[name].sum(0), p.grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6), (0, 6)], ids=str)
def test_a_few_tokens_are_computed_from_kept_products(bias, shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=bias)).double()
    peftkit.inject(model, DoRAConfig(r=2, alpha=6, targets="0"))
    adapter = adapter_of(model)
    x = torch.randn(shape, dtype=torch.float64)
    for change in ("lora_A", "lora_B", "lora_magnitude_vector", None):
        if change is not None:  # past the version counter, as optimizers may
            getattr(adapter, change).data.add_(torch.rand(()).double() + 0.1)
        expected = model(x).detach()
        with torch.no_grad():
            assert adapter._folds(x, model[0].weight, 0.0)
            torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
        torch.testing.assert_close(model(x), model.train()(x), rtol=1e-12, atol=1e-12)
