"""What training holds in memory beside the weights, and what is written to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer

from peftkit import ledger, storage

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


class OfOthers(ValueError):
    """An optimizer that was not made of the parameters it was given."""


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their numbers, whatever storage these share with others."""
    return sum(t.numel() * t.element_size() for t in tensors)


def saved_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """What `run()` leaves for backward: every storage once and whole, without those of the model's parameters and buffers.

    Everything that autograd saves goes through these hooks, custom functions' `save_for_backward` included. A storage that
    was let go meanwhile, as checkpoints do, does not count.
    """
    held = {_where(t) for t in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided and (where := _where(tensor)) not in held:
            kept = tensor.untyped_storage()
            found[where] = StorageWeakRef(kept), kept.nbytes()
        return tensor.detach()  # an output would hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    count = sum(size for ref, size in found.values() if not ref.expired())
    del result  # what it holds had to be there while it was counted
    return count


def _where(tensor: Tensor) -> int:
    """The address of the storage's record, which stays taken for as long as something refers to it, weakly too."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def optimizer_bytes(trained: Sequence[nn.Parameter], make: MakeOptimizer) -> int:
    """The tensors in the `state_dict()` of `make(trained)` after its first step.

    The step is taken on stand-ins of the same shapes and dtypes, on the meta device, where they take no memory; where the
    optimizer cannot do that, on zeros on the parameters' own device, one parameter at a time.

    Raises:
        TypeError: `make` is no function, or makes no optimizer. ValueError: an optimizer of other parameters.
    """
    if not callable(make):
        raise TypeError(f"optimizer: a class such as torch.optim.AdamW or a function, not a {type(make).__name__}")
    if not trained:
        return 0
    try:
        return _state_bytes([_stand_in(p, "meta") for p in trained], make)
    except OfOthers:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return sum(_state_bytes([_stand_in(p, p.device)], make) for p in trained)


def _stand_in(p: nn.Parameter, device: torch.device | str) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=device))
    made.grad = torch.zeros_like(made)
    return made


def _state_bytes(stand_ins: list[nn.Parameter], make: MakeOptimizer) -> int:
    optimizer = make(stand_ins)
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer: made a {type(optimizer).__name__}, which is no optimizer: it has no param_groups")
    known = {id(p) for p in stand_ins}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise OfOthers(
            f"optimizer: the {type(optimizer).__name__} is of other parameters than those in the list that the function is "
            "given, and a step would change them; make it of that list, as in lambda ps: torch.optim.SGD(ps, momentum=0.9). "
            "Groups that differ in their learning rates, as LoRA+'s do, have the same state as one"
        )
    optimizer.step()
    return _tensor_bytes(optimizer.state_dict()["state"])


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return bytes_of([value])
    if isinstance(value, Mapping):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, tuple | list) else 0


def stored_bytes(model: nn.Module) -> int:
    """The tensor files, headers and all, that `peftkit.save` would write for the adapters that act; nothing is written.

    Raises:
        NotImplementedError: a method that cannot be saved. StorageError: an adapter that cannot be.
    """
    root, record = ledger.require(model)
    return sum(storage.stored_bytes(root, a) for a in record.named(record.switch.acting()))
