"""Adapters for all sites of a config, hung nowhere yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peftkit import also_train, ledger
from peftkit.ledger import Attachment
from peftkit.method import Adapter, Config
from peftkit.sites import Site
from peftkit.targets import TargetError


def build(
    name: str,
    config: Config,
    sites: Sequence[Site],
    also: dict[Site, Sequence[int] | None],
    everything: Sequence[Site],
    *,
    trainable: bool,
    new: bool,
) -> Attachment:
    """The attachment of `config` at `sites`, with what `also` names trained whole.

    Args:
        new: draw initial values, and refuse settings that make no sense to start with.

    Raises:
        TargetError: two adapters would get in each other's way, or a module cannot be adapted.
        ValueError: a setting that does not fit a site.
    """
    check_apart(sites, also)
    ledger.check_graftable([*sites, *also])
    plan = config.prepare(sites)
    for site in sites if new else ():
        config.check(site, plan)
    adapters: dict[str, Adapter] = {}
    where: dict[str, Site] = {}
    for site in sites:
        adapters[site.name] = config.build(site, plan)
        where[site.name] = site
    for site, adapter in also_train.build(also, everything).items():
        if site.name in adapters:
            raise TargetError(
                f"{site.name!r} is a target and shares its weight with an embedding whose rows also_train names; "
                f"exclude={site.name!r}"
            )
        adapters[site.name], where[site.name] = adapter, site
    for site, adapter in config.beside(everything, {s.name: adapters[s.name] for s in sites}).items():
        if site.name in adapters:
            raise TargetError(
                f"{site.name!r} is trained by also_train, and {config.method} hangs on it too; leave it out"
            )
        ledger.check_graftable([site])
        adapters[site.name], where[site.name] = adapter, site
    for adapter in adapters.values():
        if new:
            adapter.reset_parameters()
    return Attachment(name, config, adapters, where, trainable)


def check_apart(sites: Sequence[Site], also: Iterable[Site]) -> None:
    """Refuse a target that lies in a module of `also`, which is trained whole.

    Raises:
        TargetError: naming both.
    """
    inside = {id(m): s.name for s in also for m in s.module.modules()}
    for site in sites:
        if id(site.module) in inside:
            raise TargetError(
                f"{site.name!r} is a target and lies in {inside[id(site.module)]!r} of also_train, which is trained whole; "
                f"exclude={site.name!r}, or leave it out of also_train"
            )
