"""Stored LoRAs where no base is at hand: on the skeleton of the modules that their tensors fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftkit import loading
from peftkit.also_train import InPlace
from peftkit.checkpoints.fitting import of_whole_modules
from peftkit.checkpoints.skeleton import Hints, skeleton
from peftkit.hosts import Host
from peftkit.methods.lora import LoRAConfig
from peftkit.pairs import PairAdapter
from peftkit.sites import Site, walk
from peftkit.storage import StorageError, Stored, layout

_OUT = ".base_layer.out_proj"
_PARTS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Pair:
    """The pair that a stored LoRA has at one site. A: (r in), B: (out r) or a convolution's, as in an adapter."""

    host: Host
    a: Tensor
    b: Tensor
    scale: float

    @property
    def crosses(self) -> bool:
        """Whether A reads other groups of a convolution than its own."""
        return self.host.why_not_hold(self.a) is not None

    def matrices(self, *, wide: bool) -> list[tuple[Tensor, Tensor]]:
        """A: (r in) and B: (out r) of each group, in fp64; `wide` gives A all inputs, where it reads its group's alone."""
        groups = self.host.groups
        a = (self.host.to_stored(self.a) if wide else self.a).double()
        b = self.b.double().reshape(groups, self.host.rows, -1)
        return list(zip(a.reshape(groups, b.shape[2], -1), b, strict=True))


@dataclass(frozen=True)
class Implied:
    """Stored LoRAs on one skeleton.

    Attributes:
        root, everything: the skeleton and its sites.
        pairs: of each adapter, by the site's name.
        kept: of each adapter, what it holds whole, by the site's name.
    """

    root: nn.Module
    everything: Sequence[Site]
    pairs: Sequence[dict[str, Pair]]
    kept: Sequence[dict[str, InPlace]]

    @property
    def sites(self) -> dict[str, Site]:
        return {s.name: s for s in self.everything}


def implied(adapters: Sequence[Stored]) -> Implied:
    """The skeleton that these LoRAs fit together, and what they are on it.

    Raises:
        StorageError: one is no LoRA, or relative to a base's values, or two are for modules of different sizes.
    """
    shapes: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    whose: dict[str, Stored] = {}
    attentions = {path for stored in adapters for path in _attentions(stored)}
    for stored in adapters:
        for name, (dtype, shape) in _shapes(stored, attentions).items():
            known = shapes.setdefault(name, (dtype, shape))[1]
            first = whose.setdefault(name, stored)
            if tuple(known) != tuple(shape):
                raise StorageError(
                    f"{stored.path} is for a model of another size than {first.path}: it implies {name} of the shape "
                    f"{tuple(shape)}, the other {tuple(known)}"
                )
    for path in attentions:
        _complete(path, shapes, whose)
    hints = Hints(adapters)
    if any(stored.peft.get("fan_in_fan_out") for stored in adapters):
        matrices = {name.removesuffix(".weight") for name, (_, shape) in shapes.items() if len(shape) == 2}
        hints.transposed = {path for path in matrices if not hints.embeds(path)}
        turned = {f"{path}.weight" for path in hints.transposed}
        shapes = {n: (dtype, tuple(reversed(s)) if n in turned else s) for n, (dtype, s) in shapes.items()}
    root = skeleton(shapes, hints)
    everything = walk(root)
    pairs, kept = [], []
    for stored in adapters:
        # a thing of training, which some hosts cannot do and others have no name for
        stored = dataclasses.replace(stored, config=dataclasses.replace(stored.config, dropout=0.0))
        made = loading.made(stored, "default", everything, trainable=False, check_base=False)
        pairs.append(
            {name: _pair(adapter) for name, adapter in made.adapters.items() if isinstance(adapter, PairAdapter)}
        )
        kept.append({name: adapter for name, adapter in made.adapters.items() if isinstance(adapter, InPlace)})
    return Implied(root, everything, pairs, kept)


def _pair(adapter: PairAdapter) -> Pair:
    a, b = adapter.factors()
    return Pair(adapter.host, a.detach(), b.detach(), adapter.scale)


def _attentions(stored: Stored) -> set[str]:
    """Paths of each MultiheadAttention that shows as one: by its output, whose path no other module's has."""
    paths = map(layout.path_of, stored.sites)
    return {path.removesuffix(_OUT) for path in paths if path.endswith(_OUT)}


def _shapes(stored: Stored, attentions: Container[str]) -> dict[str, tuple[torch.dtype, Sequence[int]]]:
    """Names, dtypes and shapes of the weights that it is for."""
    if not isinstance(stored.config, LoRAConfig):
        raise StorageError(
            f"{stored.path} is {stored.config.method}, not lora, whose change of a weight is a pair of its own; merge it "
            "into its base and extract a LoRA of the difference: merge_checkpoint(base, adapter, merged), then "
            "extract(base, merged, out, r=…)"
        )
    found: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    paths = {layout.path_of(stem): tensors for stem, tensors in stored.sites.items()}
    for path, tensors in paths.items():
        a, b = _factors(stored, path, tensors)
        weight = _weight(stored, path, a, b)
        if "lora_embedding_A" in tensors:
            weight = weight[1], weight[0]
        above, _, last = path.rpartition(".")
        if path in attentions:
            name = f"{path}.in_proj_weight"
        elif above in attentions and last in _PARTS:
            name = f"{path}_weight"
        else:
            name = f"{path.replace(_OUT, '.out_proj')}.weight"
        found[name] = b.dtype, weight
    found.update((name, (t.dtype, t.shape)) for name, t in of_whole_modules(stored))
    for key, rows in stored.tensors.items():
        path, _, ending = key[len(layout.PREFIX) :].rpartition(".token_adapter.")
        ids = next((ids for name, ids in stored.rows.items() if f".{path}".endswith(f".{name}")), None)
        if ending and ids is not None:
            found[f"{path}.weight"] = rows.dtype, (ids[-1] + 1, *rows.shape[1:])
    return found


def _factors(stored: Stored, path: str, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        if a in tensors and b in tensors:
            return tensors[a], tensors[b]
    raise StorageError(f"{stored.file}: {path} has {', '.join(tensors)} alone; the file is not complete")


def _weight(stored: Stored, path: str, a: Tensor, b: Tensor) -> tuple[int, ...]:
    """The shape of the weight that a pair is for, `(out, in)` or a convolution's."""
    if a.dim() < 2 or b.dim() != a.dim() or not a.numel() or not b.numel() or a.shape[0] % b.shape[1]:
        raise StorageError(
            f"{stored.file}: {path} has A and B of the shapes {tuple(a.shape)} and {tuple(b.shape)}, which are no pair"
        )
    groups = a.shape[0] // b.shape[1]
    return b.shape[0], a.shape[1] // groups, *a.shape[2:]


def _complete(path: str, shapes: dict[str, tuple[torch.dtype, Sequence[int]]], whose: Mapping[str, Stored]) -> None:
    """Give a MultiheadAttention the weights that no adapter has a pair for, of sizes that nothing depends on.

    Raises:
        StorageError: one adapter has its projections in one weight, and another in several.
    """
    dtype, (size, _) = shapes[f"{path}.out_proj.weight"]
    whole, parts = f"{path}.in_proj_weight", [f"{path}.{part}_weight" for part in _PARTS]
    apart = next((part for part in parts if part in shapes), None)
    if apart is None:
        shapes.setdefault(whole, (dtype, (3 * size, size)))
        return
    if whole in shapes:
        raise StorageError(
            f"{whose[apart].path} is for another model than {whose[whole].path}: it has {apart}, of projections that are "
            f"separate, the other {whole}, which holds all three"
        )
    for part in parts:
        shapes.setdefault(part, (dtype, (size, size)))
