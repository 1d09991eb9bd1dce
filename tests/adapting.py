"""Models with drawn adapters, and what is asked of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig
from peftkit.testing import models
from peftkit.testing.models import Case, output

CONFIG = LoRAConfig(r=2, alpha=4, targets="0")
CASES = {case.name: case for case in models.CASES}
each = pytest.mark.parametrize("case", CASES.values(), ids=str)


def adapted(case: Case, *names: str, **kwargs: Any) -> nn.Module:
    """The case's model with drawn adapters of these names, each with a scale of its own."""
    model = case.make()
    for i, name in enumerate(names or ("default",)):
        peftkit.inject(model, LoRAConfig(r=2, alpha=2 + i, targets=case.targets, **kwargs), name=name)
        draw(model, i)
    return model


def draw(model: nn.Module, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in peftkit.parameters(model):
            p.copy_(0.3 * torch.randn(p.shape, generator=g))


def zero(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    output(model, x).square().mean().backward()
    found = [p.grad for p in peftkit.parameters(model)]
    assert all(g is not None and g.abs().sum() > 0 for g in found)
    return [g.clone() for g in found if g is not None]


def close(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def added(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """What the adapter that CONFIG put at `path` adds, in fp64."""
    adapter = model.get_submodule(f"{path}.peftkit.default")
    a, b = adapter.lora_A.detach().double(), adapter.lora_B.detach().double()
    return 2.0 * x.double() @ a.t() @ b.t()


def pairs(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".peftkit." in n}
