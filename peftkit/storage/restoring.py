"""Reading a stored adapter into one that is attached: values alone, and only where all else is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftkit.also_train import TokenRows, WholeModule
from peftkit.ledger import Attachment
from peftkit.method import Adapter
from peftkit.sites import Site
from peftkit.storage.config import to_json
from peftkit.storage.errors import StorageError
from peftkit.storage.fingerprint import differing, fingerprint
from peftkit.storage.reader import Stored

_CHOOSE = ("targets", "exclude", "layers", "also_train")  # what they choose is compared, not how it was said
_INSTEAD = "to take it as it is, eject this one and load(model, path)"


def take_over(stored: Stored, fresh: Attachment, attachment: Attachment) -> None:
    """Give the tensors of `attachment` the values of `fresh`, which was made from the file; they stay the same objects.

    Raises:
        StorageError: the two differ in a setting, a module, a shape or a dtype; nothing was changed.
    """
    _check_settings(stored, fresh, attachment)
    _check_modules(stored, fresh, attachment)
    values: dict[int, tuple[Tensor, Tensor]] = {}
    for name, made in fresh.adapters.items():
        for own, value, where in _matched(stored, name, made, attachment.adapters[name]):
            _, first = values.setdefault(id(own), (own, value))
            if first is not value and not torch.equal(first, value):
                raise StorageError(
                    f"{stored.file}: {where} is tied to another tensor here, which has other values there"
                )
    with torch.no_grad():
        for own, value in values.values():
            own.copy_(value)


def identity(attachment: Attachment) -> dict[str, Any]:
    """What an adapter is but for its values, in plain values: to be kept where the values are kept by others."""
    return {
        "config": to_json(attachment.config, list(attachment.adapters)),
        "base": fingerprint(_on_weights(attachment)),
    }


def check_identity(kept: Mapping[str, Any], attachment: Attachment) -> None:
    """Compare what was kept with what is attached.

    Raises:
        StorageError: it has other settings, or the base is another one.
    """
    _compare("the checkpoint", kept["config"], attachment)
    wrong = differing(kept["base"], _on_weights(attachment))
    if wrong:
        raise StorageError(
            f"the checkpoint is of another base: the weight of {wrong[0]!r} differs; load the base it was trained on"
        )


def _on_weights(attachment: Attachment) -> dict[str, Site]:
    return {
        name: site
        for name, site in attachment.sites.items()
        if not (isinstance(adapter := attachment.adapters[name], WholeModule | TokenRows) or adapter.beside)
    }


def _check_settings(stored: Stored, fresh: Attachment, attachment: Attachment) -> None:
    _compare(f"{stored.path}: the stored adapter", to_json(fresh.config, list(fresh.adapters)), attachment)


def _compare(whose: str, there: Mapping[str, Any], attachment: Attachment) -> None:
    here = to_json(attachment.config, list(attachment.adapters))
    for key in ("method", *sorted(there.keys() | here.keys())):
        if key not in _CHOOSE and there.get(key) != here.get(key):
            raise StorageError(
                f"{whose} has {key}={there.get(key)!r}, the attached {attachment.name!r} has {key}={here.get(key)!r}; "
                f"{_INSTEAD}"
            )


def _check_modules(stored: Stored, fresh: Attachment, attachment: Attachment) -> None:
    for name, site in attachment.sites.items():
        if name not in fresh.sites:
            raise StorageError(
                f"{stored.path}: {attachment.name!r} is attached to {name!r}, the stored adapter is not; {_INSTEAD}"
            )
        if fresh.sites[name].module is not site.module:
            raise StorageError(
                f"{name!r} that carries the adapter {attachment.name!r} is no longer in the model: something has replaced "
                f"that {type(site.module).__name__}, and its adapter with it; attach after replacing"
            )
    for name in fresh.sites:
        if name not in attachment.sites:
            raise StorageError(
                f"{stored.path}: the stored adapter has {name!r}, where {attachment.name!r} is not attached; {_INSTEAD}"
            )


def _matched(stored: Stored, site: str, made: Adapter, attached: Adapter) -> list[tuple[Tensor, Tensor, str]]:
    """The attached tensors of one site, each with its value and name.

    Raises:
        StorageError: naming what differs.
    """
    if type(made) is not type(attached) or _rows(made) != _rows(attached):
        raise StorageError(
            f"{stored.path}: {site!r} has {_called(made)} in the stored adapter and {_called(attached)} here; {_INSTEAD}"
        )
    there, here = _tensors(made), _tensors(attached)
    if there.keys() != here.keys():
        odd = ", ".join(sorted(there.keys() ^ here.keys()))
        raise StorageError(
            f"{stored.path}: the attached adapter at {site!r} is not made of what is stored (they differ in {odd}), as "
            "where training goes through parameters that are not kept; its training cannot be taken up from this file"
        )
    for key, own in here.items():
        value = there[key]
        if own.is_meta:
            raise StorageError(f"{key} at {site!r} is on the meta device; reset(model) before restoring")
        if own.shape != value.shape or own.dtype is not value.dtype:
            raise StorageError(
                f"{stored.file}: {key} at {site!r} is {tuple(value.shape)} of {value.dtype}, and {tuple(own.shape)} of "
                f"{own.dtype} here; {_INSTEAD}"
            )
    return [(own, there[key], f"{key} at {site!r}") for key, own in here.items()]


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    found: dict[str, Any] = adapter.state_dict(keep_vars=True)
    return {key: t for key, t in found.items() if isinstance(t, Tensor)}


def _rows(adapter: Adapter) -> tuple[int, ...] | None:
    return adapter.which if isinstance(adapter, TokenRows) else None


def _called(adapter: Adapter) -> str:
    rows = _rows(adapter)
    return type(adapter).__name__ + (f" of rows {list(rows)}" if rows is not None else "")
