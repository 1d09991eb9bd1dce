"""The changes that adapters make, in fp64, by their effect on a model in memory."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from storage_helpers import moved
from torch import Tensor, nn

import peftkit
from peftkit import Config

EPS = 2.0**-24  # of one rounding to fp32


def saved(model: nn.Module, path: Path, config: Config, *, seed: int = 1, name: str = "default") -> Path:
    """An adapter with values of its own, saved and taken off again."""
    peftkit.inject(model, config, name=name)
    moved(model, peftkit.parameters(model), seed)
    peftkit.save(model, path, name=name)
    peftkit.eject(model, name)
    return path


@torch.no_grad()
def changes(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """ΔW of each weight in fp64: what merging makes of zeros."""
    work = copy.deepcopy(model).double()
    for module in work.modules():  # each with weights of its own, tied or not
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.zeros_like(p))
    peftkit.load(work, path, check_base=False)
    peftkit.merge(work, keep_base=False)
    return {n: p.detach() for n, p in work.named_parameters() if p.any()}


def summed(parts: list[tuple[dict[str, Tensor], float]]) -> dict[str, Tensor]:
    names = dict.fromkeys(n for part, _ in parts for n in part)
    return {n: torch.stack([w * part[n] for part, w in parts if n in part]).sum(0) for n in names}


def far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of a weight, relative to its largest number."""
    missing = [n for n, t in expected.items() if n not in found and t.abs().max() > 1e-30]
    assert not missing and found.keys() <= expected.keys()
    return max(float((found[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in found)
