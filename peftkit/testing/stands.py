"""A model with an example of a method attached, for the laws to look at."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkit import api
from peftkit.merging import NotMergeable
from peftkit.method import Config
from peftkit.targets import TargetError
from peftkit.testing.models import Case

_NOWHERE = ("reads the weight", "no Linear", "matches no module", "but it ")


@dataclasses.dataclass
class Stand:
    """A model with one example of a method attached, and the model as it was.

    Attributes:
        model: with the adapter, in eval mode; its values are those at attach.
        before: a copy of the model without it.
        x: an input.
        config: what was attached, with targets that the model has.
    """

    model: nn.Module
    before: nn.Module
    x: Tensor
    config: Config

    def draw(self, name: str = "default", scale: float = 0.3, seed: int = 5) -> None:
        """Values as after training: nothing is zero any more."""
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in api.parameters(self.model, name):
                p.add_(scale * torch.randn(p.shape, generator=g).to(p))

    def adapters(self) -> list[Any]:
        """Every adapter that hangs on the model."""
        return [a for _, graft in grafts(self.model) for a in graft.children()]

    def merge(self) -> None:
        """Merge, or skip the law where the method or a shared weight forbids it."""
        try:
            api.merge(self.model)
        except NotMergeable as refusal:
            promised = all(a.merges and a.why_not_merge() is None for a in self.adapters())
            if promised and "share one weight" not in str(refusal):
                raise
            pytest.skip(str(refusal))


def fitted(config: Config, case: Case) -> Config:
    """`config` with the targets of `case`, unless it names its own."""
    targets = case.targets if config.targets == "all-linear" else config.targets
    rank: Any = getattr(config, "r", None)
    if case.name == "conv2d" and isinstance(rank, int):
        # of its grouped convolution, a rank counts both groups together
        return dataclasses.replace(config, targets=targets, r={"*": rank, "2": 2 * rank})  # type: ignore[call-arg]
    return dataclasses.replace(config, targets=targets)


def attach(model: nn.Module, config: Config) -> str | None:
    """Inject; or say why `config` has no place in `model`. Any other error is raised."""
    try:
        api.inject(model, config)
    except TargetError as refusal:
        if not any(words in str(refusal) for words in _NOWHERE):
            raise
        return f"{type(config).__name__} says: {refusal}"
    except ValueError as refusal:
        if "largest rank" not in str(refusal):
            raise
        return f"{type(config).__name__} says: {refusal}"
    return None


def attached(case: Case, config: Config, model: nn.Module) -> Config:
    """Inject what suits `case`, and give it; or skip the law."""
    config = fitted(config, case)
    if (reason := attach(model, config)) is not None:
        pytest.skip(reason)
    return config


def refusal(case: Case, config: Config) -> str | None:
    """Why `config` cannot be attached to `case`; None where it can."""
    if not case.there():
        return f"{case.needs} is not installed"
    return attach(case.make(), fitted(config, case))


def made(case: Case) -> nn.Module:
    """The case's model, or skip the law where its package is missing."""
    if not case.there():
        pytest.skip(f"{case.needs} is not installed")
    torch.manual_seed(0)
    return case.make()


def stand(case: Case, config: Config, dtype: torch.dtype) -> Stand:
    """`config` attached to `case`, or skip the law."""
    before = made(case).to(dtype)
    model, x = copy.deepcopy(before), case.x()
    config = attached(case, config, model)
    # torch folds a product with a non-contiguous input differently where the weight is trained, which moves last bits
    before.requires_grad_(False)
    return Stand(model, before, x.to(dtype) if x.is_floating_point() else x, config)


def grafts(model: nn.Module) -> list[tuple[str, Any]]:
    """What holds the adapters of each adapted module, by the module's path."""
    return [(path, m.peftkit) for path, m in model.named_modules() if hasattr(type(m), "__grafted__")]


def changed(model: nn.Module) -> set[str]:
    """Names of the parameters that adapters change where they are read."""
    return {
        f"{path}.{name}" for path, graft in grafts(model) for adapter in graft.children() for name in adapter.merges
    }


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    """Whether `b` holds every tensor of `a`, bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(t, right[k]) for k, t in left.items())
