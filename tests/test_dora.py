"""DoRA is its formula: in output and gradients, on every host, merged, reloaded, compiled; and its norm is never stale."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from adapting import draw, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftkit
from peftkit import DoRAConfig, LoRAConfig, kept_norms
from peftkit.graft import graft_of
from peftkit.kernels import dora_norm
from peftkit.kernels import lora_linear as kernels
from peftkit.methods import dora
from peftkit.testing import models
from peftkit.testing.models import evaluated, output

CASES = {case.name: case for case in models.CASES}
each = pytest.mark.parametrize("case", CASES.values(), ids=str)


def attached(case: models.Case, *, dtype: torch.dtype = torch.float64, drawn: bool = True, **kwargs) -> nn.Module:
    model = case.make().to(dtype)
    kwargs = {"r": 2, "alpha": 3.0, "targets": case.targets, **kwargs}
    peftkit.inject(model, DoRAConfig(**kwargs))
    if drawn:
        moved(model)
    return model


def moved(model: nn.Module, seed: int = 3) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in peftkit.parameters(model):
            p.add_(0.3 * torch.randn(p.shape, generator=g).to(p))


def one(i: int = 6, o: int = 9, dtype: torch.dtype = torch.float64, **kwargs) -> nn.Sequential:
    model = models.drawn(nn.Sequential(nn.Linear(i, o))).to(dtype)
    peftkit.inject(model, DoRAConfig(**{"r": 2, "alpha": 3.0, "targets": "0", **kwargs}))
    moved(model)
    return model


def adapter_of(model: nn.Module, path: str = "0", name: str = "default"):
    return model.get_submodule(f"{path}.peftkit.{name}")


def formula(linear: nn.Linear, adapter, x: Tensor) -> Tensor:
    """Equation 5, with the norm a constant."""
    v = linear.weight + adapter.scale * adapter.lora_B @ adapter.lora_A
    w = adapter.lora_magnitude_vector[:, None] * v / v.norm(dim=1, keepdim=True).detach()
    return F.linear(x, w, linear.bias)


# -- the function ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    i=st.integers(1, 40), o=st.integers(1, 40), tokens=st.integers(0, 30), bias=st.booleans(), big=st.booleans(),
    r=st.integers(1, 4), stabilized=st.booleans(),
)  # fmt: skip
def test_output_and_every_gradient_are_the_formulas(i, o, tokens, bias, big, r, stabilized):
    torch.manual_seed(i)
    model = nn.Sequential(nn.Linear(i, o, bias=bias, dtype=torch.float64))
    peftkit.inject(model, DoRAConfig(r=min(r, i, o), alpha=2.5, rank_stabilized=stabilized, targets="0"))
    moved(model, seed=o)
    x = torch.randn(tokens * (1200 if big else 1), i, dtype=torch.float64, requires_grad=True)
    adapter = adapter_of(model)
    wanted = [x, *adapter.parameters()]
    found, true = model(x), formula(model[0], adapter, x)
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(true)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), wanted) for y in (found, true)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model(x), true, rtol=1e-10, atol=1e-10)


@each
def test_every_host_computes_with_the_dense_weight(case):
    """A twin whose weights hold `m ∘ (W + s·BA)/n`, made here, gives the same output and gradient of the input's map."""
    model, twin = attached(case), case.make().to(torch.float64)
    if case.name == "embedding":  # tied: the twin's table is no longer the head's
        twin.embed.weight = nn.Parameter(twin.embed.weight.detach().clone())
    for site, adapter in [(n, m) for n, m in model.named_modules() if isinstance(m, dora.DoRAAdapter)]:
        host, module = adapter.host, twin.get_submodule(site.partition(".peftkit.")[0])
        weight = module._parameters[host.weight_name]
        with torch.no_grad():
            a, b = adapter.factors()
            for w, (am, bm), m in zip(
                host.matrices(weight), host.pair_matrices(a, b), adapter.lora_magnitude_vector.view(host.groups, -1, 1),
                strict=True,
            ):  # fmt: skip
                v = w + adapter.scale * bm @ am
                w.copy_(m * v / v.norm(dim=1, keepdim=True))
    x = case.x().double() if case.x().is_floating_point() else case.x()
    torch.testing.assert_close(evaluated(model, x), evaluated(twin, x), rtol=1e-9, atol=1e-9)
    assert all(g.isfinite().all() for g in gradients(model, x))


@pytest.mark.parametrize("name", ["conv2d", "gpt2", "embedding", "attention", "attention-three"])
def test_gradients_of_hosts_are_those_of_finite_differences_with_the_norm_fixed(name, monkeypatch):
    case = CASES[name]
    model = attached(case)
    x = case.x().double() if case.x().is_floating_point() else case.x()
    found = gradients(model, x)
    fixed = {id(a.host): a.norms.of(a.host, a.host.weight, *a.factors(), a.scale).clone() for a in adapters_in(model)}
    monkeypatch.setattr(kept_norms.KeptNorms, "of", lambda self, host, *rest: fixed[id(host)])

    def loss() -> float:  # with gradients, since without them what is kept is asked in another way
        return float(output(model, x).square().mean().detach())

    for p, grad in zip(peftkit.parameters(model), found, strict=True):
        at = int(grad.abs().argmax())
        flat, step = p.data.view(-1), 1e-6
        flat[at] += step
        above = loss()
        flat[at] -= 2 * step
        below = loss()
        flat[at] += step
        assert (above - below) / (2 * step) == pytest.approx(float(grad.flatten()[at]), rel=1e-4, abs=1e-9)


def adapters_in(model: nn.Module) -> list[dora.DoRAAdapter]:
    return [m for m in model.modules() if isinstance(m, dora.DoRAAdapter)]


def test_a_change_of_the_magnitude_below_bf16_is_not_lost():
    model = one(64, 64, torch.bfloat16)
    x = torch.randn(512, 64, dtype=torch.bfloat16)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            before = model(x).double().detach()
            with torch.no_grad():
                adapter_of(model).lora_magnitude_vector.mul_(1.001)
            after = model(x).double().detach()
        bias = model[0].bias.double()
        assert float(((after - bias).norm() / (before - bias).norm()).detach()) == pytest.approx(1.001, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_as_rounding_lets_it_be(dtype):
    model = one(48, 40, dtype)
    x = torch.randn(700, 48, dtype=dtype, requires_grad=True)
    adapter = adapter_of(model)
    y = model(x)
    y.float().square().mean().backward()
    exact = copy.deepcopy(model).double()
    x64 = x.detach().double().requires_grad_()
    true = formula(exact[0], adapter_of(exact), x64)
    true_grads = torch.autograd.grad(true.square().mean(), list(adapter_of(exact).parameters()))
    true = true.detach()
    eps = torch.finfo(dtype).eps
    assert float((y.detach().double() - true).abs().max()) <= 4 * eps * float(true.abs().max())
    for p, g in zip(adapter.parameters(), true_grads, strict=True):
        assert p.grad is not None and p.grad.dtype is torch.float32
        assert float((p.grad.double() - g).norm()) <= 8 * eps * float(g.norm())


def test_dropout_acts_on_the_input_of_a_alone(monkeypatch):
    model = one(6, 9, dropout=0.5).train()
    x = torch.randn(4, 6, dtype=torch.float64)
    masks = []

    def masked(x: Tensor, p: float, *args) -> Tensor:
        mask = (torch.arange(x.numel()).view(x.shape) % 3 > 0).to(x) / (1 - p)
        masks.append(mask)
        return x * mask

    monkeypatch.setattr(kernels.F, "dropout", masked)
    adapter, linear = adapter_of(model), model[0]
    y = model(x)
    (mask,) = masks
    v = linear.weight + adapter.scale * adapter.lora_B @ adapter.lora_A
    g = adapter.lora_magnitude_vector / v.norm(dim=1)
    true = g * (x @ linear.weight.t() + adapter.scale * (x * mask) @ adapter.lora_A.t() @ adapter.lora_B.t())
    torch.testing.assert_close(y, true + linear.bias)
    model.eval()(x)
    assert len(masks) == 1


def test_the_bases_product_is_computed_once(monkeypatch):
    model = one(6, 9, dropout=0.3).train()
    shapes = []
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, *rest: shapes.append(tuple(w.shape)) or real(x, w, *rest))
    model(torch.randn(4, 6, dtype=torch.float64))
    assert shapes.count((9, 6)) == 1


def test_second_derivatives():
    model = one(3, 4)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    a, b, m = (p.detach().clone().requires_grad_() for p in adapter_of(model).parameters())
    norms = torch.rand(4, dtype=torch.float64) + 1

    def run(x, a, b, m):
        from peftkit.kernels.rescale import _Rescale

        return _Rescale.apply(
            x @ model[0].weight.t() + 2 * x @ a.t() @ b.t() + model[0].bias, m / norms, model[0].bias, -1
        )

    assert torch.autograd.gradgradcheck(run, (x, a, b, m))


# -- rows of zeros, merging, copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_zeros_are_no_nan(dtype):
    model = models.drawn(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))).to(dtype)
    with torch.no_grad():
        model[0].weight[2] = 0
    before, x = copy.deepcopy(model), torch.randn(3, 6).to(dtype)
    peftkit.inject(model, DoRAConfig(r=2, targets="all-linear"))
    assert torch.equal(model(x), before(x))
    optimizer = torch.optim.AdamW(peftkit.parameters(model), lr=0.1)
    start = [p.detach().clone() for p in peftkit.parameters(model)]
    for _ in range(4):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in peftkit.parameters(model))
        optimizer.step()
    m = adapter_of(model).lora_magnitude_vector
    assert m[2] != start[2][2], "the magnitude of the row of zeros learns once B has moved"
    want = model(x)
    peftkit.merge(model)
    assert all(p.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(model(x), want, rtol=0.05, atol=0.02)


@each
def test_after_merging_the_norms_of_rows_are_the_magnitudes(case):
    model = attached(case)
    try:
        peftkit.merge(model)
    except peftkit.NotMergeable:
        pytest.skip("tied")
    for adapter in adapters_in(model):
        host = adapter.host
        found = torch.cat([w.norm(dim=1) for w in host.matrices(host.weight)])
        torch.testing.assert_close(found, adapter.lora_magnitude_vector.detach().abs())


def test_saved_and_loaded_into_another_dtype_of_base(tmp_path):
    model = one(6, 9, torch.bfloat16)
    peftkit.save(model, tmp_path / "a")
    other = models.drawn(nn.Sequential(nn.Linear(6, 9))).to(torch.bfloat16)
    peftkit.load(other, tmp_path / "a")
    x = torch.randn(5, 6, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


def test_copies_and_pickles_keep_no_norms_and_compute_alike():
    model = one()
    x = torch.randn(3, 6, dtype=torch.float64)
    y = model(x)
    assert adapter_of(model).norms._kept is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert adapter_of(twin).norms._kept is None
        assert torch.equal(twin(x), y)
    assert not any("norm" in key or "kept" in key for key in model.state_dict())
    assert graft_of(model[0]) is not None and isinstance(adapter_of(model).norms, kept_norms.KeptNorms)


def test_it_can_be_refused_by_name():
    with pytest.raises(ValueError, match="pissa.*magnitude"):
        DoRAConfig(init="pissa")
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(peftkit.TargetError, match=r"norms of its rows.*packed torch.int8"):
        peftkit.inject(model, DoRAConfig(r=1, targets="0"))
    with pytest.raises(ValueError, match="largest rank"):
        peftkit.inject(nn.Sequential(nn.Linear(4, 4)), DoRAConfig(r=5, targets="0"))


def test_threads_share_what_is_kept():
    model = one(64, 64)
    x = torch.randn(8, 64, dtype=torch.float64)
    true, wrong = formula(model[0], adapter_of(model), x).detach(), []

    def run() -> None:
        for _ in range(60):
            with torch.no_grad():
                if not torch.allclose(model(x), true):
                    wrong.append(1)
            adapter_of(model).norms._kept = None

    threads = [threading.Thread(target=run) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_loras_and_doras_stack_in_any_order():
    model = models.drawn(nn.Sequential(nn.Linear(6, 9))).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    base = model(x)
    alone = {}
    configs = {"d": DoRAConfig(r=2, targets="0"), "l": LoRAConfig(r=2, targets="0"), "e": DoRAConfig(r=1, targets="0")}
    for i, (name, config) in enumerate(configs.items()):
        peftkit.inject(model, config, name=name)
        draw(model, i)
        alone[name] = model(x)
    peftkit.activate(model, "d", "l", "e")
    both = model(x)
    torch.testing.assert_close(both, base + sum(y - base for y in alone.values()))
    peftkit.activate(model, "e", "l", "d")
    torch.testing.assert_close(model(x), both)
    peftkit.merge(model, "l")
    torch.testing.assert_close(model(x), both)
    peftkit.merge(model, "e")
    torch.testing.assert_close(model(x), both)
    peftkit.unmerge(model)
    peftkit.merge(model, keep_base=False)  # each is relative to the base, which the ones before have changed by then
    torch.testing.assert_close(model(x), both)
    assert not dora_norm.composed(model[0].weight)
    assert torch.equal(output(model, x), model(x))
