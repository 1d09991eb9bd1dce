"""What peftkit promises of a trained adapter, checked on the model that was just trained."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import peftkit

Logits = Callable[[nn.Module, str], Tensor]
"""Runs a model over the texts that are compared; the string says what for."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    held: bool
    finding: str


def fingerprint(model: nn.Module) -> str:
    """A digest of every name and bit in the `state_dict`."""
    digest = hashlib.blake2b()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_adapter(
    model: nn.Module, fresh: Callable[[], nn.Module], adapter: Path, logits: Logits, before: str
) -> list[Check]:
    """Reload, merge, unmerge and eject.

    `before` is the fingerprint of `model` from before `inject`, which it has to end with.
    """
    trained = logits(model, "trained")
    return [
        _reloads(fresh(), adapter, logits, trained),
        _merges(model, logits, trained),
        _unmerges(model, logits, trained),
        _ejects(model, before),
    ]


def _reloads(model: nn.Module, adapter: Path, logits: Logits, trained: Tensor) -> Check:
    peftkit.load(model, adapter)
    model.eval()
    return _same_bits("reloaded into a fresh model", trained, logits(model, "reloaded"))


def _merges(model: nn.Module, logits: Logits, trained: Tensor) -> Check:
    exact = logits(copy.deepcopy(model).double(), "in fp64")
    peftkit.merge(model)
    error = _largest(logits(model, "merged") - exact)
    rounding = _largest(trained - exact)
    finding = f"{error:.1e} off fp64; unmerged {rounding:.1e}"
    return Check("merged into the weights", error <= 2 * rounding, finding)


def _unmerges(model: nn.Module, logits: Logits, trained: Tensor) -> Check:
    peftkit.unmerge(model)
    return _same_bits("unmerged again", trained, logits(model, "unmerged"))


def _ejects(model: nn.Module, before: str) -> Check:
    peftkit.eject(model)
    held = fingerprint(model) == before
    return Check("ejected", held, "the model that came, bit for bit" if held else "the model has changed")


def _same_bits(name: str, expected: Tensor, found: Tensor) -> Check:
    if torch.equal(expected, found):
        return Check(name, True, f"bit-equal on {len(expected)} texts")
    return Check(name, False, f"off by up to {_largest(expected - found):.1e}")


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item()
