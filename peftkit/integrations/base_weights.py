"""Which tensors of a model are the base's and which the adapters', for what writes the ones and not the others."""

from __future__ import annotations

from torch import Tensor, nn

from peftkit import ledger
from peftkit.holder import CHILD


def of_adapter(key: str) -> bool:
    """Whether a key of a model's `state_dict` is a tensor of an adapter."""
    return f".{CHILD}." in f".{key}"


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` without adapters."""
    return {key: t for key, t in model.state_dict().items() if not of_adapter(key)}


def check_base_frozen(model: nn.Module) -> None:
    """Refuse a base that is trained, where only adapters are kept.

    Raises:
        ValueError: no adapter is attached, or naming a parameter of the base that is trained.
    """
    ledger.require(model)
    for name, p in model.named_parameters():
        if p.requires_grad and not of_adapter(name):
            raise ValueError(
                f"{name} is trained and belongs to no adapter, so an adapter's checkpoint would lose it; inject on the "
                "whole model and name its module in also_train, set its requires_grad to False, or keep whole checkpoints"
            )
