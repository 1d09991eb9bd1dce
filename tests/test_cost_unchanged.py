"""What is measured is afterwards as it was: what a model's attributes hold, its versions, and the batch."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftkit
from peftkit import LoRAConfig
from peftkit.testing import models

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Records(nn.Module):
    """Changes in place what its attributes hold, and a buffer that autograd has saved."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.log, self.cache, self.seen, self.last = [1], {"a": 1}, {1}, deque([1, 2], maxlen=2)
        self.ema, self.parts = torch.zeros(6), [torch.zeros(6)]

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(x)
        self.cache["a"] = self.cache[len(self.cache)] = x
        self.seen.add(len(self.seen) + 1)
        self.last.append(x)
        self.ema.add_(1), self.parts[0].add_(1)
        return self.norm(self.inner(x))


@pytest.mark.parametrize("fails", [False, True])
def test_what_attributes_hold_is_as_it_was(fails):
    model = Records()
    objects, before = [id(v) for v in vars(model).values()], copy.deepcopy(vars(model))
    if fails:
        with pytest.raises(ArithmeticError):
            peftkit.cost(model, X, loss=lambda y: 1 / 0)
    else:
        peftkit.cost(model, X, seconds=0.001)
    assert [id(v) for v in vars(model).values()] == objects
    for name in ("log", "cache", "seen", "last"):
        assert getattr(model, name) == before[name]
    assert model.last.maxlen == 2 and not model.ema.any() and not model.parts[0].any()


def test_a_loss_from_before_can_be_differentiated():
    """Autograd refuses where the version of a tensor that it saved has moved, as by merging or by running statistics."""
    model = Records().eval()
    peftkit.inject(model, LoRAConfig(r=2, targets="inner"))
    x = X.clone().requires_grad_()
    before = model(x).square().sum()
    model.train()
    peftkit.cost(model, X, seconds=0.001)
    (found,) = torch.autograd.grad(before, x)
    model.eval()
    assert torch.equal(found, torch.autograd.grad(model(x).square().sum(), x)[0])


class Writes(nn.Module):
    """To its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 2)

    def forward(self, x: Tensor, mask: Tensor, seen: dict[str, Any]) -> Tensor:
        mask.zero_()
        seen["calls"].append(len(seen["calls"]))
        assert seen["calls"] == [0] and seen["x"] is x
        return self.inner(x)


def test_the_batch_is_as_it_was():
    from transformers import DynamicCache

    batch = {"x": X, "mask": torch.ones(3), "seen": {"calls": [], "x": X}}
    peftkit.cost(Writes(), batch, seconds=0.01)
    assert batch["mask"].all() and batch["seen"] == {"calls": [], "x": X} and batch["x"] is X
    llama, ids, cache = models.llama(), models.ids(), DynamicCache()
    with torch.no_grad():
        llama(ids, past_key_values=cache, use_cache=True)
    batch, length = {"input_ids": ids, "past_key_values": cache}, cache.get_seq_length()
    found = peftkit.cost(llama, batch, seconds=0.01)
    assert cache.get_seq_length() == length and peftkit.cost(llama, batch, seconds=0).saved_bytes == found.saved_bytes
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        llama(**batch)
    assert found.forward_flops == counter.get_total_flops()
    with pytest.raises(TypeError, match=r"batch\['seen'\]: a generator that cannot be copied"):
        peftkit.cost(Writes(), {"x": X, "mask": X, "seen": (i for i in X)})


def test_the_history_and_the_hooks_of_a_batch_are_left_alone():
    model, called = models.linear(), []
    x = X.clone().requires_grad_()
    made = x.exp()
    made.register_hook(called.append)
    found = peftkit.cost(model, made, seconds=0)
    assert called == [] and found.backward_flops == peftkit.cost(model, x, seconds=0).backward_flops
    made.sum().backward()
    assert torch.equal(x.grad, made)


def test_a_batch_made_in_inference_mode():
    model = models.linear()
    with torch.inference_mode():
        x = X.clone()
        found = peftkit.cost(model, x, seconds=0.001)
    assert x.is_inference() and torch.equal(x, X)
    assert found.backward_flops == peftkit.cost(model, (x,), seconds=0).backward_flops > 0


@pytest.mark.parametrize(
    ("kind", "match", "given"),
    [
        (TypeError, "loss: a tensor to take gradients of, not a float; leave out .item", {"loss": lambda y: 0.5}),
        (ValueError, r"one number.*not a tensor of shape \(3, 4\); add .sum\(\)", {"loss": lambda y: y}),
        (TypeError, "loss: a function of what the model returns.*not a float", {"loss": 0.5}),
        (ValueError, "seconds: how long to time, or 0 to leave it out, not -1", {"seconds": -1}),
        (ValueError, "seconds: .*not inf", {"seconds": float("inf")}),
        (TypeError, "optimizer: a class such as torch.optim.AdamW or a function, not a str", {"optimizer": "adamw"}),
        (TypeError, "optimizer: made a list, which is no optimizer", {"optimizer": lambda ps: ps}),
    ],
)
def test_arguments_that_are_none(kind, match, given):
    with pytest.raises(kind, match=match):
        peftkit.cost(models.linear(), X, **{"seconds": 0, **given})
