"""(IA)³, VeRA, BitFit, LoHa and LoKr against their formulas, written out on the weights of a plain copy in fp64."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit
from peftkit import BitFitConfig, IA3Config, LoHaConfig, LoKrConfig, LoRAConfig, VeRAConfig
from peftkit.method import Config
from peftkit.testing import models
from peftkit.testing.models import drawn, evaluated, numbers, output

# -- the formulas, entry by entry -----------------------------------------------------------------------------------------


def ia3_output(weight: Tensor, t: dict[str, Tensor]) -> Tensor:
    return torch.stack([t["ia3_l"].flatten()[i] * row for i, row in enumerate(weight)])


def ia3_input(weight: Tensor, t: dict[str, Tensor]) -> Tensor:
    vector = t["ia3_l"].flatten()
    per, groups = weight.shape[1], len(vector) // weight.shape[1]
    rows = weight.shape[0] // groups
    out = weight.clone()
    for i in range(weight.shape[0]):
        for j in range(per):
            out[i, j] *= vector[i // rows * per + j]
    return out


def vera(weight: Tensor, t: dict[str, Tensor]) -> Tensor:
    rows, cols = weight.shape
    a, b = t["A"][:, :cols], t["B"][:rows]
    return weight + torch.diag(t["vera_lambda_b"]) @ b @ torch.diag(t["vera_lambda_d"]) @ a


def loha(scale: float) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    def changed(weight: Tensor, t: dict[str, Tensor]) -> Tensor:
        one, two = t["hada_w1_a"] @ t["hada_w1_b"], t["hada_w2_a"] @ t["hada_w2_b"]
        return weight + (scale * one * two).reshape(weight.shape)

    return changed


def lokr(scale: float) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    def changed(weight: Tensor, t: dict[str, Tensor]) -> Tensor:
        w1, w2 = (t[n] if n in t else t[f"{n}_a"] @ t[f"{n}_b"] for n in ("lokr_w1", "lokr_w2"))
        w2 = w2.reshape(w2.shape[0], weight.shape[1] // w1.shape[1], *weight.shape[2:])
        out = weight.clone()
        for i in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                first = w1[i // w2.shape[0], j // w2.shape[1]]
                out[i, j] += scale * first * w2[i % w2.shape[0], j % w2.shape[1]]
        return out

    return changed


METHODS: dict[str, tuple[Config, Any]] = {
    "ia3-output": (IA3Config(feedforward=()), ia3_output),
    "ia3-input": (IA3Config(feedforward="*"), ia3_input),
    "vera": (VeRAConfig(r=3, seed=4), vera),
    "bitfit": (BitFitConfig(), lambda weight, t: weight),
    "loha-pair": (LoHaConfig(r=1, alpha=3.0), loha(3.0)),
    "loha-pair-2": (LoHaConfig(r=2, alpha=3.0), loha(1.5)),  # through a pair at the grouped convolution
    "loha-dense": (LoHaConfig(r=5, alpha=3.0), loha(0.6)),
    "lokr": (LoKrConfig(r=1, alpha=3.0), lokr(3.0)),
    "lokr-both": (LoKrConfig(r=1, alpha=3.0, factor=3, decompose_both=True), lokr(3.0)),
    "lokr-full": (LoKrConfig(r=9, alpha=3.0, factor=2), lokr(3.0 / 9)),
}


def hf_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(6, 12))


HOSTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 6)), numbers(2, 3, 12)),
    "Conv1D": (hf_conv1d, numbers(2, 3, 12)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(6, 4, 3, padding=1)), numbers(2, 6, 7)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(8, 24, 3, groups=2, stride=2)), numbers(2, 8, 7, 7)),
    "conv2d-circular": (lambda: nn.Sequential(nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular")), numbers(6, 5, 5)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2)), numbers(1, 2, 4, 4, 4)),
}  # fmt: skip


def trained(model: nn.Module, config: Config, name: str = "default", seed: int = 3) -> nn.Module:
    peftkit.inject(model, config, name=name)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in peftkit.parameters(model, name):
            p.add_(0.5 * torch.randn(p.shape, generator=g).to(p))
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_it_computes_its_formula(method, host):
    (make, x), (config, formula) = HOSTS[host], METHODS[method]
    plain = drawn(make()).double()
    model = copy.deepcopy(plain)
    config = dataclasses.replace(config, targets="0")
    if (method == "vera" and "conv" in host) or ("lokr" in method and host in ("conv1d", "conv3d")):
        with pytest.raises(peftkit.TargetError, match="it is no Linear"):
            trained(model, config)
        return
    trained(model, config)
    adapter = model.get_submodule("0.peftkit.default")
    t = adapter.tensors()
    if method == "vera":
        t |= {"A": adapter.shared.A.detach(), "B": adapter.shared.B.detach()}
    with torch.no_grad():
        weight = plain[0].weight.t() if host == "Conv1D" else plain[0].weight
        changed = formula(weight.clone(), t)
        weight.copy_(changed)
        if method == "ia3-output":
            plain[0].bias.mul_(t["ia3_l"].flatten())
        if method == "bitfit":
            plain[0].bias.add_(t["bitfit_bias"])
    want = evaluated(plain, x().double())
    torch.testing.assert_close(evaluated(model, x().double()), want, rtol=1e-12, atol=1e-12)
    peftkit.merge(model)
    torch.testing.assert_close(evaluated(model, x().double()), want, rtol=1e-12, atol=1e-12)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).detach(), p.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kdim", [None, 6], ids=["one", "three"])
def test_it_changes_the_weights_that_attention_reads(method, kdim):
    config, formula = METHODS[method]
    plain = drawn(models.Attend(kdim)).double()
    model = trained(copy.deepcopy(plain), dataclasses.replace(config, targets="attention"))
    parts = {"in_proj": "in_proj_weight"} if kdim is None else {f"{p}_proj": f"{p}_proj_weight" for p in "qkv"}
    with torch.no_grad():
        for i, (part, weight) in enumerate(parts.items()):
            adapter = model.attn.peftkit.get_submodule(f"default:{part}")
            t = adapter.tensors()
            if method == "vera":
                t |= {"A": adapter.shared.A.detach(), "B": adapter.shared.B.detach()}
            own = plain.attn.get_parameter(weight)
            own.copy_(formula(own.clone(), t))
            bias = plain.attn.in_proj_bias[8 * i : 8 * (i + 1)] if kdim else plain.attn.in_proj_bias
            if method == "ia3-output":
                bias.mul_(t["ia3_l"].flatten())
            if method == "bitfit":
                bias.add_(t["bitfit_bias"])
        t = model.attn.out_proj.peftkit.default.tensors()
        if method == "vera":
            t |= {"A": adapter.shared.A.detach(), "B": adapter.shared.B.detach()}
        out = plain.attn.out_proj
        out.weight.copy_(formula(out.weight.clone(), t))
        if method == "ia3-output":
            out.bias.mul_(t["ia3_l"].flatten())
        if method == "bitfit":
            out.bias.add_(t["bitfit_bias"])
    x = numbers(2, 5, 8)().double()
    torch.testing.assert_close(evaluated(model, x), evaluated(plain, x), rtol=1e-12, atol=1e-12)
    peftkit.merge(model)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).detach(), p.detach(), rtol=1e-12, atol=1e-12)


# -- several at one site --------------------------------------------------------------------------------------------------


def stacked(order: tuple[str, ...]) -> tuple[nn.Module, Tensor, Tensor]:
    """(IA)³ twice, LoRA and BitFit on one Linear, and what its weight and bias should be."""
    plain = drawn(nn.Sequential(nn.Linear(5, 4))).double()
    configs = {
        "out": IA3Config(targets="0"),
        "in": IA3Config(targets="0", feedforward="0"),
        "lora": LoRAConfig(r=2, targets="0"),
        "bias": BitFitConfig(targets="0"),
    }
    model = copy.deepcopy(plain)
    for name in order:
        trained(model, configs[name], name, seed=list(configs).index(name))
    peftkit.activate(model, *order)
    t = {name: model.get_submodule(f"0.peftkit.{name}").tensors() for name in configs}
    w, bias = plain[0].weight.detach(), plain[0].bias.detach()
    on_out, on_in = t["out"]["ia3_l"] - 1, t["in"]["ia3_l"] - 1
    pair = t["lora"]["lora_B.weight"] @ t["lora"]["lora_A.weight"]
    return model, w + on_out * w + on_in * w + pair, bias + on_out[:, 0] * bias + t["bias"]["bitfit_bias"]


@pytest.mark.parametrize("order", list(permutations(("out", "in", "lora", "bias")))[::5])
@pytest.mark.parametrize(
    "merged",
    [(), ("lora",), ("in", "bias"), ("lora", "bias", "in"), ("out", "bias", "lora"), "all", "final"],
    ids=str,
)
def test_vectors_scale_the_base_alone_in_any_order_merged_or_not(order, merged):
    model, weight, bias = stacked(order)
    x = numbers(3, 5)().double()
    names = order if isinstance(merged, str) else merged
    if names:
        peftkit.merge(model, *names, keep_base=merged != "final")
    want = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(evaluated(model, x), want, rtol=1e-12, atol=1e-12)


# -- what it costs ----------------------------------------------------------------------------------------------------------


def kept(model: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes of what autograd keeps of a call, but for parameters."""
    own, shapes = {p.data_ptr() for p in model.parameters()}, []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output(model, x)
    return shapes


@pytest.mark.parametrize(
    ("config", "largest"),
    [(LoHaConfig(r=2, targets="0"), 0), (LoHaConfig(r=9, targets="0"), 1), (LoKrConfig(r=2, targets="0"), 0),
     (VeRAConfig(r=8, targets="0"), 0), (IA3Config(targets="0"), 0)],
    ids=["loha-pair", "loha-dense", "lokr", "vera", "ia3"],
)  # fmt: skip
def test_nothing_of_the_weights_size_is_kept_for_the_way_back(config, largest):
    """LoHa through ΔW keeps that alone, which the gradient of its input needs."""
    model, x = trained(nn.Sequential(nn.Linear(48, 40)), config), torch.randn(3, 48, requires_grad=True)
    sizes = [torch.Size(s).numel() for s in kept(model, x)]
    assert sum(n >= 48 * 40 for n in sizes) == largest, sizes


@pytest.mark.parametrize("r", range(1, 7))
def test_loha_takes_the_way_with_fewer_multiplications(r):
    from torch.utils.flop_counter import FlopCounterMode

    model, x = nn.Sequential(nn.Linear(32, 24)), torch.randn(500, 32)
    peftkit.inject(model, LoHaConfig(r=r, targets="0"))
    adapter: Any = model.get_submodule("0.peftkit.default")
    counts = {}
    chosen = adapter.as_pair
    for way in (True, False):
        adapter.as_pair = way
        with FlopCounterMode(display=False) as count:
            evaluated(model, x)
        counts[way] = count.get_total_flops()
    assert counts[chosen] <= counts[not chosen], counts


# -- compiled ---------------------------------------------------------------------------------------------------------------

COMPILED = [IA3Config(targets="all-linear"), IA3Config(targets="all-linear", feedforward="*"), BitFitConfig(),
            VeRAConfig(r=3, targets="all-linear"), LoHaConfig(r=1, targets="all-linear"),
            LoHaConfig(r=7, targets="all-linear"), LoKrConfig(r=1, targets="all-linear")]  # fmt: skip


@pytest.mark.parametrize("config", COMPILED, ids=lambda c: c.method)
@pytest.mark.parametrize("case", ["linear", "attention", pytest.param("conv2d", marks=pytest.mark.slow)])
def test_it_compiles_into_one_graph_with_the_same_gradients(case, config):
    found = {c.name: c for c in models.CASES}[case]
    if case == "conv2d":
        if isinstance(config, VeRAConfig):
            pytest.skip("VeRA adapts Linears alone")
        config = dataclasses.replace(config, targets=found.targets)
    model, x = trained(found.make(), config), found.x()
    output(model, x).square().mean().backward()
    want = [p.grad.clone() for p in peftkit.parameters(model)]
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = output(compiled, x)
    y.square().mean().backward()
    torch.testing.assert_close(y, output(model, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([p.grad for p in peftkit.parameters(model)], want, rtol=1e-4, atol=1e-5)


def test_two_vectors_at_a_site_compile_too():
    model = trained(drawn(nn.Sequential(nn.Linear(5, 4))), IA3Config(targets="0"))
    trained(model, IA3Config(targets="0", feedforward="0"), "second")
    peftkit.activate(model, "default", "second")
    x = numbers(3, 5)()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(evaluated(compiled, x), evaluated(model, x))
