"""What can go wrong in the middle, or be asked twice: the numbers stay right, or an error says why they would not."""

from __future__ import annotations

import copy
import re
import threading

import pytest
import torch
from torch import nn

import peftkit
from peftkit import Config, DoRAConfig, IA3Config, LoRAConfig
from peftkit.methods.lora import LoRAAdapter

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).double()


def stacked(**configs: Config) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8)).double()
    for name, config in configs.items():
        peftkit.inject(model, config, name=name)
        with torch.no_grad():
            for p in peftkit.parameters(model, name):
                p.add_(0.3 * torch.randn_like(p))
    peftkit.activate(model, *configs)
    return model


def lora(r: int = 2) -> LoRAConfig:
    return LoRAConfig(r=r, targets="all-linear")


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [model[0].weight.detach().clone(), model[2].weight.detach().clone()]


@pytest.fixture
def failing(monkeypatch):
    """The second merge of a pair raises."""
    calls = []
    whole = LoRAAdapter.merge_

    def merge_(self, *args):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        whole(self, *args)

    def arm() -> None:
        monkeypatch.setattr(LoRAAdapter, "merge_", merge_)

    return arm, lambda: monkeypatch.setattr(LoRAAdapter, "merge_", whole)


def test_what_was_merged_before_stays_when_a_merge_fails(failing):
    arm, disarm = failing
    model = stacked(a=lora(), b=lora(3))
    peftkit.merge(model, "a")
    y, held = model(X), weights(model)
    arm()
    with pytest.raises(KeyboardInterrupt):
        peftkit.merge(model, "b")
    disarm()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), held, strict=True))
    assert torch.equal(model(X), y)
    peftkit.merge(model, "b")
    torch.testing.assert_close(model(X), y)
    peftkit.unmerge(model)
    torch.testing.assert_close(model(X), y)


def test_a_merge_for_good_that_fails_can_be_repeated(failing):
    arm, disarm = failing
    model = stacked(a=lora())
    y = model(X)
    arm()
    with pytest.raises(KeyboardInterrupt):
        peftkit.merge(model, keep_base=False)
    disarm()
    torch.testing.assert_close(model(X), y)
    peftkit.merge(model, keep_base=False)
    torch.testing.assert_close(model(X), y)
    assert peftkit.adapters(model) == {}


@pytest.mark.parametrize(
    "relative", [DoRAConfig(r=2, targets="all-linear"), IA3Config(targets="all-linear", feedforward="2")]
)
def test_merging_for_good_under_what_is_relative_to_the_base_is_refused(relative):
    model = stacked(a=lora(), b=relative)
    y, before = model(X), weights(model)
    with pytest.raises(peftkit.NotMergeable, match="'b' at '0' is relative to the base weight"):
        peftkit.merge(model, "a", keep_base=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    peftkit.merge(model, "a", "b", keep_base=False)
    torch.testing.assert_close(model(X), y)


def test_a_name_given_twice_counts_once():
    model = stacked(a=lora(), b=lora())
    y = model(X)
    peftkit.merge(model, "a", "a")
    torch.testing.assert_close(model(X), y)
    peftkit.unmerge(model)
    peftkit.eject(model, "a", "a")
    assert list(peftkit.adapters(model)) == ["b"]


@pytest.mark.parametrize("block", [lambda m: peftkit.using(m, "b"), peftkit.disabled])
def test_merging_in_a_block_of_one_thread_is_refused(block):
    model = stacked(a=lora(), b=lora())
    with block(model), pytest.raises(ValueError, match="every thread"):
        peftkit.merge(model, "a")


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16])
def test_a_pair_of_another_half_precision_does_not_round_the_base(base):
    other = torch.bfloat16 if base == torch.float16 else torch.float16
    model = nn.Sequential(nn.Linear(64, 64)).to(base)
    before = model[0].weight.detach().clone()
    peftkit.inject(model, LoRAConfig(r=2, targets="0", dtype=other))
    peftkit.merge(model)
    assert torch.equal(model[0].weight, before)  # B is zero


def test_a_compiled_model_hears_of_blocks_it_was_not_compiled_in():
    model = stacked(a=lora(), b=lora())
    alone = copy.deepcopy(model)
    peftkit.activate(alone, "a")
    found = {}

    def run() -> None:  # in a thread that has not been in a block before
        call = torch.compile(model, backend="eager", fullgraph=True)
        call(X)
        with peftkit.using(model, "a"):
            found["a"] = call(X)
        with peftkit.disabled(model):
            found["none"] = call(X)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.testing.assert_close(found["a"], alone(X))
    with peftkit.disabled(model):
        torch.testing.assert_close(found["none"], model(X))


@pytest.mark.parametrize("which", ["0", "^0", "*", "**", re.compile("0")], ids=str)
def test_magnitude_only_takes_every_kind_of_pattern(which):
    model = stacked(a=DoRAConfig(r=2, targets="all-linear", magnitude_only=which))
    names = {n for n, _ in model[0].named_parameters() if "peftkit" in n}
    assert names == {"peftkit.a.lora_magnitude_vector"}
    assert len(peftkit.param_groups(model, lr=1.0)[0]["params"]) == (2 if which in ("*", "**") else 4)
    with pytest.raises(peftkit.TargetError, match="magnitude_only"):
        stacked(a=DoRAConfig(r=2, targets="all-linear", magnitude_only="3"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_few_tokens_through_a_pair_in_half_precision(dtype):
    model = stacked(a=DoRAConfig(r=2, targets="all-linear")).to(dtype)
    x = X.to(dtype)
    with torch.no_grad():
        assert torch.equal(model(x), model.requires_grad_()(x))


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "LoHa", "LoKr", "IA3"])
@pytest.mark.parametrize("host", ["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_follows_may_write_over_the_output_of_an_adapted_module(name, host, dtype):
    """An output that autograd takes for a view of ours cannot be written over."""
    config = getattr(peftkit, f"{name}Config")
    config = config(targets="0") if name == "IA3" else config(r=2, targets="0")
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        module = nn.Linear(64, 48) if host == "linear" else nn.Conv2d(8, 16, 3)
        x = torch.randn(7, 100, 64) if host == "linear" else torch.randn(8, 8, 30, 30)
        model = nn.Sequential(module, nn.ReLU(inplace=inplace)).to(dtype)
        peftkit.inject(model, config)
        with torch.no_grad():
            for p in peftkit.parameters(model):
                p.add_(0.1)
        model(x.to(dtype).requires_grad_()).square().sum().backward()
        found.append([p.grad for p in peftkit.parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
