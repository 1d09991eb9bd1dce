"""What a schedule needs of an optimizer and of a wrapped model, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_FLAT = {
    "FullyShardedDataParallel": "FSDP1 keeps the parameters of a unit in one flat tensor, which trains or rests as a whole; "
    "shard with torch.distributed.fsdp.fully_shard",
    "DeepSpeedEngine": "DeepSpeed keeps flat partitions of its own, which a switch does not reach",
}


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer itself, out of what accelerate or Lightning put around it.

    Raises:
        TypeError: it is none, or one whose state is not kept by parameter.
    """
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
            trained = [p for p in group["params"] if p.grad is not None]
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


def check_held(optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter], who: str) -> None:
    """Refuse an optimizer that would silently never train what the schedule turns on.

    Raises:
        ValueError: naming a parameter that it lacks.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in trained.items() if id(p) not in held]
    if missing:
        raise ValueError(
            f"{who} turns {len(trained)} base parameters on and off, and the optimizer lacks {len(missing)} of them, "
            f"such as {missing[0]!r}: they would be switched on and never trained. Make the optimizer from all, "
            f"{type(optimizer).__name__}(model.parameters(), …), whatever is on at the moment; an optimizer with copies of "
            "its own (master weights, flat partitions) cannot be used"
        )


def is_quantised(p: Tensor) -> bool:
    """Whether it is stored in a form that has no gradient."""
    return not (p.is_floating_point() or p.is_complex()) or type(p).__name__ in {"Params4bit", "Int8Params"}
