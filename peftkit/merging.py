"""Folding adapters into the weights, and back to the same bits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from peftkit.graft import why_not_graft
from peftkit.holder import Graft, graft_of, versions
from peftkit.ledger import Attachment, Ledger
from peftkit.method import Adapter, NotMergeable, own_parameters
from peftkit.sites import Site, walk

Earlier = Mapping[int, set[str]]  # by graft: the weights that held adapters before
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
        _check_left(ledger, attachments, jobs)
    # for good, a copy is needed meanwhile where a change is relative to a weight that others have changed by then
    relative = {(id(made), name) for _, made, _, adapter in jobs for name in adapter.merges if adapter.reads_base}
    relative &= _several(jobs)
    earlier: Earlier = {id(made): set(made.kept) for _, made, _, _ in jobs}  # weights that hold adapters merged before
    held: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    done: list[Graft] = []
    try:
        for site, made, key, adapter in jobs:
            done.append(made)
            for name in adapter.merges:
                target = _tensor(site.module, name)
                if name in earlier[id(made)] and (id(made), name) not in held:
                    held[id(made), name] = target, target.detach().clone()
                _merge_one(made, adapter, name, target, copied=keep or (id(made), name) in relative)
            made.merged[key] = versions(adapter)
    except BaseException:
        if keep:
            _take_back(jobs, done, earlier, held.values())
        else:
            _settle(ledger, attachments, jobs)
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


def _merge_one(made: Graft, adapter: Adapter, name: str, target: Tensor, *, copied: bool) -> None:
    """Fold one adapter into one weight; the first one there keeps the weight as it is without any, as a copy or itself."""
    if name not in made.kept:
        made.kept[name] = target.detach().clone() if copied else target
    adapter.merge_(name, target, made.kept[name])


def checked(model: nn.Module, attachments: Sequence[Attachment]) -> list[Job]:
    """What merging for good would do, in its order, for `fold` to do a weight at a time.

    Raises:
        As `merge`.
    """
    jobs = list(_jobs(attachments))
    _check(model, jobs)
    return jobs


@torch.no_grad()
def fold(jobs: Sequence[Job], name: str, target: Tensor, weights: Sequence[float]) -> None:
    """Fold into `target`, the parameter `name` of one module, each job's change of it, times its weight.

    With weights of 1 the result is that of `merge` with `keep_base=False`. The module must hold `target`, as it is without
    any adapter; afterwards nothing is merged, as far as the module knows.
    """
    made = jobs[0][1]
    copied = len(jobs) > 1 and any(adapter.reads_base for *_, adapter in jobs)
    try:
        for (_, _, key, adapter), weight in zip(jobs, weights, strict=True):
            if weight == 1:
                _merge_one(made, adapter, name, target, copied=copied)
                made.merged[key] = versions(adapter)
            else:
                made.merged[key] = versions(adapter)  # before: what changes, the zeros, is not what the base is
                change = torch.zeros_like(target)
                made.kept.setdefault(name, target.detach().clone() if copied else target)
                adapter.merge_(name, change, made.kept[name])
                target.add_(change, alpha=weight)
    finally:
        made.kept.clear()
        made.merged.clear()


def unmerge(ledger: Ledger) -> None:
    """Give every merged weight its own bits back."""
    attachments = [ledger.attachments[n] for n in ledger.merged]
    jobs = list(_jobs(attachments))
    _take_back(jobs, [made for _, made, _, _ in jobs], {}, ())
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


def _several(jobs: Sequence[Job]) -> set[tuple[int, str]]:
    """The weights that several of the jobs change."""
    counts = Counter((id(made), name) for _, made, _, adapter in jobs for name in adapter.merges)
    return {weight for weight, count in counts.items() if count > 1}


@torch.no_grad()
def _take_back(
    jobs: Sequence[Job], done: Iterable[Graft], earlier: Earlier, held: Iterable[tuple[Tensor, Tensor]]
) -> None:
    """Give weights back what they were: those that held adapters merged earlier by their copies, others their own bits."""
    for target, value in held:
        target.copy_(value)
    touched = {id(made) for made in done}
    for site, made, key, _ in reversed(jobs):  # of tied weights the first copy alone is of the base
        if id(made) in touched:
            for name in made.kept.keys() - earlier.get(id(made), set()):
                _tensor(site.module, name).copy_(made.kept.pop(name))
            made.merged.pop(key, None)


@torch.no_grad()
def _settle(ledger: Ledger, attachments: Sequence[Attachment], jobs: Sequence[Job]) -> None:
    """After a merge for good that failed: weights with a copy get it back, and what the others hold by now is taken off.

    So the model computes what it did, and what is left can be merged again.
    """
    whose = {(id(graft_of(s.module)), a.key(s)): (a, name) for a in attachments for name, s in a.sites.items()}
    for site, made, key, adapter in reversed(jobs):
        copies = {n: v for n, v in made.kept.items() if v is not _tensor(site.module, n)}
        for name, value in copies.items():
            _tensor(site.module, name).copy_(value)
        if key in made.merged and not copies.keys() & set(adapter.merges):
            attachment, name = whose[id(made), key]
            ledger.take_off(attachment, name)
    for _, made, _, _ in jobs:
        made.kept.clear()
        made.merged.clear()


def _check_left(ledger: Ledger, attachments: Sequence[Attachment], jobs: Sequence[Job]) -> None:
    """Refuse to change for good what an adapter that stays is relative to."""
    written = {(id(made), name) for _, made, _, adapter in jobs for name in adapter.merges}
    for other in ledger.attachments.values():
        for where, adapter in other.adapters.items() if other not in attachments else ():
            at = id(graft_of(other.sites[where].module))
            if adapter.reads_base and any((at, name) in written for name in adapter.merges):
                raise NotMergeable(
                    f"{other.name!r} at {where!r} is relative to the base weight, which merging for good would change under "
                    "it; merge both together, eject it first, or keep the base"
                )


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
                "module.weight = nn.Parameter(module.weight.detach().clone()), or .bias"
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
