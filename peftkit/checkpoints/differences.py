"""How two stored adapters differ, or two checkpoints: by what they do to weights where that can be told, else by tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from peftkit import storage
from peftkit.checkpoints import lowrank
from peftkit.checkpoints.blockwise import compared
from peftkit.checkpoints.files import open_checkpoint
from peftkit.checkpoints.implied import Pair, implied
from peftkit.checkpoints.saying import plain, some
from peftkit.methods.lora import LoRAConfig
from peftkit.printing import printed
from peftkit.storage import Stored, layout
from peftkit.storage.config import meaning
from peftkit.storage.fingerprint import disagreeing

if TYPE_CHECKING:
    from rich.console import Group

T = TypeVar("T")


class Apart(NamedTuple):
    """One change ΔW, or one tensor, that both have.

    Attributes:
        name: of the site, or of the tensor.
        distance: ‖a − b‖ / ‖a‖, in the Frobenius norm; infinite where a is zero and b is not, NaN where shapes differ or
            the two differ and a number is not finite.
        cosine: ⟨a, b⟩ / ‖a‖‖b‖; NaN where one of them is zero, shapes differ or a number is not finite.
        largest: the largest difference of one number; NaN for changes, which are not computed dense, and where it is.
        same: whether nothing differs: of tensors neither a number nor the dtype, where NaN is the same as NaN of the
            same bits. Of changes nothing but what they do to the weight counts.
        dtypes: of tensors, both by name.
    """

    name: str
    distance: float
    cosine: float
    largest: float = math.nan
    same: bool = False
    dtypes: tuple[str, str] | None = None


@dataclass(frozen=True)
class Difference:
    """What `difference` returns.

    Attributes:
        a, b: the directories.
        kind: `"adapters"` or `"checkpoints"`.
        settings: field of `adapter_config.json` -> its values in a and b, where they differ in more than spelling.
        only_a, only_b: names of sites, or tensors, that one of them has.
        common: what both have.
        bases: sites at which the adapters were saved from different base weights.
    """

    a: Path
    b: Path
    kind: str
    settings: Mapping[str, tuple[Any, Any]]
    only_a: Sequence[str]
    only_b: Sequence[str]
    common: Sequence[Apart]
    bases: Sequence[str] = ()

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.settings or self.only_a or self.only_b or self.bases) and all(c.same for c in self.common)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it; what is no finite number is None."""
        return plain(
            {
                "a": str(self.a),
                "b": str(self.b),
                "kind": self.kind,
                "same": self.same,
                "settings": dict(self.settings),
                "only_a": list(self.only_a),
                "only_b": list(self.only_b),
                "common": [c._asdict() for c in self.common],
                "bases": list(self.bases),
            }
        )

    def __str__(self) -> str:
        return printed(self)

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        parts: list[Any] = []
        if self.settings:
            table = Table("setting", "a", "b")
            for key, values in self.settings.items():
                table.add_row(key, *map(repr, values))
            parts.append(table)
        apart = [c for c in self.common if not c.same]
        if apart:
            table = Table()
            table.add_column("where", overflow="fold")
            for title in ("‖a − b‖ / ‖a‖", "cosine", "largest difference", "dtypes"):
                table.add_column(title, justify="right")
            for c in apart:
                table.add_row(c.name or "(the model)", *map(_shown, (c.distance, c.cosine, c.largest)), _dtypes(c))
            parts.append(table)
        return Group(*parts, self.summary())

    def summary(self) -> str:
        """A line for each kind of difference."""
        what = "sites and tensors" if self.kind == "adapters" else "tensors"
        alike = sum(c.same for c in self.common)
        lines = [f"{alike} of {len(self.common)} {what} in common are the same"]
        for where, names in ((f"in {self.a} alone", self.only_a), (f"in {self.b} alone", self.only_b)):
            if names:
                lines.append(f"{len(names)} {where}: {some(names)}")
        if self.bases:
            lines.append(f"saved from different bases: the weights of {some(self.bases)} differ")
        return "\n".join(lines)


def difference(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Difference:
    """How two stored adapters differ, or two checkpoints.

    Of two LoRAs the changes ΔW are compared, site by site, from their factors, in fp64 and without a dense ΔW: adapters of
    different factors, ranks or alphas that make the same change are at a distance of rounding. Of other methods, of what
    is stored whole, and of checkpoints, the tensors are.

    Raises:
        StorageError: a directory that cannot be read. ValueError: one is an adapter, and the other is none.
    """
    kinds = [_is_adapter(Path(path)) for path in (a, b)]
    if kinds[0] != kinds[1]:
        one, other = (a, b) if kinds[0] else (b, a)
        raise ValueError(f"{one} is an adapter, and {other} is none; compare two adapters, or two checkpoints")
    if not kinds[0]:
        first, second = open_checkpoint(a), open_checkpoint(b)
        found = _compared(
            first.places, second.places, lambda k, *_: _tensors_apart(k, first.tensor(k), second.tensor(k))
        )
        return Difference(first.path, second.path, "checkpoints", {}, *found)
    one, other = storage.read(a), storage.read(b)
    if isinstance(one.config, LoRAConfig) and isinstance(other.config, LoRAConfig):
        left, right = implied([one]), implied([other])  # both are held: a pair's host is of its skeleton
        changes = _compared(left.pairs[0], right.pairs[0], _changes_apart)
        tensors = _compared(_unpaired(one), _unpaired(other), _tensors_apart)
        found = changes[0] + tensors[0], changes[1] + tensors[1], changes[2] + tensors[2]
    else:
        found = _compared(_everything(one), _everything(other), _tensors_apart)
    bases = disagreeing(one.base, other.base) if one.base is not None and other.base is not None else []
    return Difference(one.path, other.path, "adapters", _settings(one, other), *found, bases)


def _is_adapter(path: Path) -> bool:
    return any((folder / layout.CONFIG).exists() for folder in (path, path / "default"))


def _compared(
    left: Mapping[str, T], right: Mapping[str, T], compare: Callable[[str, T, T], Apart]
) -> tuple[list[str], list[str], list[Apart]]:
    """Names that the first has alone, and the second, in their orders; and what both have, compared."""
    return (
        [n for n in left if n not in right],
        [n for n in right if n not in left],
        [compare(n, left[n], right[n]) for n in left if n in right],
    )


def _settings(one: Stored, other: Stored) -> dict[str, tuple[Any, Any]]:
    """Fields that differ; what is empty, off or zero is as if it were not there, and lists of modules have no order."""

    def plain(value: Any) -> Any:
        return (sorted(map(str, value)) if isinstance(value, list) else value) or None

    left, right = meaning(one.peft), meaning(other.peft)
    keys = sorted(left.keys() | right.keys())
    return {k: (left.get(k), right.get(k)) for k in keys if plain(left.get(k)) != plain(right.get(k))}


# -- what is compared ----------------------------------------------------------------------------------------------------


def _everything(stored: Stored) -> dict[str, Tensor]:
    return {key.removeprefix(layout.PREFIX): t for key, t in (*stored.tensors.items(), *stored.of_all.items())}


def _unpaired(stored: Stored) -> dict[str, Tensor]:
    """The tensors that belong to no pair."""
    paired = {stem + key for stem, tensors in stored.sites.items() for key in tensors}
    return {key.removeprefix(layout.PREFIX): t for key, t in stored.tensors.items() if key not in paired}


def _changes_apart(name: str, one: Pair, other: Pair) -> Apart:
    if one.scale == other.scale and _equal(one.a, other.a) and _equal(one.b, other.b):
        return Apart(name, 0.0, 1.0 if one.b.any() and one.a.any() else math.nan, same=True)
    left, right = ([(a, b * p.scale) for a, b in p.matrices(wide=True)] for p in (one, other))
    if [(a.shape[1], len(b)) for a, b in left] != [(a.shape[1], len(b)) for a, b in right]:
        return Apart(name, math.nan, math.nan)
    apart = size = other_size = product = 0.0
    for (a1, b1), (a2, b2) in zip(left, right, strict=True):
        apart += lowrank.of_product(torch.cat([b1, -b2], dim=1), torch.cat([a1, a2]), None).whole
        size += lowrank.of_product(b1, a1, None).whole
        other_size += lowrank.of_product(b2, a2, None).whole
        product += lowrank.inner((a1, b1), (a2, b2))
    return Apart(name, *_measures(apart, size, other_size, product), same=apart == 0)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.double(), other.double())


def _tensors_apart(name: str, one: Tensor, other: Tensor) -> Apart:
    dtypes = str(one.dtype).removeprefix("torch."), str(other.dtype).removeprefix("torch.")
    if one.shape != other.shape:
        return Apart(name, math.nan, math.nan, dtypes=dtypes)
    found = compared(one, other)
    measures = _measures(found.apart, found.a, found.b, found.product)
    if found.equal:
        measures = 0.0, measures[1]  # of infinite norms it would be NaN
    return Apart(name, *measures, found.largest, found.equal and dtypes[0] == dtypes[1], dtypes)


def _measures(apart: float, size: float, other: float, product: float) -> tuple[float, float]:
    """Distance and cosine, from squared norms and the inner product."""
    distance = math.sqrt(apart / size) if size else 0.0 if not apart else math.inf
    cosine = product / (math.sqrt(size) * math.sqrt(other)) if size and other else math.nan
    return distance, max(-1.0, min(1.0, cosine)) if not math.isnan(cosine) else cosine


def _shown(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _dtypes(apart: Apart) -> str:
    return " → ".join(apart.dtypes) if apart.dtypes and apart.dtypes[0] != apart.dtypes[1] else ""
