"""What is in a stored adapter: read from its directory alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from peftkit import storage
from peftkit.checkpoints import lowrank
from peftkit.checkpoints.implied import implied
from peftkit.checkpoints.weighting import Folder
from peftkit.printing import printed
from peftkit.storage import StorageError, Stored, layout
from peftkit.storage.config import to_json

if TYPE_CHECKING:
    from rich.console import Group

_SHARED = ("targets", "exclude", "layers", "also_train", "method")  # of every config; the sites say what they mean


class Part(NamedTuple):
    """What it has at one module: the rank of a pair or None, numbers and bytes, and a norm.

    `norm` is ‖ΔW‖ in the Frobenius norm where the tensors are a plain pair, else that of all its tensors together.
    """

    name: str
    kind: str
    rank: int | None
    parameters: int
    bytes: int
    norm: float


@dataclass(frozen=True)
class Inspection:
    """What `inspect` returns.

    Attributes:
        path: the directory.
        method, peft_type: ours and peft's names of it.
        settings: of its config.
        parts: one for each module, in the order of the file.
        dtypes: of its tensors.
        base: name of the model it was trained on; None where the file does not say.
        fingerprint: eight digits that tell one base from another, and how many weights were sampled; None without.
        sealed: whether it has a checksum, which then is that of its bytes.
        changes: whether the norms are of ΔW.
    """

    path: Path
    method: str
    peft_type: str
    settings: Mapping[str, Any]
    parts: Sequence[Part]
    dtypes: Sequence[str]
    base: str | None
    fingerprint: tuple[str, int] | None
    sealed: bool
    changes: bool

    @property
    def parameters(self) -> int:
        return sum(p.parameters for p in self.parts)

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        fields = {k: v for k, v in vars(self).items() if k not in ("parts", "changes", "path")}
        norm = "change" if self.changes else "tensors"
        return {
            "path": str(self.path),
            **fields,
            "dtypes": list(self.dtypes),
            "fingerprint": self.fingerprint and {"digits": self.fingerprint[0], "weights": self.fingerprint[1]},
            "parameters": self.parameters,
            "bytes": self.bytes,
            "norm_of": norm,
            "parts": [p._asdict() for p in self.parts],
        }

    def __str__(self) -> str:
        return printed(self)

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table()
        table.add_column("where", overflow="fold")
        table.add_column("what")
        for title in ("rank", "parameters", "bytes", "‖ΔW‖" if self.changes else "norm of the tensors"):
            table.add_column(title, justify="right")
        for name, parts in self._grouped():
            first = parts[0]
            norms = sorted({f"{p.norm:.3g}" for p in parts}, key=float)
            shown = norms[0] if len(norms) == 1 else f"{norms[0]} … {norms[-1]}"
            rank = "" if first.rank is None else str(first.rank)
            count, size = sum(p.parameters for p in parts), sum(p.bytes for p in parts)
            table.add_row(name, first.kind, rank, f"{count:,}", f"{size:,}", shown)
        return Group(Text(self.heading()), table, Text(self.summary()))

    def heading(self) -> str:
        """What it is and where."""
        settings = ", ".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.path}: {self.method}" + (f" ({settings})" if settings else "")

    def summary(self) -> str:
        """Totals, and what is known of the base."""
        base = f"trained on {self.base}" if self.base else "it does not name its base"
        if self.fingerprint:
            base += f", known by {self.fingerprint[1]} of its weights ({self.fingerprint[0]})"
        seal = "checksum right" if self.sealed else "no checksum"
        dtypes = ", ".join(self.dtypes)
        return f"{self.parameters:,} parameters, {self.bytes:,} bytes of {dtypes}; {seal}\n{base}"

    def _grouped(self) -> list[tuple[str, list[Part]]]:
        """Modules that differ in their block's number alone share a line."""
        groups: dict[tuple[Any, ...], list[Part]] = {}
        for p in self.parts:
            name = ".".join("*" if c.isdigit() else c for c in p.name.split("."))
            groups.setdefault((name, p.kind, p.rank, p.parameters, p.bytes), []).append(p)
        return [(k[0] + f" ×{len(ps)}" if len(ps) > 1 else ps[0].name, ps) for k, ps in groups.items()]


def inspect(adapter: Folder) -> Inspection:
    """What is in a stored adapter, peftkit's own or peft's.

    Raises:
        StorageError: it cannot be read.
    """
    stored = storage.read(adapter)
    changes = _changes(stored)
    parts = [_part(layout.path_of(stem), stored, tensors, changes) for stem, tensors in stored.sites.items()]
    rest: dict[str, dict[str, Tensor]] = {}
    taken = {stem + key for stem, tensors in stored.sites.items() for key in tensors}
    for key, value in stored.tensors.items():
        if key not in taken:
            module, _, last = key.removeprefix(layout.PREFIX).rpartition(".")
            rest.setdefault(module.removesuffix(".token_adapter"), {})[last] = value
    kinds = dict.fromkeys(rest, "whole") | {name: f"{len(ids)} rows" for name, ids in stored.rows.items()}
    parts += [_sum(name, kinds[name], None, tensors.values()) for name, tensors in rest.items()]
    if stored.of_all:
        parts.append(_sum("(all together)", stored.config.method, None, stored.of_all.values()))
    everything = [*stored.tensors.values(), *stored.of_all.values()]
    settings = to_json(stored.config, [layout.path_of(s) for s in stored.sites])
    return Inspection(
        stored.path,
        stored.config.method,
        stored.peft["peft_type"],
        {k: _short(v) for k, v in settings.items() if k not in _SHARED and v not in (None, [], {})},
        parts,
        sorted({str(t.dtype).removeprefix("torch.") for t in everything}),
        stored.peft.get("base_model_name_or_path") or None,
        _fingerprint(stored),
        stored.own,
        changes is not None,
    )


def _changes(stored: Stored) -> dict[str, float] | None:
    """‖ΔW‖ by site, where all are plain pairs."""
    try:
        pairs = implied([stored]).pairs[0]
    except StorageError:
        return None
    found = {}
    for name, pair in pairs.items():
        square = sum(lowrank.inner(one, one) for one in pair.matrices(wide=False))
        found[name] = abs(pair.scale) * math.sqrt(max(0.0, square))
    return found


def _part(path: str, stored: Stored, tensors: Mapping[str, Tensor], changes: Mapping[str, float] | None) -> Part:
    a = next((t for key, t in tensors.items() if key.endswith(("lora_A.weight", "lora_embedding_A"))), None)
    part = _sum(path, stored.config.method, None if a is None else a.shape[0], tensors.values())
    if changes is None:
        return part
    named = [path, path.replace(".base_layer.out_proj", ".out_proj"), f"{path}.in_proj" if path else "in_proj"]
    return part._replace(norm=next((changes[n] for n in named if n in changes), part.norm))


def _sum(name: str, kind: str, rank: int | None, tensors: Any) -> Part:
    tensors = list(tensors)
    norm = math.sqrt(math.fsum(lowrank.square_norm(t) for t in tensors))
    return Part(name, kind, rank, sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors), norm)


def _fingerprint(stored: Stored) -> tuple[str, int] | None:
    if stored.base is None or not stored.base["names"]:
        return None
    text = json.dumps(stored.base, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=4).hexdigest(), len(stored.base["names"])


def _short(value: Any) -> Any:
    """Settings by pattern, of which a config may hold one for each module, as their range."""
    if isinstance(value, dict) and "items" in value:
        numbers = sorted({v for _, v in value["items"] if isinstance(v, int | float)})
        if numbers and len(numbers) <= len(value["items"]):
            return numbers[0] if len(numbers) == 1 else f"{numbers[0]} … {numbers[-1]}"
        return {str(k): v for k, v in value["items"]}
    if isinstance(value, dict):
        return next(iter(value.values()))
    return value
