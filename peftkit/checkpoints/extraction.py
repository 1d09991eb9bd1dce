"""A LoRA from the difference of two checkpoints, a matrix at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import also_train as also_trained
from peftkit import building
from peftkit.checkpoints import lowrank
from peftkit.checkpoints.approximation import Approximation, LeftOut, Nearness
from peftkit.checkpoints.blockwise import compared
from peftkit.checkpoints.computed import Matrices, as_stored, write
from peftkit.checkpoints.files import Checkpoint, open_checkpoint
from peftkit.checkpoints.fitting import TRANSPOSED, put
from peftkit.checkpoints.skeleton import Hints, skeleton
from peftkit.dtypes import check_dtype
from peftkit.hosts import Host, host_of
from peftkit.method import chosen
from peftkit.methods.lora import LoRAConfig
from peftkit.pairs import check_settings
from peftkit.sites import Site, walk
from peftkit.storage import Origin, StorageError
from peftkit.storage.fingerprint import fingerprint, joined
from peftkit.targets import Pattern, Patterns, PerSite, TargetError, Targets, nearest

# a file does not say what looks a row up and what multiplies: the customary names of embeddings, and of Conv1Ds
_EMBEDDING = re.compile(
    r"(?!patch_)(.*_)?embed(ding)?s?|embed_(in|tokens|positions|tokens_per_layer)|wte|wpe|shared|relative_attention_bias"
)
_CONV1D = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


@torch.no_grad()
def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    r: int | Mapping[str, int],
    targets: Targets | None = "all-linear",
    exclude: Targets | None = None,
    layers: Iterable[int] | int | None = None,
    also_train: Sequence[str] | str = (),
    ignore: Sequence[Pattern] | Pattern = (),
    embeddings: Sequence[Pattern] | Pattern | None = None,
    iterations: int | None = None,
    dtype: torch.dtype | None = None,
) -> Approximation:
    """Write to `out` the LoRA of rank `r` on the checkpoint `base` that comes nearest to the checkpoint `tuned`.

    At each target the nearest pair to `tuned − base` in the Frobenius norm, computed in fp32, or in fp64 where one of the
    two is. No model is built, and one difference is held at a time. What a file cannot say is told by customary names: 2-D
    weights are Linears, but for embeddings and the Conv1Ds of GPT-2's family; convolutions are taken as ungrouped. Where
    that is wrong at a target, `load` refuses the adapter: a tensor is missing, or of another shape.

    Args:
        base, tuned: directories of safetensors, single or sharded.
        r: rank, or ranks by pattern; cut to what a matrix can have.
        targets, exclude, layers: as in a config.
        also_train: patterns of modules that are stored whole, as they are in `tuned`; the one way to take over
            norms, biases and new heads.
        ignore: patterns of modules that one checkpoint may have alone, and that are not looked at.
        embeddings: patterns of the 2-D weights' modules that are embeddings, and no others; None goes by customary names.
        iterations: None decomposes each difference whole, by gesdd, whose time grows with the cube of its size. A number
            takes torch.svd_lowrank, the randomised method of Halko et al. (arXiv 0909.4061), with that many power
            iterations: for r far below the size much faster, and not the nearest pair but near it; what it loses is
            measured.
        dtype: of A and B; None is the one computed in.

    Returns:
        What of each difference is kept; which tensors differ and are not in the adapter; which targets do not differ.

    Raises:
        StorageError: a checkpoint that cannot be read; tensors that one of them lacks or that differ in shape; a target
            that is quantised, or has values that are not finite.
        TargetError: a pattern that matches nothing. ValueError: no target differs; a rank below 1.
    """
    config = LoRAConfig(targets=targets, exclude=exclude, layers=layers)
    check_settings(r, None, 0.0)
    check_dtype(dtype)
    lowrank.check_iterations(iterations)
    first, second = open_checkpoint(base), open_checkpoint(tuned)
    tables = None if embeddings is None else Patterns(_listed(embeddings))
    root, whole = _skeleton(first, second, Patterns(_listed(also_train)), Patterns(_listed(ignore)), tables)
    everything = walk(root)
    sites = chosen(config, root, everything)
    also = [s for s in everything if s.part is None and s.name in whole]
    building.check_apart(sites, also)
    ranks = PerSite(r, "r")
    rooms = {site.name: _room(first, second, site, ranks.at(site), dtype) for site in sites}
    ranks.finish(rooms)
    rows, unchanged, prints = [], [], []
    for site in sites:
        host, (a, b) = host_of(site), rooms[site.name]
        prints.append(_sampled(site, host, first))
        found = _pairs(host, _difference(first, second, _key(site)), len(a), iterations)
        if found is None:
            unchanged.append(site.name)
            del rooms[site.name]
            continue
        for room, made in zip((a, b), as_stored(host, [(t.a, t.b) for t in found]), strict=True):
            room.copy_(made)
        rows.append(Nearness(site.name, len(a), sum(t.whole for t in found), sum(t.lost for t in found)))
    if not rooms:
        raise ValueError(f"{first.path} and {second.path} do not differ at any of {len(sites)} targets")
    targeted = {_key(site) for site in sites}
    others = (k for k in root.state_dict() if k in first.places and k not in targeted and not _lies_in(k, whole))
    left = [found for key in others if (found := _left_out(first, second, key)) is not None]
    kept = also_trained.build(dict.fromkeys(also), everything)
    for site, adapter in kept.items():
        names = {name: f"{site.name}.{name}" for name in adapter.tensors()}
        adapter.load_tensors({name: second.tensor(key).clone() for name, key in names.items()})
    origin = Origin(joined(prints), os.fspath(base))
    write(root, everything, rooms, {s.name: a for s, a in kept.items()}, out, scale=1.0, origin=origin)
    return Approximation(Path(out), tuple(rows), tuple(left), tuple(unchanged))


def _listed(patterns: Sequence[Pattern] | Pattern) -> Sequence[Pattern]:
    return [patterns] if isinstance(patterns, str | re.Pattern) else list(patterns)


# -- both checkpoints ----------------------------------------------------------------------------------------------------


def _skeleton(
    first: Checkpoint, second: Checkpoint, also: Patterns, ignore: Patterns, embeddings: Patterns | None
) -> tuple[nn.Module, set[str]]:
    """The modules of both, and the paths of those that are to be stored whole.

    Raises:
        StorageError: a tensor that one of them lacks, or that differs in shape. TargetError: a pattern that matches
            nothing.
    """
    whole = _matched("also_train", also, second)
    ignored = _matched("ignore", ignore, first, second)
    shapes: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for one, other, lacks in ((first, second, "the tuned checkpoint"), (second, first, "the base")):
        for key in one.places:
            if _lies_in(key, ignored):
                continue
            if _lies_in(key, whole):
                shapes[key] = (second if key in second.places else first).dtype(key), _shape(first, second, key)
            elif key not in other.places:
                hint = f"also_train={key.rpartition('.')[0]!r} stores it whole, or " if one is second else ""
                raise StorageError(
                    f"{lacks}, {other.path}, has no {key}{other.nearest(key)}; {hint}ignore={key.rpartition('.')[0]!r} "
                    "leaves it out"
                )
            elif first.shape(key) != second.shape(key):
                raise StorageError(
                    f"{key} is {tuple(first.shape(key))} in {first.path} and {tuple(second.shape(key))} in {second.path}; "
                    "the difference of two sizes is no change of a weight"
                )
            else:
                shapes[key] = first.dtype(key), first.shape(key)
    hints = Hints(())
    paths = {key.removesuffix(".weight") for key, (_, s) in shapes.items() if key.endswith(".weight") and len(s) == 2}
    if embeddings is None:
        hints.embeddings = {path for path in paths if _EMBEDDING.fullmatch(path.rpartition(".")[2])}
    else:
        hints.embeddings = _hit("embeddings", embeddings, paths)
    if first.config.get("model_type") in TRANSPOSED:
        hints.transposed = {path for path in paths if path.rpartition(".")[2] in _CONV1D}
    return skeleton(shapes, hints), whole


def _shape(first: Checkpoint, second: Checkpoint, key: str) -> torch.Size:
    if key not in second.places:
        raise StorageError(f"{second.path} has no {key}, of a module that also_train stores whole{second.nearest(key)}")
    return second.shape(key)


def _matched(field: str, patterns: Patterns, *checkpoints: Checkpoint) -> set[str]:
    """The paths of modules that the patterns match, a block with all that lies in it by its own path alone."""
    paths = {key[:at] for c in checkpoints for key in c.places for at, char in enumerate(key) if char == "."}
    found = _hit(field, patterns, paths)
    return {path for path in found if not _lies_in(path, found)}


def _hit(field: str, patterns: Patterns, paths: set[str]) -> set[str]:
    """Those of the paths that the patterns match.

    Raises:
        TargetError: a pattern that matches none.
    """
    used: set[object] = set()
    found = set()
    for path in sorted(paths):
        if hits := patterns.matching(path):
            used.update(hits)
            found.add(path)
    for pattern in patterns.patterns:
        if pattern not in used:
            raise TargetError(f"{field}: {pattern!r} matches no module{nearest(pattern, paths)}")
    return found


def _lies_in(key: str, paths: set[str]) -> bool:
    return any(key[:at] in paths for at, char in enumerate(key) if char == ".")


# -- one tensor ----------------------------------------------------------------------------------------------------------


def _key(site: Site) -> str:
    path = site.name if site.part is None else site.name.removesuffix(site.part).removesuffix(".")
    return f"{path}.{site.weight_name}" if path else site.weight_name


def _sampled(site: Site, host: Host, first: Checkpoint) -> dict[str, Any]:
    """The fingerprint of the base's weight, which the module holds meanwhile.

    Raises:
        StorageError: it is quantised.
    """
    shape = site.module._parameters[site.weight_name]
    assert shape is not None
    put(site.module, site.weight_name, first.tensor(_key(site)))
    try:
        if (reason := host.why_not_dense()) is not None:
            raise StorageError(f"{first.path}: {_key(site)} cannot be subtracted from: {reason}; exclude={site.name!r}")
        return fingerprint({site.name: site})
    finally:
        put(site.module, site.weight_name, shape)


def _room(first: Checkpoint, second: Checkpoint, site: Site, r: int, dtype: torch.dtype | None) -> Matrices:
    """Memory for A and B, taken for all sites before any decomposition: small pieces that stay, taken between large ones
    that go, would keep an allocator from giving the large ones' memory back.
    """
    host = host_of(site)
    if r % host.groups:
        raise ValueError(f"r={r} at {host.name!r} is no multiple of its {host.groups} groups")
    r = min(r, host.groups * min(host.rows, host.cols))
    a, b = (torch.empty(shape, dtype=dtype or _wide(first, second, _key(site))) for shape in host.pair_shapes(r))
    return a, b


def _wide(first: Checkpoint, second: Checkpoint, key: str) -> torch.dtype:
    return torch.promote_types(torch.promote_types(first.dtype(key), second.dtype(key)), torch.float32)


def _difference(first: Checkpoint, second: Checkpoint, key: str) -> Tensor:
    """`tuned − base` in fp32 or wider.

    Raises:
        StorageError: it is not finite, or the tuned one is quantised.
    """
    before, after = first.tensor(key), second.tensor(key)
    if not after.dtype.is_floating_point or after.dtype.itemsize < 2:
        raise StorageError(f"{second.path}: {key} is packed {after.dtype}, expected a dtype of 16 bits or more")
    found = after.to(_wide(first, second, key), copy=True).sub_(before)
    if not torch.isfinite(found).all():
        raise StorageError(f"{key}: {second.path} and {first.path} have no finite difference there")
    return found


def _pairs(host: Host, d: Tensor, r: int, iterations: int | None) -> list[lowrank.Truncated] | None:
    """The nearest pair of each group of the host; None where nothing differs."""
    if not d.any():
        return None
    matrices = host.matrices(d)
    return [lowrank.of_matrix(m, r // len(matrices), iterations=iterations) for m in matrices]


def _left_out(first: Checkpoint, second: Checkpoint, key: str) -> LeftOut | None:
    """How a tensor that is no target differs; None where it does not, but for its dtype."""
    found = compared(first.tensor(key), second.tensor(key))
    return None if found.equal else LeftOut(key, found.largest, found.apart)
