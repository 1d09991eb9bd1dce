"""FLOPs, activations, optimizer state and files: counted, and against formulas, torch's counter and the real thing."""

from __future__ import annotations

import dataclasses
from itertools import product

import foreign_methods  # noqa: F401 - registers its methods, as any package may
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import peftkit
from peftkit import BitFitConfig, DoRAConfig, LoRAConfig
from peftkit.costs.flops import count_flops
from peftkit.costs.memory import optimizer_bytes, stored_bytes
from peftkit.method import registered
from peftkit.testing import models
from peftkit.testing.models import output

EXAMPLES = {f"{name}-{i}": c for name, cls in registered().items() for i, c in enumerate(cls.examples())}


def _fits(config: peftkit.Config) -> bool:
    try:
        peftkit.inject(models.linear(), config)
    except ValueError:
        return False
    return True


ON_LINEARS = [name for name, config in EXAMPLES.items() if _fits(config)]
ON_BLOCKS = [name for name in EXAMPLES if name not in ON_LINEARS]  # and a Linear says nothing of them


def counted(model: nn.Module, x: Tensor) -> peftkit.Cost:
    return peftkit.cost(model, x, seconds=0)


def stack(fan_in: int, middle: int, fan_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(fan_in, middle), nn.GELU(), nn.Linear(middle, fan_out))


class Plain(nn.Module):
    """A LoRA of two Linears in operations that torch's counter knows."""

    def __init__(self, fan_in: int, middle: int, fan_out: int, r: int):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(middle, fan_in), torch.randn(fan_out, middle)])
        self.weights.requires_grad_(False)
        self.a = nn.ParameterList([torch.randn(r, fan_in), torch.randn(r, middle)])
        self.b = nn.ParameterList([torch.randn(middle, r), torch.randn(fan_out, r)])

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = F.linear(x, self.weights[i]) + F.linear(F.linear(x, self.a[i]), self.b[i])
            x = x if i else F.gelu(x)
        return x


sizes = st.integers(6, 40)


@settings(max_examples=15, deadline=None)
@given(sizes, sizes, sizes, st.integers(1, 6), st.sampled_from([1, 7, 2**13]), st.booleans())
def test_flops_of_lora_are_those_of_its_formula(fan_in, middle, fan_out, r, tokens, x_trains):
    """The many tokens take the operator, the few plain torch; the products are the same."""
    model = stack(fan_in, middle, fan_out)
    peftkit.inject(model, LoRAConfig(r=r, targets=["0", "2"]))
    x = torch.randn(tokens, fan_in, requires_grad=x_trains)
    found = counted(model, x)
    base, low = 2 * tokens * middle * (fan_in + fan_out), 2 * tokens * r * (fan_in + 2 * middle + fan_out)
    assert found.base_forward_flops == base and found.forward_flops == base + low
    through = 2 * tokens * middle * (fan_out + r)  # dX of the second
    if x_trains:
        through += 2 * tokens * fan_in * (middle + r)
    once = 2 * tokens * r * (middle + fan_out)  # dS, asked for by dX and dA
    assert found.backward_flops == through + once + low
    of_torch = Plain(fan_in, middle, fan_out, r)
    with FlopCounterMode(display=False) as counter:
        loss = of_torch(x).sum()
        assert counter.get_total_flops() == found.forward_flops
        loss.backward()
    assert counter.get_total_flops() == found.forward_flops + found.backward_flops
    assert found.base is not None
    dx = 2 * tokens * middle * (fan_out + (fan_in if x_trains else 0))
    assert found.base.forward_flops == base and found.base.backward_flops == dx + base


def eager(kind: str) -> nn.Module:
    model = getattr(models, kind)()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # attention in products that torch's counter knows
    return model


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *product(["linear"], ON_LINEARS),
        *product(["convolutions"], [m for m in ON_LINEARS if m.endswith("-0")]),
        *product(["llama"], ["lora-0", "dora-0", *(m for m in ON_BLOCKS if m.endswith("-0"))]),
        ("bert", "lora-0"),
        ("gpt2", "lora-0"),
    ],
)
def test_flops_are_what_torch_counts(kind, method):
    """Where the model is small enough that every product is one that torch's counter knows."""
    case = next(c for c in models.CASES if c.name == {"convolutions": "conv2d"}.get(kind, kind))
    model, x, config = eager(kind), case.x(), EXAMPLES[method]
    if kind == "convolutions":
        config = dataclasses.replace(config, targets=["0"])  # of grouped ones torch counts too many, see below
    try:
        peftkit.inject(model, config)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    model.train()
    found = count_flops(lambda: output(model, x), torch.sum, [p for p in model.parameters() if p.requires_grad])
    with FlopCounterMode(display=False) as counter:
        loss = output(model, x).sum()
        forward = counter.get_total_flops()
        if loss.requires_grad:
            loss.backward()
    assert (found.forward, found.backward) == (forward, counter.get_total_flops() - forward)
    assert found.forward > 0 and not found.unknown


def test_fused_attention_counts_as_its_products():
    tokens, heads, width, layers = 5, 4, 4, 2
    fused, plain = models.llama(), eager("llama")
    a, b = counted(fused, models.ids()), counted(plain, models.ids())
    assert a.forward_flops == b.forward_flops
    again = 2 * 2 * heads * tokens * tokens * width * layers  # the scores, which are not kept
    assert a.backward_flops == b.backward_flops + again


def test_norms_that_are_kept_count_in_every_step():
    model = models.linear()
    peftkit.inject(model, DoRAConfig(r=2, targets=["0"]))
    x = torch.randn(3, 6)
    first = counted(model, x)
    model(x)
    assert counted(model, x).forward_flops == first.forward_flops
    assert first.forward_flops > first.base_forward_flops + 2 * 3 * 2 * (6 + 10)


def test_what_a_checkpoint_computes_again_is_of_backward():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool | None) -> None:
            super().__init__()
            self.inner, self.reentrant = models.linear(), reentrant

        def forward(self, x: Tensor) -> Tensor:
            if self.reentrant is None:
                return self.inner(x)
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    x = torch.randn(3, 6, requires_grad=True)
    plain, again = (counted(Checkpointed(kind), x) for kind in (None, False))
    assert again.forward_flops == plain.forward_flops
    assert again.backward_flops == plain.backward_flops + plain.forward_flops - 2 * 3 * 10 * 4  # the last is not needed
    assert again.saved_bytes == 3 * 6 * 4 < plain.saved_bytes
    with pytest.raises(ValueError, match="use_reentrant=False"):
        counted(Checkpointed(True), x)


def test_operators_without_a_formula_are_named():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    model = Recurrent()
    found = counted(model, torch.randn(3, 2, 4))
    if found.forward_flops == 2 * 6 * 4 * 2:  # where torch computes it as one operator
        assert "_rnn" in found.notes["flops"] and "no formula" in str(found)


def test_products_that_torch_passes_over():
    x, w, v = torch.randn(3, 4), torch.randn(4, 5), torch.randn(4)

    def run() -> Tensor:
        y = torch.zeros(3, 5).addmm_(x, w)
        z = torch.zeros(2, 3, 5).baddbmm_(x.expand(2, 3, 4), w.expand(2, 4, 5))
        return y.sum() + z.sum() + (x @ v).sum() + torch.addmv(torch.zeros(3), x, v).sum() + v.dot(v)

    flops = count_flops(run, lambda y: y, ())
    assert flops.forward == 2 * (3 * 4 * 5 * 3 + 3 * 4 * 2 + 4) and flops.backward == 0


# -- activations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [3, 2**13])
def test_saved_activations_of_lora(tokens):
    """x and S of both pairs and what GELU keeps, whether plain torch or the fused function saves them."""
    model = stack(6, 10, 4)
    peftkit.inject(model, LoRAConfig(r=2, targets=["0", "2"]))
    found = counted(model, torch.randn(tokens, 6))
    assert found.saved_bytes == 4 * tokens * (6 + 2 + 10 + 10 + 2)
    assert found.base is not None and found.base.saved_bytes == 4 * tokens * (6 + 10 + 10)


def test_a_storage_counts_once_and_parameters_and_buffers_do_not():
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))
            self.register_buffer("c", torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.w  # keeps x (and w)
            return y[:2] * y[2:] * self.c[:2]  # keeps y, by two views, their product's other side c

    assert counted(Kept(), torch.randn(4)).saved_bytes == 2 * 4 * 4


def test_what_is_let_go_in_a_forward_is_not_saved():
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            (x * self.w).exp()  # keeps its result, and is gone
            return x * self.w

    assert counted(Drops(), torch.randn(4)).saved_bytes == 4 * 4


def test_what_is_not_trained_saves_nothing():
    model = models.linear().requires_grad_(False)
    found = counted(model, torch.randn(3, 6))
    assert found.trained == found.saved_bytes == found.backward_flops == found.optimizer_bytes == 0


# -- optimizer and file ----------------------------------------------------------------------------------------------------


class Reads(torch.optim.SGD):
    """One that asks for a value, which the meta device has not."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["norm"] = torch.tensor(p.grad.norm().item())
        return super().step(closure)


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        torch.optim.SGD,
        lambda ps: torch.optim.SGD(ps, momentum=0.9),
        lambda ps: torch.optim.Adam(ps, amsgrad=True),
        lambda ps: torch.optim.AdamW(ps, fused=True),
        torch.optim.Adafactor,
        lambda ps: Reads(ps, momentum=0.9),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_bytes_are_those_of_a_real_one(make, dtype):
    model = models.linear().to(dtype)
    peftkit.inject(model, LoRAConfig(r=2, targets="all-linear", dtype=dtype))
    found = peftkit.cost(model, torch.randn(3, 6, dtype=dtype), optimizer=make, seconds=0)
    optimizer = make(peftkit.parameters(model))
    model(torch.randn(3, 6, dtype=dtype)).sum().backward()
    optimizer.step()
    states = optimizer.state_dict()["state"].values()
    assert found.optimizer_bytes == sum(
        t.numel() * t.element_size() for s in states for t in s.values() if isinstance(t, Tensor)
    )


def test_an_optimizer_of_the_parameters_themselves_is_refused():
    """Without gradients it would have no state, and with them its step would change them."""
    model = models.linear()
    peftkit.inject(model, LoRAConfig(r=2, targets="all-linear"))
    for p in peftkit.parameters(model):
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    for make in (
        lambda ps: torch.optim.AdamW(peftkit.param_groups(model, lr=1e-3, ratio=16)),
        lambda ps: torch.optim.AdamW([{"params": ps}, {"params": [model[0].weight]}]),
    ):
        with pytest.raises(ValueError, match="AdamW is of other parameters than those in the list.*LoRA\\+'s do"):
            peftkit.cost(model, torch.randn(3, 6), optimizer=make, seconds=0)
    assert all(map(torch.equal, before, model.parameters()))
    real = torch.optim.AdamW(peftkit.param_groups(model, lr=1e-3, ratio=16))  # LoRA+ has the state of AdamW
    real.step()
    states = real.state_dict()["state"].values()
    size = sum(t.numel() * t.element_size() for s in states for t in s.values())
    assert size == counted(model, torch.randn(3, 6)).optimizer_bytes


def test_optimizer_bytes_take_no_memory():
    huge = nn.Parameter(torch.empty(1, dtype=torch.bfloat16).expand(10**12))
    assert optimizer_bytes([huge], torch.optim.AdamW) == 4 * 10**12 + 4


@pytest.mark.parametrize(
    ("kind", "method"), [*product(["linear"], ON_LINEARS), *product(["llama"], ["lora-0", *ON_BLOCKS])]
)
def test_bytes_on_disk_are_those_of_the_file(kind, method, tmp_path):
    model = getattr(models, kind)()
    try:
        peftkit.inject(model, EXAMPLES[method])
    except ValueError as refusal:
        pytest.skip(str(refusal))
    try:
        peftkit.save(model, tmp_path / "saved")
    except NotImplementedError:
        with pytest.raises(NotImplementedError, match="cannot be saved"):
            stored_bytes(model)
        if kind == "linear":
            assert "cannot be saved" in counted(model, torch.randn(3, 6)).notes["stored_bytes"]
        return
    assert stored_bytes(model) == (tmp_path / "saved" / "adapter_model.safetensors").stat().st_size


def test_of_several_adapters_those_that_act_are_stored(tmp_path):
    model = models.llama()
    peftkit.inject(model, LoRAConfig(r=2, also_train=["lm_head"]), name="a")
    peftkit.inject(model, BitFitConfig(), name="b")
    written = {}
    for name in "ab":
        peftkit.save(model, tmp_path / name, name=name)
        written[name] = (tmp_path / name / "adapter_model.safetensors").stat().st_size
    assert counted(model, models.ids()).stored_bytes == written["b"]
    peftkit.activate(model, "a", "b")
    both = counted(model, models.ids())
    assert both.stored_bytes == written["a"] + written["b"] and both.label == "lora + bitfit"
