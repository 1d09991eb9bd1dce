"""Several adapters that act at once are one product of their ranks together, and the sum of what each adds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peftkit
from peftkit.methods import lora

RANKS = st.lists(st.tuples(st.integers(1, 6), st.floats(0.5, 8)), min_size=2, max_size=4)


def adapted(settings_, bias=True, dtype=torch.float64, dropout=0.0):
    """A Linear in a model, with an adapter for each (r, alpha); all act, and their pairs are random."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 7, bias=bias, dtype=dtype))
    for i, (r, alpha) in enumerate(settings_):
        config = peftkit.LoRAConfig(r=r, alpha=alpha, targets="0", dropout=dropout)
        peftkit.inject(model, config, name=f"a{i}")
    peftkit.activate(model, *[f"a{i}" for i in range(len(settings_))])
    for p in model[0].peftkit.parameters():
        nn.init.normal_(p)
    return model


def formula(model, x):
    y = nn.functional.linear(x, model[0].weight, model[0].bias)
    for adapter in model[0].peftkit.children():
        y = y + adapter.scale * x @ adapter.lora_A.t() @ adapter.lora_B.t()
    return y


@settings(max_examples=30, deadline=None)
@given(pairs=RANKS.filter(lambda p: all(r <= 7 for r, _ in p)), bias=st.booleans(), trains=st.booleans())
def test_is_the_sum_in_output_and_gradients(pairs, bias, trains):
    model = adapted(pairs, bias)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    wanted = [x, *model[0].peftkit.parameters()]
    with torch.set_grad_enabled(trains):
        found = model(x)
    true = formula(model, x)
    torch.testing.assert_close(found, true)
    if trains:
        for one, other in zip(*(torch.autograd.grad(y.sum(), wanted) for y in (found, true)), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("dropout", "training", "calls"), [(0.0, True, 1), (0.5, False, 1), (0.5, True, 1)])
def test_the_base_is_computed_once(monkeypatch, dropout, training, calls):
    model = adapted([(2, 2.0), (3, 3.0)], dropout=dropout).train(training)
    ranks = []

    def counted(x, weight, bias, a, b, *rest):
        ranks.append(len(a))
        return kept(x, weight, bias, a, b, *rest)

    kept = lora.lora_linear
    monkeypatch.setattr(lora, "lora_linear", counted)
    model(torch.randn(4, 12, dtype=torch.float64))
    assert len(ranks) == calls
    assert ranks == ([2] if dropout and training else [5])  # each draws a mask of its own


def test_each_draws_a_mask_of_its_own():
    model = adapted([(4, 4.0), (4, 4.0)], dropout=0.5)
    first, second = model[0].peftkit.children()
    with torch.no_grad():
        second.lora_A.copy_(first.lora_A)
        second.lora_B.copy_(-first.lora_B)
    x = torch.randn(4, 12, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), nn.functional.linear(x, model[0].weight, model[0].bias))
    assert not torch.allclose(model.train()(x), nn.functional.linear(x, model[0].weight, model[0].bias))


def test_a_merged_one_is_in_the_weight():
    model = adapted([(2, 2.0), (3, 3.0), (1, 1.0)])
    x = torch.randn(4, 12, dtype=torch.float64)
    before = model(x)
    peftkit.merge(model, "a0")
    torch.testing.assert_close(model(x), before)


def test_compiles_in_one_graph():
    model = adapted([(2, 2.0), (3, 3.0)], dtype=torch.float32)
    x = torch.randn(4, 12)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
