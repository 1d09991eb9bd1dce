"""Calling a model with a batch, and the number that its gradients are of."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Any], Tensor]


class Calls:
    """Calls of `model`: `model(**batch)` for a mapping, `model(*batch)` for a tuple or list, `model(batch)` for a tensor.

    Each call has its own copy of whatever in the batch is no tensor, such as a cache that grows. Tensors are shared.

    Attributes:
        tensors: those of the batch as the calls get them: without the hooks and the history of the user's, and with the
            same memory, but for copies of those that were made in inference mode, which autograd refuses.

    Raises:
        TypeError: a batch of another kind.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self._model, self._args, self._kwargs = model, (), {}
        if isinstance(batch, Mapping):
            self._kwargs = dict(batch)
        elif isinstance(batch, tuple | list):
            self._args = tuple(batch)
        elif isinstance(batch, Tensor):
            self._args = (batch,)
        else:
            raise TypeError(
                "batch: a mapping for model(**batch), a tuple for model(*batch) or a tensor, "
                f"not a {type(batch).__name__}"
            )
        with torch.inference_mode(False):
            self._own = {id(t): _own(t) for t in _tensors([self._args, self._kwargs])}
        self.tensors = list(self._own.values())

    @property
    def trained(self) -> list[Tensor]:
        """The tensors of the batch of which backward computes gradients too."""
        return [t for t in self.tensors if t.requires_grad]

    def prepared(self) -> Callable[[], Any]:
        """One call, with its copies made.

        Raises:
            TypeError: something in the batch that cannot be copied.
        """
        memo: dict[int, Any] = dict(self._own)  # what is in it is taken from it
        args = [_copied(f"batch[{i}]", part, memo) for i, part in enumerate(self._args)]
        kwargs = {name: _copied(f"batch[{name!r}]", part, memo) for name, part in self._kwargs.items()}
        return functools.partial(self._model, *args, **kwargs)

    def __call__(self) -> Any:
        return self.prepared()()


def _own(tensor: Tensor) -> Tensor:
    made = tensor.clone() if tensor.is_inference() else tensor
    return made.detach().requires_grad_() if made.requires_grad else made


def _copied(where: str, part: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(part, memo)
    except Exception as error:
        raise TypeError(
            f"{where}: a {type(part).__name__} that cannot be copied ({error}); the model is called several times, and "
            "each call gets its own copy of what is no tensor, so that none changes what the next one gets"
        ) from error


def checked(loss: Loss | None) -> Loss:
    """`loss`, or what stands for it, with an error that helps where it returns no number to take gradients of.

    Raises:
        TypeError: no function; later, a result that is no tensor. ValueError: later, a result of several numbers.
    """
    if loss is None:
        return loss_of
    if not callable(loss):
        raise TypeError(
            f"loss: a function of what the model returns, such as lambda output: output.loss, not a {type(loss).__name__}"
        )

    def number(output: Any) -> Tensor:
        found = loss(output)
        if not isinstance(found, Tensor):
            raise TypeError(
                f"loss: a tensor to take gradients of, not a {type(found).__name__}; leave out .item() and float()"
            )
        if found.numel() != 1:
            raise ValueError(
                f"loss: one number to take gradients of, not a tensor of shape {tuple(found.shape)}; add .sum() or .mean()"
            )
        return found

    return number


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


def _tensors(found: Any) -> Iterator[Tensor]:
    """Those in it and in its mappings, tuples and lists; what is in other objects, such as a cache, is theirs."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping | tuple | list):
        for part in found.values() if isinstance(found, Mapping) else found:
            yield from _tensors(part)
