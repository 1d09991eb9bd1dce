"""Folding adapters into the weights, and back to the same bits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from peftkit.graft import why_not_graft
from peftkit.holder import Graft, graft_of, versions
from peftkit.ledger import Attachment, Ledger
from peftkit.method import Adapter, NotMergeable, own_parameters
from peftkit.sites import Site, walk

Job = tuple[Site, Graft, str, Adapter]  # where, what holds it, the adapter's key there, the adapter


def merge(model: nn.Module, ledger: Ledger, attachments: Sequence[Attachment], *, keep: bool) -> None:
    """Add the attachments to the weights of their hosts; with `keep`, after copying those.

    Raises:
        NotMergeable: an adapter that no weight can hold, a weight that cannot be written, or one that other modules
            share; nothing was changed.
        ValueError: values that are not finite.
    """
    jobs = list(_jobs(attachments))
    _check(model, jobs)
    if not keep:
        ledger.check_classes()
    done: list[Graft] = []
    writers = Counter((id(made), name) for _, made, _, adapter in jobs for name in adapter.merges)
    try:
        for site, made, key, adapter in jobs:
            done.append(made)
            for name in adapter.merges:
                target = _tensor(site.module, name)
                if name not in made.kept:
                    # what changes relative to the base must see it as it was, also after another was merged
                    several = writers[id(made), name] > 1
                    made.kept[name] = target.detach().clone() if keep or several else target
                adapter.merge_(name, target, made.kept[name])
            made.merged[key] = versions(adapter)
    except BaseException:
        if keep:
            _restore(jobs, done)
        raise
    for attachment in attachments:
        attachment.rest()
    ledger.merged = (*ledger.merged, *(a.name for a in attachments))
    if not keep:
        for made in done:
            made.kept.clear()
            made.merged.clear()
        for attachment in attachments:
            ledger.merged = tuple(n for n in ledger.merged if n != attachment.name)
            ledger.detach(model, attachment)


def unmerge(ledger: Ledger) -> None:
    """Give every merged weight its own bits back."""
    attachments = [ledger.attachments[n] for n in ledger.merged]
    jobs = list(_jobs(attachments))
    _restore(jobs, [made for _, made, _, _ in jobs])
    ledger.merged = ()
    for attachment in attachments:
        if attachment.name in ledger.switch.names:
            attachment.wake()


def _jobs(attachments: Sequence[Attachment]) -> Iterator[Job]:
    for attachment in attachments:
        for name, adapter in attachment.adapters.items():
            site = attachment.sites[name]
            made = graft_of(site.module)
            assert made is not None
            yield site, made, attachment.key(site), adapter


def _restore(jobs: Sequence[Job], done: Sequence[Graft]) -> None:
    touched = {id(made) for made in done}
    for site, made, key, _ in reversed(jobs):  # of tied weights the first copy alone is of the base
        if id(made) in touched:
            for name, value in made.kept.items():
                with torch.no_grad():
                    _tensor(site.module, name).copy_(value)
            made.kept.clear()
            made.merged.pop(key, None)


def _tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name below `module`, without going through a grafted class."""
    path, _, last = name.rpartition(".")
    holder = module.get_submodule(path)
    value = holder._parameters.get(last)
    if value is None:
        value = holder._buffers[last]
    assert value is not None
    return value


def _check(model: nn.Module, jobs: Sequence[Job]) -> None:
    written: dict[int, bool] = {}  # by storage: whether all that is written there takes the place of what was
    for site, _, _, adapter in jobs:
        reason = why_not_graft(site.module) or adapter.why_not_merge()
        if reason is not None:
            raise NotMergeable(f"{type(adapter).__name__} at {site.name!r} cannot be merged: {reason}")
        for name in adapter.merges:
            at = _storage(_tensor(site.module, name))
            written[at] = written.get(at, True) and adapter.replaces
    _check_finite(jobs)
    writers = {(id(site.module), name) for site, _, _, adapter in jobs for name in adapter.merges}
    holders: dict[int, list[tuple[str, bool]]] = {}
    for site in walk(model):
        if site.part is None:
            for name, value in site.module._parameters.items():
                if value is not None and (at := _storage(value)) in written:
                    path = f"{site.name}.{name}" if site.name else name
                    holders.setdefault(at, []).append((path, (id(site.module), name) in writers))
    for at, found in holders.items():
        if len(found) > 1 and not written[at]:
            names = " and ".join(repr(path) for path, _ in found)
            raise NotMergeable(
                f"{names} share one weight, so merging into it would change both; give one its own first, as in "
                f"module.weight = nn.Parameter(module.weight.detach().clone())"
            )


def _storage(tensor: Tensor) -> int:
    if tensor.is_meta or type(tensor) not in (nn.Parameter, Tensor):
        return id(tensor)
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _check_finite(jobs: Sequence[Job]) -> None:
    for site, _, key, adapter in jobs:
        for value in own_parameters(adapter):
            if not _finite(value):
                name = next(n for n, p in adapter.named_parameters() if p is value)
                raise ValueError(
                    f"adapter {key!r} at {site.name!r} has values in {name} that are not finite; nothing merged"
                )


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point() or value.is_meta:
        return True
    # the sum tells in one pass; it can also overflow, and then each number is asked
    return math.isfinite(value.detach().sum()) or bool(torch.isfinite(value).all())
