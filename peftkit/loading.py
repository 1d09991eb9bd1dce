"""A stored adapter that has been read, on a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peftkit import ledger, storage
from peftkit.building import build
from peftkit.ledger import Attachment, Ledger
from peftkit.sites import Site


def attach(
    model: nn.Module, stored: storage.Stored, *, name: str, trainable: bool, check_base: bool
) -> tuple[Ledger, list[Site]]:
    """Attach it under `name`, and make it the active one; also the model's record and sites.

    Raises:
        ValueError: the name is taken, adapters are merged. StorageError: it does not fit; the model is as it was.
    """
    record, everything = ledger.for_attaching(model, name)
    record.attach(model, everything, made(stored, name, everything, trainable=trainable, check_base=check_base))
    return record, everything


def made(
    stored: storage.Stored, name: str, everything: Sequence[Site], *, trainable: bool, check_base: bool
) -> Attachment:
    """The stored adapter with its values, hung nowhere yet.

    Raises:
        StorageError: it does not fit the model of these sites.
    """
    sites, also = storage.match(stored, everything, check_base=check_base)
    attachment = built(stored, name, sites, also, everything, trainable=trainable)
    storage.fill(stored, attachment)
    return attachment


def built(
    stored: storage.Stored,
    name: str,
    sites: Sequence[Site],
    also: dict[Site, Sequence[int] | None],
    everything: Sequence[Site],
    *,
    trainable: bool,
) -> Attachment:
    """The stored adapter as its settings have it, without its values.

    Raises:
        StorageError: a setting does not fit a site, or asks for far more than the file holds.
    """
    try:
        with storage.bounded(stored, sites):
            return build(name, stored.config, sites, also, everything, trainable=trainable, new=False)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:  # whatever settings are of
        raise storage.StorageError(f"{stored.path}: {error}") from error
