"""A model that is measured and is then as it was."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever the block does with `model`, afterwards its modules hold what they held, however the block ends.

    Given back are the attributes of every module, `training` among them, its buffers and their values, and the states of the
    generators of torch, Python and NumPy. Parameters are left to the block, but for those that a forward writes to (an
    embedding's with `max_norm`).
    """
    modules = list(model.modules())
    attributes = [(m, dict(vars(m)), dict(m._buffers)) for m in modules]
    values = {id(t): (t, t.detach().clone()) for t in _written(modules)}
    with generators_kept(model):
        try:
            yield
        finally:
            for module, before, buffers in attributes:
                now = vars(module)
                for name in now.keys() - before.keys():
                    del now[name]
                now.update(before)
                module._buffers.clear()
                module._buffers.update(buffers)
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
            p._backward_hooks = p._post_accumulate_grad_hooks = None
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


def _written(modules: list[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from (b for b in module._buffers.values() if b is not None)
        if getattr(module, "max_norm", None) is not None:
            yield from (p for p in module._parameters.values() if p is not None)
