"""One graph, without a break, with torch.compile and torch.export; and every switch is followed."""

from __future__ import annotations

import pytest
import torch
from adapting import CASES, adapted, close, draw, gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import peftkit
from peftkit import LoRAConfig
from peftkit.testing import models
from peftkit.testing.models import drawn, evaluated, output

# -- torch.compile --------------------------------------------------------------------------------------------------------


def counting(backend: str = "eager") -> CompileCounterWithBackend:
    return CompileCounterWithBackend(backend)


SLOW = ("gpt2", "conv1d", "conv3d", "attention-three", "shared")
each_compiled = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c.name in SLOW else ()) for c in CASES.values()], ids=str
)


@each_compiled
def test_it_compiles_into_one_graph_with_the_same_gradients(case):
    model, x = adapted(case), case.x()
    want = gradients(model, x)
    count = counting("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=count)
    model.zero_grad()
    y = output(compiled, x)
    y.square().mean().backward()
    torch.testing.assert_close(y, output(model, x), rtol=1e-4, atol=1e-5)
    close([p.grad for p in peftkit.parameters(model) if p.grad is not None], want)
    assert count.frame_count == 1


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "attention", "encoder"])
def test_it_compiles_into_one_graph_without_gradients(name):
    model, x = adapted(CASES[name]), CASES[name].x()
    count = counting()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for _ in range(2):
        torch.testing.assert_close(evaluated(compiled, x), evaluated(model, x), rtol=1e-4, atol=1e-5)
    assert count.frame_count == 1


@pytest.mark.parametrize(
    "name",
    ["linear", "attention", *(pytest.param(n, marks=pytest.mark.slow) for n in ("encoder", "embedding", "conv2d"))],
)
def test_a_compiled_model_follows_every_switch(name):
    case = CASES[name]
    model, x = adapted(case, "one", "two"), case.x()
    count = counting()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    seen = []
    for names in (("one",), ("two",), ("one", "two"), (), ("two",)):
        with peftkit.using(model, *names):
            want = evaluated(model, x)
            torch.testing.assert_close(evaluated(compiled, x), want, rtol=1e-4, atol=1e-5)
            seen.append(want)
        peftkit.activate(model, *names)
        torch.testing.assert_close(evaluated(compiled, x), want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[0], seen[1])
    with peftkit.disabled(model):
        torch.testing.assert_close(evaluated(compiled, x), seen[3], rtol=1e-4, atol=1e-5)
    graphs = count.frame_count
    for names in (("one",), ("two",), ("one",)):
        peftkit.activate(model, *names)
        torch.testing.assert_close(evaluated(compiled, x), seen[names == ("two",)], rtol=1e-4, atol=1e-5)
    assert count.frame_count == graphs, "a switch to what was compiled before compiles anew"


def test_a_compiled_model_follows_merging():
    case = CASES["linear"]
    model, x = adapted(case), case.x()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    apart = evaluated(compiled, x)
    peftkit.merge(model)
    merged = evaluated(model, x)
    assert torch.equal(evaluated(compiled, x), merged)
    peftkit.unmerge(model)
    assert torch.equal(evaluated(compiled, x), apart)


def test_a_replaced_forward_and_trained_rows_compile():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.embed(x)))

    model, x = drawn(Model()), models.ids(11)
    before = model.body.forward
    model.body.forward = lambda x: torch.relu(before(x))
    peftkit.inject(model, LoRAConfig(r=2, targets="body", also_train={"embed": [4, 5], "head": None}))
    draw(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(evaluated(compiled, x), evaluated(model, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "encoder", "conv2d"])
def test_inductor_compiles_it_too(name):
    case = CASES[name]
    model, x = adapted(case), case.x()
    want = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True)
    model.zero_grad()
    output(compiled, x).square().mean().backward()
    close([p.grad for p in peftkit.parameters(model) if p.grad is not None], want)


# -- export ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "strict"),
    [
        ("linear", False), ("shared", False), ("embedding", False), ("conv2d", False), ("attention", False),
        ("attention-three", False), ("encoder", False), ("linear", True), ("conv2d", True), ("attention", True),
    ],
)  # fmt: skip
def test_it_is_exported_as_it_computes(name, strict):
    case = CASES[name]
    model, x = adapted(case), case.x()
    exported = torch.export.export(model, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), output(model, x), rtol=1e-4, atol=1e-5)
    with peftkit.disabled(model):
        bare = torch.export.export(model, (x,), strict=strict).module()
        torch.testing.assert_close(bare(x), output(model, x), rtol=1e-4, atol=1e-5)
    if name != "embedding":  # which is tied, so not merged
        want = evaluated(model, x)
        peftkit.merge(model)
        merged = torch.export.export(model, (x,), strict=strict).module()
        torch.testing.assert_close(merged(x), want, rtol=1e-4, atol=1e-5)


def test_a_language_model_is_exported_with_a_size_left_open():
    model = adapted(CASES["llama"])
    model.config.use_cache = False

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).logits

    sizes = {0: torch.export.Dim("batch", min=2, max=16)}
    exported = torch.export.export(Logits(), (models.ids(),), dynamic_shapes=(sizes,), strict=False).module()
    x = models.ids().repeat(3, 1)
    torch.testing.assert_close(exported(x), output(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("method", ["linear", "delta"])
def test_inductor_keeps_the_scale(tokens, trains, method):
    """Its fusion of two products into a sum forgets `alpha` (pytorch/pytorch#167313)."""
    from peftkit.kernels.lora_linear import lora_delta, lora_linear

    x, y = torch.randn(tokens, 48), torch.randn(tokens, 40)
    w, c, a, b = torch.randn(40, 48), torch.randn(40), torch.randn(4, 48), torch.randn(40, 4)

    def run(x, y, w, c, a, b):
        return lora_linear(x, w, c, a, b, 2.5) if method == "linear" else lora_delta(x, y.relu() @ w @ w.t(), a, b, 2.5)

    given = [t.requires_grad_(trains and t is not w and t is not c) for t in (x, y, w, c, a, b)]
    with torch.set_grad_enabled(trains):
        true, found = run(*given), torch.compile(run, fullgraph=True)(*given)
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-3)
    if trains:
        for one, other in zip(*(torch.autograd.grad(t.sum(), (x, a, b)) for t in (found, true)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Embedding(30, 16), torch.arange(5)),
        (nn.Embedding(30, 16), torch.arange(10).view(2, 5)),
        (nn.Conv1d(6, 8, 1), torch.ones(2, 6, 9)),
    ],
    ids=["ids", "batched ids", "1x1"],
)
def test_inductor_keeps_the_scale_elsewhere(module, x):
    model = peftkit_with_drawn_pair(module)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)


def peftkit_with_drawn_pair(module: nn.Module) -> nn.Module:
    model = nn.Sequential(module)
    peftkit.inject(model, LoRAConfig(r=2, alpha=10.0, targets="0"))
    for p in model[0].peftkit.parameters():
        nn.init.normal_(p)
    return model
