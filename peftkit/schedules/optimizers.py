"""What a schedule needs of an optimizer and of a wrapped model, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peftkit.blocks import linear_sizes

_FLAT = {
    "FullyShardedDataParallel": "FSDP1 keeps the parameters of a unit in one flat tensor, which trains or rests as a whole; "
    "shard with torch.distributed.fsdp.fully_shard",
    "DeepSpeedEngine": "DeepSpeed keeps flat partitions of its own, which a switch does not reach",
}


def plain_optimizers(given: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers themselves, out of what accelerate or Lightning put around them; one or a sequence is given.

    Raises:
        TypeError: there is none, or one whose state is not kept by parameter.
    """
    found = [_plain(one) for one in (given if isinstance(given, list | tuple) else (given,))]
    if not found:
        raise TypeError("optimizer: a torch.optim.Optimizer or several, not an empty sequence")
    return found


def accumulates() -> bool:
    """Whether accelerate, where it is in use, is between two steps of an accumulation."""
    accelerate = sys.modules.get("accelerate.state")
    return accelerate is not None and not accelerate.GradientState().sync_gradients


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: a torch.optim.Optimizer, not {type(optimizer).__name__}")
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS keeps one state for all parameters together, so none of it can be dropped; use another")
    if "ZeroRedundancyOptimizer" in names:
        raise TypeError(
            "ZeroRedundancyOptimizer keeps its state on the rank that owns a parameter, where a switch does not reach it; "
            "shard with torch.distributed.fsdp.fully_shard"
        )
    if getattr(optimizer, "is_paged", False):
        raise TypeError(
            "a paged optimizer of bitsandbytes keeps every state it has made; take the one that is not paged"
        )
    for group in optimizer.param_groups:
        if _is_fused_momentum(optimizer, group) and group["dampening"]:
            raise TypeError(
                "torch's fused SGD cannot begin with one parameter later than others where there is dampening"
            )
    return optimizer


def fill_in(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters that have just come on what torch's fused SGD expects of all where it has any: a buffer of momentum.

    Zeros are what it would begin with.
    """
    for group in optimizer.param_groups:
        if _is_fused_momentum(optimizer, group):
            trained = [p for p in group["params"] if p.requires_grad]  # a closure's gradients come later
            lacking = [p for p in trained if optimizer.state[p].get("momentum_buffer") is None]
            for p in lacking if len(lacking) < len(trained) else ():
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _is_fused_momentum(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    return isinstance(optimizer, torch.optim.SGD) and bool(group["fused"] and group["momentum"])


def check_wrapped(model: nn.Module, trained: Mapping[str, nn.Parameter], who: str) -> None:
    """Refuse what would ignore a parameter that is turned on, or wait for one that is turned off.

    Args:
        trained: the base parameters that the schedule turns on and off.

    Raises:
        ValueError: naming what is in the way.
    """
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _FLAT:
                raise ValueError(f"{who} cannot switch parameters here: {_FLAT[cls.__name__]}")
        if isinstance(module, DistributedDataParallel):
            _check_ddp(module, trained, who)
    for name, p in trained.items():
        if hasattr(p, "ds_id"):
            raise ValueError(f"{who} cannot switch {name!r}: {_FLAT['DeepSpeedEngine']}")


def _check_ddp(ddp: DistributedDataParallel, trained: Mapping[str, nn.Parameter], who: str) -> None:
    if ddp.static_graph or not ddp.find_unused_parameters:
        found = "static_graph=True" if ddp.static_graph else "find_unused_parameters=False"
        raise ValueError(
            f"DistributedDataParallel with {found} waits for the gradients of what {who} has turned off; "
            "make it with find_unused_parameters=True"
        )
    frozen = [name for name, p in trained.items() if not p.requires_grad]
    if frozen:
        raise ValueError(
            f"DistributedDataParallel sums the gradients of what was on when it was made, and {len(frozen)} parameters that "
            f"{who} turns on are off, {frozen[0]!r} among them: each rank would train its own. Turn them on first, "
            "model.requires_grad_(True), and then wrap the model"
        )


def check_held(optimizers: Sequence[torch.optim.Optimizer], trained: Mapping[str, nn.Parameter], who: str) -> None:
    """Refuse optimizers that would silently never train what the schedule turns on.

    Raises:
        ValueError: naming a parameter that they lack.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in trained.items() if id(p) not in held]
    if missing:
        raise ValueError(
            f"{who} turns {len(trained)} base parameters on and off, and the optimizer lacks {len(missing)} of them, "
            f"such as {missing[0]!r}: they would be switched on and never trained. Make it from all, "
            "AdamW(model.parameters(), …), whatever is on at the moment, or give all the optimizers that hold them, "
            "[Muon(…), AdamW(…)]; one with copies of its own (master weights, flat partitions) cannot be used"
        )


def is_quantised(module: nn.Module, trained: Collection[int]) -> bool:
    """Whether it is a Linear without a weight that can have a gradient; `trained` are ids of parameters that have one."""
    if linear_sizes(module) is None:
        return False
    held = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
    return not any(id(p) in trained or (p.is_floating_point() and _is_plain(p)) for p in held)


def _is_plain(p: Tensor) -> bool:
    kind = type(p.data)
    return kind in (Tensor, nn.Parameter) or kind.__name__ == "DTensor"
