"""Writing a LoRA whose pairs were computed, from a skeleton, as `save` writes one that was trained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from peftkit import building, storage
from peftkit.also_train import InPlace, TokenRows
from peftkit.hosts import Host
from peftkit.methods.lora import LoRAConfig
from peftkit.pairs import PairAdapter
from peftkit.peft_patterns import compact
from peftkit.sites import Site
from peftkit.storage import Origin, layout

Matrices = tuple[Tensor, Tensor]  # A: (r in) and B: (out r)


def as_stored(host: Host, groups: Sequence[Matrices]) -> Matrices:
    """A and B of an adapter on `host`, from the matrices of each group; those of A may span all inputs."""
    b = torch.cat([b for _, b in groups])
    r = b.shape[1] * len(groups)
    shape_a, shape_b = host.pair_shapes(r)
    a = torch.cat([a for a, _ in groups])
    kernel = shape_a[2:]
    a = a.reshape(r, -1, *kernel)
    b = b.reshape(shape_b)
    return (host.from_stored(a) if a.shape[1] != shape_a[1] else a), b


def write(
    root: nn.Module,
    everything: Sequence[Site],
    pairs: Mapping[str, Matrices],
    kept: Mapping[str, InPlace],
    out: str | os.PathLike[str],
    *,
    scale: float,
    origin: Origin,
) -> None:
    """Write a LoRA of these pairs by the site's name, each `scale · BA`, and of what is `kept` whole.

    Raises:
        StorageError: values that are not finite, a directory that cannot be written; what was there is as it was.
    """
    by_name = {s.name: s for s in everything}
    pairs = _ranks_by_module(pairs, by_name)
    ranks = {name: len(a) for name, (a, _) in pairs.items()}
    config = LoRAConfig(
        targets=tuple(f"^{name}" for name in pairs),
        r=compact(ranks),
        alpha=compact({name: scale * r for name, r in ranks.items()}),
        also_train={name: adapter.which if isinstance(adapter, TokenRows) else None for name, adapter in kept.items()},
    )
    sites = [s for s in everything if s.name in pairs]
    attachment = building.build("default", config, sites, {}, everything, trainable=False, new=False)
    for name, (a, b) in pairs.items():
        adapter = attachment.adapters[name]
        assert isinstance(adapter, PairAdapter)
        adapter.take("lora_A", a.contiguous())
        adapter.take("lora_B", b.contiguous())
    for name, adapter in kept.items():
        attachment.adapters[name], attachment.sites[name] = adapter, by_name[name]
    storage.save(root, attachment, out, origin=origin)


def _ranks_by_module(pairs: Mapping[str, Matrices], sites: Mapping[str, Site]) -> dict[str, Matrices]:
    """The same with one rank for all projections of an attention, which peft has no names for: zeros make up for it."""
    largest: dict[str, int] = {}
    for name, (a, _) in pairs.items():
        path = layout.module_path(sites[name])
        largest[path] = max(largest.get(path, 0), len(a))
    return {name: _padded(a, b, largest[layout.module_path(sites[name])]) for name, (a, b) in pairs.items()}


def _padded(a: Tensor, b: Tensor, r: int) -> Matrices:
    more = r - len(a)
    if not more:
        return a, b
    return torch.cat([a, a.new_zeros(more, *a.shape[1:])]), torch.cat([b, b.new_zeros(len(b), more)], dim=1)
