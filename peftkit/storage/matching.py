"""Where a stored adapter meets a model: what does not fit is an error that names it, before the model is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from peftkit.also_train import TokenRows, WholeModule, named_tensor
from peftkit.ledger import Attachment
from peftkit.method import chosen
from peftkit.peft_patterns import renamed
from peftkit.sites import Site
from peftkit.storage import layout
from peftkit.storage.errors import StorageError
from peftkit.storage.fingerprint import differing
from peftkit.storage.reader import FROZEN, Stored
from peftkit.targets import TargetError, nearest


def match(
    stored: Stored, everything: Sequence[Site], *, check_base: bool
) -> tuple[list[Site], dict[Site, Sequence[int] | None]]:
    """The sites of the model that the file's tensors belong to, and those of `also_train`.

    Raises:
        StorageError: tensors for modules that the model lacks, modules without their tensors, another base.
    """
    by_stem = {layout.stem(s): s for s in everything if stored.config.refuses(s) is None}
    for s in everything:  # the same module under another name
        for alias in s.aliases if s.part is None and s.reader is None else ():
            by_stem.setdefault(f"{layout.PREFIX}{alias}.", s)
    found = {id(s): s for s in _without_tensors(stored, everything)}
    for stem, tensors in stored.sites.items():
        site = by_stem.get(stem)
        if site is None:
            names = [layout.path_of(k) for k in by_stem]
            refused = next((s for s in everything if layout.stem(s) == stem), None)
            why = f"; {refused.name!r} is none, {stored.config.refuses(refused)}" if refused is not None else ""
            raise StorageError(
                f"{stored.file}: unexpected {stem + next(iter(tensors))}: the model has no module for it to adapt{why}"
                f"{nearest(layout.path_of(stem), names)}"
            )
        if id(site) in found:
            raise StorageError(f"{stored.file}: unexpected {stem}: {site.name!r} has tensors under another name too")
        found[id(site)] = site
    _check_complete(stored, list(found.values()), by_stem)
    if check_base and stored.base is not None:
        refuse_base(stored, differing(stored.base, {s.name: s for s in found.values()}))
    _check_frozen(stored, by_stem)
    _take_names(stored, by_stem)
    also = _also(stored, everything)
    return [s for s in everything if id(s) in found], also


def _without_tensors(stored: Stored, everything: Sequence[Site]) -> list[Site]:
    """The sites of an adapter that has tensors for all of them together."""
    if stored.sites or not stored.of_all:
        return []
    if stored.names is None:
        try:
            return chosen(stored.config, everything[0].module, everything)
        except TargetError as error:
            raise StorageError(f"{stored.path}: {error}") from error
    by_name = {n: s for s in everything if stored.config.refuses(s) is None for n in s.names}
    for name in stored.names:
        if name not in by_name:
            raise StorageError(f"{stored.file}: the model has no module {name!r} to adapt{nearest(name, by_name)}")
    return [by_name[name] for name in stored.names]


def _check_complete(stored: Stored, found: Sequence[Site], by_stem: Mapping[str, Site]) -> None:
    """Each module of the model that the file's lists mean must have its tensors."""
    have = {id(s.module) for s in found}
    # peft always adapts both parts of a MultiheadAttention, we need not
    paths = {layout.module_path(s) for s in found} if stored.own else set()
    for stem, site in by_stem.items():
        if id(site.module) in have or site.name in paths:
            continue
        path = layout.module_path(site)
        if path not in paths and stored.means(path):
            raise StorageError(
                f"{stored.file}: no tensors for {layout.path_of(stem)!r}, which target_modules of "
                f"{layout.CONFIG} names; the file is not complete, or for another model"
            )


def refuse_base(stored: Stored, wrong: Sequence[str]) -> None:
    """Say that the weights at these sites are not those it was trained on, if there are any.

    Raises:
        StorageError: there are.
    """
    if wrong:
        raise StorageError(
            f"{stored.path} was saved from another base: the weight of {wrong[0]!r} differs"
            f"{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}; load the base it was trained on, or pass "
            "check_base=False if you are sure"
        )


def _check_frozen(stored: Stored, by_stem: Mapping[str, Site]) -> None:
    for stem, value in stored.frozen.items():
        weight = by_stem[stem].module._parameters["weight"]
        assert weight is not None
        if weight.is_meta:
            continue
        if weight.shape != value.shape or not torch.equal(weight.detach().cpu(), value.to(weight.dtype)):
            raise StorageError(
                f"{stored.file}: {stem}{FROZEN} is not the weight of {by_stem[stem].name!r} in this model: "
                "the embedding was resized or trained; give the base that weight first"
            )


def _take_names(stored: Stored, by_stem: Mapping[str, Site]) -> None:
    """Put the model's names in place of the file's, where those differ: parts of a MultiheadAttention, aliases."""
    names = {layout.path_of(s): by_stem[s].name for s in stored.sites}
    names = {old: new for old, new in names.items() if old != new}
    if names:
        config = stored.config
        new = {f.name: renamed(getattr(config, f.name), names) for f in dataclasses.fields(config)}
        stored.config = dataclasses.replace(config, **new)


def _also(stored: Stored, everything: Sequence[Site]) -> dict[Site, Sequence[int] | None]:
    also: dict[Site, Sequence[int] | None] = {}
    modules = [s for s in everything if s.part is None]
    for wanted, ids in [*((w, None) for w in stored.whole), *stored.rows.items()]:
        # to peft, `classifier` also means `pre_classifier`
        hits = [s for s in modules if any(n == wanted if stored.own else n.endswith(wanted) for n in s.names)]
        if not hits:
            if ids is None and not any(f"{wanted}." in key for key in stored.tensors):
                continue  # peft lists the customary names of all heads
            raise StorageError(
                f"{stored.path}: the model has no module {wanted!r}{nearest(wanted, [s.name for s in modules])}"
            )
        for site in hits:
            count = getattr(site.module, "num_embeddings", 0)
            if ids is not None and ids[-1] >= count:
                raise StorageError(f"{stored.path}: token {ids[-1]} lies beyond the {count} rows of {site.name!r}")
        also.update(dict.fromkeys(hits, ids))
    return also


@torch.no_grad()
def fill(stored: Stored, attachment: Attachment) -> None:
    """Give the adapters their tensors.

    Raises:
        StorageError: a tensor that is missing, misshapen, of another kind of dtype, or left over.
    """
    left = set(stored.tensors)
    if attachment.config.whole_keys:
        own = {n: a for n, a in attachment.adapters.items() if not (isinstance(a, WholeModule | TokenRows) or a.beside)}
        try:
            attachment.config.load_whole({key: t.clone() for key, t in stored.of_all.items()}, own)
        except ValueError as error:
            raise StorageError(f"{stored.file}: {error}") from error
    _untie(stored, attachment)
    for name, adapter in attachment.adapters.items():
        site = attachment.sites[name]
        stems = [layout.stem(site)]
        if site.part is None:
            stems += [f"{layout.PREFIX}{a}." for a in site.aliases]
        whole = isinstance(adapter, WholeModule | TokenRows)
        kinds = adapter.tensors() if whole else {}
        taken = {}
        for key, expected in adapter.stored_shapes().items():
            stem = next((s for s in stems if s + key in stored.tensors), None)
            if stem is None:
                raise StorageError(
                    f"{stored.file}: missing {stems[0]}{key}; the file is not complete, or for another model"
                )
            tensor = stored.tensors[stem + key]
            left.discard(stem + key)
            if tensor.shape not in expected:
                raise StorageError(
                    f"{stored.file}: {stem}{key} has shape {tuple(tensor.shape)}, expected {tuple(expected[0])}; "
                    "the adapter belongs to a model of another size"
                    + (", or one with resized embeddings" if whole else "")
                )
            if whole and tensor.is_floating_point() != kinds[key].is_floating_point():
                raise StorageError(f"{stored.file}: {stem}{key} is {tensor.dtype}, expected {kinds[key].dtype}")
            taken[key] = tensor.clone()  # of the file's buffer, which is not to stay
        try:
            adapter.load_tensors(taken)
        except ValueError as error:
            raise StorageError(f"{stored.path}: {error}") from error
    if left:
        raise StorageError(
            f"{stored.file}: unexpected {min(left)}{f' and {len(left) - 1} more' if len(left) > 1 else ''}"
        )


def _untie(stored: Stored, attachment: Attachment) -> None:
    """Copies of tied modules that were stored with different values, as peft trains them, are each their own."""
    first: dict[int, Tensor] = {}
    for name, adapter in attachment.adapters.items():
        if not isinstance(adapter, WholeModule):
            continue
        stem = layout.stem(attachment.sites[name])
        for key in adapter.merges:
            value, own = stored.tensors.get(stem + key), named_tensor(adapter.copy, key)
            if value is None or torch.equal(first.setdefault(id(own), value), value):
                continue
            holder, _, last = key.rpartition(".")
            adapter.copy.get_submodule(holder)._parameters[last] = nn.Parameter(own.detach().clone())
