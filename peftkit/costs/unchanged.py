"""A model that is measured and is then as it was."""

from __future__ import annotations

import copy
import operator
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter


@contextmanager
def unchanged(model: nn.Module, tensors: Sequence[Tensor] = ()) -> Iterator[None]:
    """Whatever the block does with `model`, afterwards its modules hold what they held, however the block ends.

    Given back are the attributes of every module, `training` among them, what is in those that are lists, dicts, sets or
    deques (not what is in these in turn), the values of its buffers and of its other tensors, those of `tensors`, and the
    states of the generators of torch, Python and NumPy. Parameters are left to the block, but for those that a forward
    writes to (an embedding's with `max_norm`).
    """
    modules = list(model.modules())
    attributes = [(m, dict(vars(m))) for m in modules]
    held = [v for _, found in attributes for v in found.values() if isinstance(v, list | dict | set | deque)]
    contents = [(container, copy.copy(container)) for container in held]
    values = {
        id(t): (t, t.detach().clone())
        for t in (*tensors, *_written(modules))
        if t.layout is torch.strided and not t.is_meta
    }
    # autograd has saved some of these values for losses that were computed before
    versions = tuple(t for t, _ in values.values() if not t.is_inference())
    with _unsafe_preserve_version_counter(versions), generators_kept(model):
        try:
            yield
        finally:
            for module, before in attributes:
                now = vars(module)
                for name in now.keys() - before.keys():
                    del now[name]
                now.update(before)
            for container, content in contents:
                _refill(container, content)
            with torch.inference_mode(), torch.no_grad():
                for tensor, value in values.values():
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)


@contextmanager
def without_hooks(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Hooks of the parameters themselves are not called: some step an optimizer, and write to the parameter.

    `torch.autograd.grad` calls those of `register_hook` on what it differentiates for.
    """
    held = [(p, p._backward_hooks, p._post_accumulate_grad_hooks) for p in {id(p): p for p in parameters}.values()]
    try:
        for p, *_ in held:
            p._backward_hooks = None
            p._post_accumulate_grad_hooks = None  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        for p, of_backward, of_accumulation in held:  # the same dicts, which the handles of the hooks refer to
            p._backward_hooks, p._post_accumulate_grad_hooks = of_backward, of_accumulation


@contextmanager
def generators_kept(model: nn.Module) -> Iterator[None]:
    """The generators of torch, Python and NumPy are afterwards where they were, on the devices of `model` too."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state that others draw from
    devices: dict[str, set[int]] = {}
    for p in model.parameters():
        if p.device.index is not None and p.device.type not in ("cpu", "meta"):
            devices.setdefault(p.device.type, set()).add(p.device.index)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=()))
            for kind, indices in devices.items():
                stack.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=kind))
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def _refill(container: Any, content: Any) -> None:
    if len(container) == len(content) and all(map(operator.is_, _flat(container), _flat(content))):
        return
    container.clear()
    if isinstance(container, dict | set):
        container.update(content)
    else:
        container.extend(content)


def _flat(container: Any) -> Iterable[Any]:
    return chain.from_iterable(container.items()) if isinstance(container, dict) else container


def _written(modules: list[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        for held in vars(module).values():  # buffers are in one of these dicts
            parts = (
                held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple | deque) else [held]
            )
            yield from (t for t in parts if isinstance(t, Tensor) and not isinstance(t, nn.Parameter))
        if getattr(module, "max_norm", None) is not None:
            yield from (p for p in module._parameters.values() if p is not None)
