"""The verbs: free functions whose first argument is the model."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from peftkit import also_train, hub, ledger, loading, merging, storage
from peftkit.building import build
from peftkit.hosts import EmbeddingHost
from peftkit.ledger import Ledger
from peftkit.method import Config, chosen
from peftkit.report import Report, report
from peftkit.sites import walk


def inject(model: nn.Module, config: Config, *, name: str = "default") -> Report:
    """Attach an adapter in place, freeze the base, and make the adapter the active one.

    Args:
        model: any module; it keeps its class, parameters and names.
        config: the method and its settings.
        name: letters, digits, `_` and `-`; several adapters can be attached under different names.

    Raises:
        TargetError: a pattern that matches nothing, or a module that cannot be adapted.
        ValueError: the name is taken, adapters are merged, a setting that does not fit a site.
    """
    record, everything = ledger.for_attaching(model, name)
    if not isinstance(config, Config):
        raise TypeError(f"config: one of peftkit's configs, such as LoRAConfig(r=8), not {config!r}")
    sites = chosen(config, model, everything)
    also = also_train.wanted(config.also_train, everything)
    attachment = build(name, config, sites, also, everything, trainable=True, new=True)
    record.attach(model, everything, attachment)
    return report(model, record, [name], everything)


def eject(model: nn.Module, *names: str) -> None:
    """Take off the named adapters, or all; with none left the model is as it came.

    Raises:
        KeyError: no such adapter. ValueError: nothing is attached, or an adapter is merged.
    """
    root, record = ledger.require(model)
    leaving = record.named(dict.fromkeys(names or tuple(record.attachments)))
    merged = [a.name for a in leaving if a.name in record.merged]
    if merged:
        raise ValueError(
            f"{', '.join(map(repr, merged))} is merged; unmerge(model) first, or end with merge(model, keep_base=False) "
            "to keep the merged weights"
        )
    record.check_classes()
    for attachment in leaving:
        record.detach(root, attachment)


def adapters(model: nn.Module) -> dict[str, Config]:
    """What is attached: the config of each name, in the order of attaching."""
    found = ledger.find(model)
    return {name: a.config for name, a in found[1].attachments.items()} if found else {}


def active(model: nn.Module) -> tuple[str, ...]:
    """The names that act in this thread."""
    found = ledger.find(model)
    return found[1].switch.acting() if found else ()


def activate(model: nn.Module, *names: str) -> None:
    """These act from now on, summed; without a name, none does. Only what acts is trained. Their order does not count.

    Raises:
        KeyError: no such adapter. ValueError: a merged adapter would stop to act, or two would replace one module.
    """
    _, record = ledger.require(model)
    record.activate(_checked(record, names))


@contextlib.contextmanager
def using(model: nn.Module, *names: str) -> Iterator[None]:
    """These act within the block, in this thread alone; may be nested.

    Raises:
        As `activate`.
    """
    _, record = ledger.require(model)
    names = _checked(record, names)
    local = record.switch.local
    before, local.names = local.names, names
    try:
        yield
    finally:
        local.names = before


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """No adapter acts within the block, in this thread alone.

    Raises:
        ValueError: an adapter is merged, so the base alone is not there to compute with.
    """
    with using(model):
        yield


def _checked(record: Ledger, names: tuple[str, ...]) -> tuple[str, ...]:
    chosen = record.named(names)
    attachments = [a for a in record.attachments.values() if a in chosen] if len(chosen) > 1 else chosen
    names = tuple(a.name for a in attachments)  # in the order of attaching, whatever the order they are named in
    missing = [n for n in record.merged if n not in names]
    if missing:
        raise ValueError(f"{', '.join(map(repr, missing))} is merged and cannot stop to act; unmerge(model) first")
    for a in attachments if len(attachments) > 1 else ():
        for where, adapter in a.adapters.items():
            inside = {id(m) for m in a.sites[where].module.modules()} if adapter.replaces else ()
            for b in attachments if inside else ():
                hit = next((s.name for s in b.sites.values() if b is not a and id(s.module) in inside), None)
                if hit is not None:
                    raise ValueError(
                        f"{a.name!r} takes the place of {where!r}, so what {b.name!r} has at {hit!r} cannot act with it"
                    )
    return names


def merge(model: nn.Module, *names: str, keep_base: bool = True) -> None:
    """Fold the active adapters, or those named of them, into the base weights.

    With `keep_base` a copy of the weights is kept for `unmerge`; without, the adapters are gone afterwards.

    Raises:
        NotMergeable: with the reason; nothing was changed.
        ValueError: a name that is not active, or is merged already; nothing to merge.
    """
    root, record = ledger.require(model)
    chosen = record.named(dict.fromkeys(names or record.switch.names))
    if not chosen:
        raise ValueError("no adapter is active, so there is nothing to merge; activate one first")
    for attachment in chosen:
        if attachment.name in record.merged:
            raise ValueError(f"{attachment.name!r} is merged already")
        if attachment.name not in record.switch.names:
            raise ValueError(
                f"{attachment.name!r} is not active, so merging it would change the output; activate it first"
            )
    if record.switch.local.names is not None:
        raise ValueError(
            "merging changes what every thread computes; leave the using(...) or disabled(...) block first"
        )
    if record.merged and not keep_base:
        raise ValueError(f"{', '.join(map(repr, record.merged))} is merged with its base kept; unmerge(model) first")
    merging.merge(root, record, chosen, keep=keep_base)


def unmerge(model: nn.Module) -> None:
    """Give the base weights back their bits; the adapters act beside them again.

    Raises:
        ValueError: nothing is merged.
    """
    _, record = ledger.require(model)
    if not record.merged:
        raise ValueError("no adapter is merged, so there is nothing to unmerge")
    merging.unmerge(record)


def reset(model: nn.Module, *names: str) -> None:
    """Draw the initial values of the named adapters, or all, anew; also puts adapters that were attached on the meta
    device where their hosts have got to.

    Raises:
        KeyError: no such adapter. ValueError: an adapter is merged.
    """
    _, record = ledger.require(model)
    if record.merged:  # initial values may be taken from the base, which is not there
        raise ValueError(f"{', '.join(map(repr, record.merged))} is merged; unmerge(model) before resetting")
    for attachment in record.named(names or tuple(record.attachments)):
        for adapter in attachment.adapters.values():
            adapter.reset_parameters()


def describe(model: nn.Module) -> Report:
    """What is attached where, how many parameters and bytes it has, and how it is computed."""
    found = ledger.find(model)
    return report(found[0] if found else model, found[1] if found else None)


def parameters(model: nn.Module, *names: str) -> list[nn.Parameter]:
    """The parameters of the named adapters, or the active ones, that are trained.

    Raises:
        KeyError: no such adapter. ValueError: none is trained, so an optimizer would have nothing to do.
    """
    _, record = ledger.require(model)
    names = names or record.switch.names
    found = [p for a in record.named(names) for p in a.parameters() if p.requires_grad]
    if not found:
        raise ValueError(
            f"no parameter of {', '.join(map(repr, names)) or 'any adapter'} is trained: it is merged, inactive, or was "
            "loaded without trainable=True"
        )
    return list(dict.fromkeys(found))


def param_groups(
    model: nn.Module, *names: str, lr: float, ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups for `parameters`. With `ratio` other than 1, LoRA+ (Hayou et al., arXiv 2402.12354): B of every
    low-rank pair that a product feeds learns at `lr · ratio`; all else at `lr`.

    All else is A, heads and norms of `also_train`, magnitudes and other vectors. The paper's argument is of B alone: a
    sum over the wide input feeds A, so that A's rate shrinks with the width and B's does not. Its code also multiplies
    the rate of every one-dimensional parameter, biases and norms included, for which the paper gives no reason; here
    they learn at `lr`. Nor has an embedding's pair a fast side: a column of A is looked up, not summed (and A it is that
    starts at zero); the paper's code takes it out of both groups, and so it learns at `lr` here.

    Raises:
        As `parameters`; ValueError: a learning rate or ratio that is not positive or finite, a ratio other than 1 where
            nothing is fast, since it would do nothing.
    """
    if not (0 < lr < math.inf and 0 < ratio < math.inf):
        raise ValueError(f"lr and ratio are positive, not {lr!r} and {ratio!r}")
    _, record = ledger.require(model)
    trained = parameters(model, *names)
    fast_ids = {
        id(getattr(adapter, attribute, None))
        for a in record.named(names or record.switch.names)
        for adapter in a.adapters.values()
        for attribute in adapter.fast
        if not isinstance(getattr(adapter, "host", None), EmbeddingHost)
    }
    slow = [p for p in trained if id(p) not in fast_ids or ratio == 1.0]
    fast = [p for p in trained if id(p) in fast_ids and ratio != 1.0]
    if ratio != 1.0 and not fast:
        raise ValueError(
            f"ratio={ratio!r} would do nothing: LoRA+ speeds up B of low-rank pairs, and none is trained here"
        )
    groups = [(slow, lr), (fast, lr * ratio)]
    return [{"params": ps, "lr": rate, "weight_decay": weight_decay} for ps, rate in groups if ps]


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    push_to_hub: str | None = None,
    private: bool | None = None,
) -> str | None:
    """Write the adapter as a directory that peft and vLLM read. What is there stays whole until the new one is.

    Args:
        push_to_hub: `"user/name"` of a repository on the Hub that the directory's adapter is uploaded to once it is written;
            needs `peftkit[hub]`. A network that fails then changes nothing here.
        private: whether that repository is private; where it is made, None is as your account has it.

    Returns:
        The URL of the commit on the Hub; None where nothing is pushed.

    Raises:
        KeyError: no such adapter. ValueError: a module that carried it has been replaced, values are not finite,
            `private` of nothing. StorageError: it was saved, but not uploaded; see `peftkit.hub.upload`.
    """
    if private is not None and push_to_hub is None:
        raise ValueError(f"{private=} is said of a repository on the Hub; give push_to_hub='user/name' as well")
    root, record = ledger.require(model)
    (attachment,) = record.named([name])
    storage.save(root, attachment, path)
    return None if push_to_hub is None else hub.upload(path, push_to_hub, private=private)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    revision: str | None = None,
    trainable: bool = False,
    check_base: bool = True,
) -> Report:
    """Attach a stored adapter, peftkit's own or peft's, and make it the active one.

    Args:
        path: its directory; or, where there is none of that name, `"user/name"` on the Hub, see `peftkit.hub.read`.
        revision: the branch, tag or commit on the Hub.
        trainable: to train on; else its parameters are frozen like the base's.
        check_base: whether the base must be the one that the adapter was saved from, by a sample of its weights.

    Raises:
        StorageError: a tensor that is missing, unexpected, misshapen, not finite or damaged, a wrong base; nothing of
            that name here or on the Hub; the model is as it was.
    """
    ledger.for_attaching(model, name)  # what is refused anyway, before anything is fetched
    stored = hub.read(path, name=name, revision=revision)
    record, everything = loading.attach(model, stored, name=name, trainable=trainable, check_base=check_base)
    return report(model, record, [name], everything)


def restore(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    revision: str | None = None,
    check_base: bool = True,
) -> None:
    """Read a stored adapter into the attached one of that name, in place: an optimizer keeps its parameters.

    It must be the same adapter: of the same method, settings and modules. To read another one, `eject` and `load`.

    Args:
        path, revision, check_base: as in `load`.

    Raises:
        KeyError: no such adapter is attached. ValueError: it is merged.
        StorageError: as in `load`, or the stored adapter differs in more than values; the model is as it was.
    """
    root, record = ledger.require(model)
    (attachment,) = record.named([name])
    if name in record.merged:
        raise ValueError(f"{name!r} is merged, and the weights hold its values; unmerge(model) before restoring")
    stored = hub.read(path, name=name, revision=revision)
    fresh = loading.made(stored, name, walk(root), trainable=False, check_base=check_base)
    storage.take_over(stored, fresh, attachment)
