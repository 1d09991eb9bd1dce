"""Calling a model with a batch, and the number that its gradients are of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Any], Tensor]


def calling(model: nn.Module, batch: Any) -> Callable[[], Any]:
    """A call of `model`: `model(**batch)` for a mapping, `model(*batch)` for a tuple or list, `model(batch)` for a tensor.

    Raises:
        TypeError: a batch of another kind.
    """
    if isinstance(batch, Mapping):
        return functools.partial(model, **batch)
    if isinstance(batch, tuple | list):
        return functools.partial(model, *batch)
    if isinstance(batch, Tensor):
        return functools.partial(model, batch)
    raise TypeError(
        f"batch: a mapping for model(**batch), a tuple for model(*batch) or a tensor, not a {type(batch).__name__}"
    )


def loss_of(output: Any) -> Tensor:
    """The output's own `loss`, else the sum of its floating tensors.

    Raises:
        ValueError: there is neither.
    """
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own.sum()
    found = [t.sum() for t in _tensors(output) if t.is_floating_point()]
    if not found:
        raise ValueError(
            f"loss: the model returned a {type(output).__name__}, in which there is neither a loss nor a floating tensor; "
            "give loss=, a function of what the model returns"
        )
    return torch.stack([t.to(found[0]) for t in found]).sum() if len(found) > 1 else found[0]


def differentiate(loss: Tensor, of: Sequence[Tensor]) -> None:
    """Compute the gradients of `of`, and forget them: no `.grad` changes, and no hook that steps an optimizer is called.

    Raises:
        ValueError: a reentrant checkpoint, whose gradients come about in another backward that is not called then.
    """
    if not of or not loss.requires_grad:
        return
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node.name().startswith("CheckpointFunctionBackward"):
                raise ValueError(
                    "the model uses reentrant checkpoints, through which no gradient can be had without changing .grad; "
                    "use_reentrant=False computes the same, in transformers by "
                    'gradient_checkpointing_enable({"use_reentrant": False})'
                )
            nodes += [following for following, _ in node.next_functions]
    torch.autograd.grad(loss, of, allow_unused=True)


def trained_in(batch: Any) -> list[Tensor]:
    """The tensors of a batch of which backward computes gradients too."""
    return [t for t in _tensors(batch) if t.requires_grad]


def _tensors(output: Any) -> Iterator[Tensor]:
    """Those in the output and in its mappings, tuples and lists; what else it holds, such as a cache, is no result."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
