"""`cost` and `compare`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import api, ledger
from peftkit.costs.calling import Calls, Loss, checked, differentiate
from peftkit.costs.energy import NotMeasured, energy_of
from peftkit.costs.figures import BASE, Comparison, Cost
from peftkit.costs.flops import count_flops
from peftkit.costs.latency import Times, median, time_forwards
from peftkit.costs.memory import MakeOptimizer, bytes_of, optimizer_bytes, saved_bytes, stored_bytes
from peftkit.costs.unchanged import generators_kept, unchanged, without_hooks
from peftkit.ledger import Ledger
from peftkit.method import Config
from peftkit.storage import StorageError


def cost(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    optimizer: MakeOptimizer = torch.optim.AdamW,
    seconds: float = 2.0,
) -> Cost:
    """What `model` costs with the adapters that act; without any, what full fine-tuning costs.

    The model is afterwards as it was: parameters and their `.grad`, buffers, modes, random generators; also when
    something raises. So is the batch: its tensors have their values, and each call gets its own copy of what is no tensor,
    such as a cache. Hooks of parameters are not called. What trains is measured in train mode (a model in train mode is
    taken as it is, with modules that are in eval mode), and what is timed in eval mode. An autocast block around the call
    holds for all of it.

    Args:
        batch: what to call the model with: a mapping, `model(**batch)`, a tuple, `model(*batch)`, or a tensor.
        loss: of what the model returns, the number to take gradients of; its own `.loss` if it has one, else the sum of
            its floating tensors, which costs about the same.
        optimizer: a class, or a function of a list of parameters, whose state is counted. The list is of stand-ins, one
            for each trained parameter, and the optimizer is made of nothing else.
        seconds: how long the timing may take, and how long measuring energy may; a little more where a forward is
            slow, since each kind is called at least once. 0 leaves both out.

    Raises:
        TypeError: a batch of another kind or with what cannot be copied, a loss that is no function or returns no tensor.
        ValueError: adapters are merged, parameters without values, an output without anything to take gradients of, a
            loss of several numbers, reentrant checkpoints, an optimizer of other parameters, seconds below 0.
    """
    return _measured(model, batch, loss, optimizer, seconds, with_base=True)


def compare(
    model: nn.Module,
    configs: Mapping[str, Config | None],
    batch: Any,
    *,
    loss: Loss | None = None,
    optimizer: MakeOptimizer = torch.optim.AdamW,
    seconds: float = 2.0,
) -> Comparison:
    """What each config would cost on `model`: attached, measured as `cost` does, taken off.

    The model is afterwards as it was, also when something raises.

    Args:
        configs: by the name to show; None stands for full fine-tuning.
        batch, loss, optimizer, seconds: as in `cost`, `seconds` for each config.

    Raises:
        ValueError: the model has adapters; a config that does not fit, as in `inject`; and as `cost`.
    """
    if (found := ledger.find(model)) is not None:
        names = ", ".join(map(repr, found[1].attachments))
        raise ValueError(
            f"{names} is attached to this {type(model).__name__}; eject(model) first, or ask cost(model, batch)"
        )
    for name, config in configs.items():
        if not (config is None or isinstance(config, Config)):
            raise TypeError(
                f"configs[{name!r}]: one of peftkit's configs, or None for full fine-tuning, not {config!r}"
            )
    costs: dict[str, Cost] = {}
    for name, config in configs.items():
        with generators_kept(model), _attached(model, config):
            costs[name] = _measured(model, batch, loss, optimizer, seconds, with_base=False)
    return Comparison(MappingProxyType(costs))


@contextmanager
def _attached(model: nn.Module, config: Config | None) -> Iterator[None]:
    if config is None:
        yield
        return
    api.inject(model, config)
    try:
        yield
    finally:
        api.eject(model)


def _measured(
    model: nn.Module, batch: Any, given: Loss | None, optimizer: MakeOptimizer, seconds: float, *, with_base: bool
) -> Cost:
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds: how long to time, or 0 to leave it out, not {seconds!r}")
    calls, loss = Calls(model, batch), checked(given)
    inputs = calls.trained
    found = ledger.find(model)
    record = found[1] if found else None
    _check(model, record)
    adapters = _of_adapters(record)
    notes: dict[str, str] = {}
    with (
        unchanged(model, calls.tensors),
        without_hooks([*model.parameters(), *adapters]),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        if not model.training:
            model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        training = _training(model, calls, loss, optimizer, trained, inputs, notes)
        base = None
        base_forward = training["forward_flops"]
        if record is not None:
            with api.disabled(model):
                base_forward = count_flops(calls.prepared(), loss, ()).forward
                base = _fully_trained(model, calls, loss, optimizer, inputs, record, notes) if with_base else None
        times, joules = Times(), None
        if seconds > 0:
            joules = _energy(calls, loss, [*trained, *inputs], _device(model), seconds, notes)
            times = time_forwards(model, calls.prepared, seconds)
            if times.why_not and record is not None:
                notes["added_latency_merged"] = times.why_not
        stored = bytes_of(trained) if record is None else _stored(model, notes)
    alone = median(times.base)
    if base is not None:
        base = replace(base, base_seconds=alone, forward_seconds=alone, added_latency=None if alone is None else 0.0)
    return Cost(
        label=_label(record),
        trained=sum(p.numel() for p in trained),
        total=sum(p.numel() for p in {id(p): p for p in (*model.parameters(), *adapters)}.values()),
        stored_bytes=stored,
        **training,
        base_forward_flops=base_forward,
        base_seconds=alone,
        forward_seconds=median(times.acting) if record else alone,
        merged_seconds=median(times.merged),
        added_latency=times.added_acting() if record or alone is None else 0.0,
        added_latency_merged=times.added_merged(),
        joules=joules,
        base=base,
        notes=MappingProxyType(notes),
    )


def _check(model: nn.Module, record: Ledger | None) -> None:
    if record is not None and record.merged:
        names = ", ".join(map(repr, record.merged))
        raise ValueError(f"{names} is merged, so the base alone is not there to compare with; unmerge(model) first")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet; run one batch through the model first")
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device, and what a model costs is measured by running it; load it first"
            )


def _training(
    model: nn.Module,
    calls: Calls,
    loss: Loss,
    optimizer: MakeOptimizer,
    trained: Sequence[nn.Parameter],
    inputs: Sequence[Tensor],
    notes: dict[str, str],
) -> dict[str, Any]:
    """The figures of training `trained`, by their names in `Cost`; `inputs` are what else has a gradient."""
    flops = count_flops(calls.prepared(), loss, [*trained, *inputs])
    if flops.unknown:
        notes["flops"] = f"without those of {', '.join(flops.unknown)}, for which there is no formula"
    run = calls.prepared()
    return {
        "forward_flops": flops.forward,
        "backward_flops": flops.backward,
        "saved_bytes": saved_bytes(lambda: loss(run()), model),
        "optimizer_bytes": optimizer_bytes(trained, optimizer),
    }


def _fully_trained(
    model: nn.Module,
    calls: Calls,
    loss: Loss,
    optimizer: MakeOptimizer,
    inputs: Sequence[Tensor],
    record: Ledger,
    notes: dict[str, str],
) -> Cost | None:
    """The base alone, with all trained that was trainable before it was adapted; adapters are disabled around this."""
    adapters = {id(p) for p in _of_adapters(record)}
    with _unfrozen(record):
        base = [p for p in model.parameters() if id(p) not in adapters]
        trained = [p for p in base if p.requires_grad]
        if not trained:
            notes["base"] = "nothing of it was trainable before the adapters were attached"
            return None
        try:
            figures = _training(model, calls, loss, optimizer, trained, inputs, {})
        except torch.OutOfMemoryError:
            notes["base"] = "not counted, since one forward and backward of it do not fit into memory"
            return None
    return Cost(
        label=BASE,
        trained=sum(p.numel() for p in trained),
        total=sum(p.numel() for p in base),
        stored_bytes=bytes_of(trained),
        **figures,
        base_forward_flops=figures["forward_flops"],
        base_seconds=None,
        forward_seconds=None,
        merged_seconds=None,
        added_latency=None,
        added_latency_merged=None,
        joules=None,
    )


@contextmanager
def _unfrozen(record: Ledger) -> Iterator[None]:
    """What `inject` froze is trainable."""
    found = [p for module, name in record.frozen if (p := module._parameters.get(name)) is not None]
    turned = list({id(p): p for p in found if not p.requires_grad}.values())
    try:
        for p in turned:
            p.requires_grad = True
        yield
    finally:
        for p in turned:
            p.requires_grad = False


def _energy(
    calls: Calls,
    loss: Loss,
    of: Sequence[Tensor],
    device: torch.device,
    seconds: float,
    notes: dict[str, str],
) -> float | None:
    def step() -> None:
        differentiate(loss(calls()), of)

    try:
        return energy_of(step, device, seconds)
    except NotMeasured as reason:
        notes["joules"] = f"not measured: {reason}"
        return None


def _stored(model: nn.Module, notes: dict[str, str]) -> int | None:
    try:
        return stored_bytes(model)
    except (NotImplementedError, StorageError) as refusal:
        notes["stored_bytes"] = str(refusal)
        return None


def _of_adapters(record: Ledger | None) -> list[nn.Parameter]:
    return [p for a in record.attachments.values() for p in a.parameters()] if record else []


def _label(record: Ledger | None) -> str:
    if record is None:
        return BASE
    return " + ".join(record.attachments[n].config.method for n in record.switch.acting()) or "no adapter acts"


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
