"""A tiny model and data for the trainers of other packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig
from peftkit.testing.models import llama

CONFIG = LoRAConfig(r=2, alpha=4, dropout=0.2)


class Sentences(torch.utils.data.Dataset):
    """Random ids, the same ones always."""

    def __init__(self, count: int = 24, seed: int = 0):
        self.ids = torch.randint(1, 31, (count, 6), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def adapted(*configs: LoRAConfig, names: tuple[str, ...] = ("default",), **kwargs: Any) -> nn.Module:
    """A model with adapters of these names; all of them act."""
    model = llama(**kwargs)
    torch.manual_seed(3)
    for name, config in zip(names, configs or (CONFIG,) * len(names), strict=True):
        peftkit.inject(model, config, name=name)
    peftkit.activate(model, *names)
    return model


def states(model: nn.Module, adapters: bool) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in model.state_dict().items() if (".peftkit." in k) is adapters}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
