"""LoRA+: what learns faster, and what does not."""

from __future__ import annotations

from typing import Any

import pytest
from small_helpers import ALL
from torch import nn

import peftkit
from peftkit import LoRAConfig
from peftkit.method import Config
from peftkit.testing import models


def rates(model: nn.Module, **kwargs: Any) -> dict[str, float]:
    names = {id(p): n.replace(".peftkit.default", "") for n, p in model.named_parameters()}
    groups = peftkit.param_groups(model, lr=1e-3, weight_decay=0.1, **kwargs)
    assert all(g["weight_decay"] == 0.1 for g in groups)
    found = {names[id(p)]: g["lr"] for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups) == len(peftkit.parameters(model))
    return found


def test_lora_plus_speeds_up_the_left_side_of_products_alone():
    model = models.Tied()
    model.norm = nn.LayerNorm(6)
    peftkit.inject(model, LoRAConfig(r=2, targets=["embed", "mid"], also_train=["norm"]))
    found = rates(model, ratio=16.0)
    assert found.pop("mid.lora_B") == pytest.approx(16e-3)
    assert set(found.values()) == {1e-3}
    assert {"mid.lora_A", "embed.lora_A", "embed.lora_B"} < set(found) and any("norm" in name for name in found)
    assert set(rates(model).values()) == {1e-3}


@pytest.mark.parametrize("config", [c for c in ALL if not isinstance(c, LoRAConfig)], ids=lambda c: c.method)
def test_a_ratio_that_would_do_nothing_is_an_error(config: Config):
    model = nn.Sequential(nn.Linear(6, 8))
    peftkit.inject(model, config)
    assert len(rates(model)) == len(peftkit.parameters(model))
    with pytest.raises(ValueError, match="ratio=16.0 would do nothing"):
        peftkit.param_groups(model, lr=1e-3, ratio=16.0)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"lr": float("inf")}, {"lr": 1.0, "ratio": float("nan")}])
def test_rates_that_make_no_sense(wrong):
    model = nn.Sequential(nn.Linear(6, 8))
    peftkit.inject(model, LoRAConfig(r=1, targets="0"))
    with pytest.raises(ValueError, match="lr and ratio are positive"):
        peftkit.param_groups(model, **wrong)
