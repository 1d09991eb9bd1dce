"""Several methods on one model: attached in any order, any one taken off."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import peftkit
from peftkit import (
    BitFitConfig,
    Config,
    DoRAConfig,
    IA3Config,
    LoRAConfig,
    ParallelAdapterConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeriesAdapterConfig,
)
from peftkit.testing.models import bert, evaluated, ids, llama

STACK: dict[str, Config] = {
    "lora": LoRAConfig(r=2, targets="attention"),
    "parallel": ParallelAdapterConfig(bottleneck=3, targets="mlp"),
    "prefix": PrefixTuningConfig(length=2),
}
WIDE: dict[str, Config] = STACK | {
    "dora": DoRAConfig(r=2, targets=["attention", "mlp"]),
    "series": SeriesAdapterConfig(bottleneck=3, targets=["attention", "mlp"]),
    "ia3": IA3Config(),
    "prompt": PromptTuningConfig(length=2),
}


def attach(model, names, of=WIDE):
    for name in names:
        peftkit.inject(model, of[name], name=name)
        g = torch.Generator().manual_seed(sum(map(ord, name)))
        with torch.no_grad():
            for p in peftkit.parameters(model, name):
                p.copy_(0.3 * torch.randn(p.shape, generator=g))
    peftkit.activate(model, *names)
    return model


@pytest.mark.parametrize("make", [llama, bert], ids=["llama", "bert"])
def test_the_order_of_attaching_does_not_matter(make):
    base = make().double()
    found = [evaluated(attach(copy.deepcopy(base), order), ids()) for order in itertools.permutations(STACK)]
    for y in found[1:]:
        torch.testing.assert_close(y, found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [llama, bert], ids=["llama", "bert"])
@pytest.mark.parametrize("leaving", WIDE)
def test_any_one_can_leave(make, leaving):
    base, x = make().double(), ids()
    model = attach(copy.deepcopy(base), WIDE)
    assert torch.isfinite(evaluated(model, x)).all()
    peftkit.eject(model, leaving)
    others = [n for n in WIDE if n != leaving]
    assert torch.equal(evaluated(model, x), evaluated(attach(copy.deepcopy(base), others), x))
    for name in others:
        peftkit.eject(model, name)
    assert torch.equal(evaluated(model, x), evaluated(base, x))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]


@pytest.mark.parametrize("name", WIDE)
def test_each_one_alone_acts_as_if_it_were_alone(name):
    base, x = llama().double(), ids()
    model, alone = attach(copy.deepcopy(base), WIDE), attach(copy.deepcopy(base), [name])
    with peftkit.using(model, name):
        assert torch.equal(evaluated(model, x), evaluated(alone, x))
    with peftkit.disabled(model):
        assert torch.equal(evaluated(model, x), evaluated(base, x))


def test_a_stack_trains_generates_and_is_stored(tmp_path):
    model, x = attach(llama(), WIDE), ids()
    optimizer = torch.optim.AdamW(peftkit.parameters(model), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    made = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(x, **made), model.generate(x, use_cache=False, **made))
    other = llama()
    for name in WIDE:
        peftkit.save(model, tmp_path / name, name=name)
        peftkit.load(other, tmp_path / name, name=name)
    peftkit.activate(other, *WIDE)
    assert torch.equal(evaluated(other, x), evaluated(model, x))


def test_what_can_be_merged_is_while_the_others_act():
    model, x = attach(llama().double(), WIDE), ids()
    before = evaluated(model, x)
    with pytest.raises(peftkit.NotMergeable):
        peftkit.merge(model)
    peftkit.merge(model, "lora", "dora", "ia3")
    torch.testing.assert_close(evaluated(model, x), before, rtol=1e-8, atol=1e-10)
    peftkit.unmerge(model)
    assert torch.equal(evaluated(model, x), before)


def test_biases_join_in():
    base, x = bert().double(), ids()
    model = attach(copy.deepcopy(base), ["bitfit", "lora"], {"bitfit": BitFitConfig(), **STACK})
    peftkit.eject(model, "lora")
    alone = attach(copy.deepcopy(base), ["bitfit"], {"bitfit": BitFitConfig()})
    assert torch.equal(evaluated(model, x), evaluated(alone, x))
