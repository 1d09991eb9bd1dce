"""Reading an adapter, strictly: what does not fit is an error that names it, before the model is touched."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftkit.also_train import TokenRows, WholeModule
from peftkit.ledger import Attachment
from peftkit.method import Config, method_for
from peftkit.sites import Site
from peftkit.storage import layout
from peftkit.storage.digest import digest
from peftkit.storage.errors import StorageError
from peftkit.storage.fingerprint import differing
from peftkit.targets import nearest

_ROWS = "token_adapter.trainable_tokens_delta"


@dataclass
class Stored:
    """An adapter as read: nothing in it has met a model yet.

    Attributes:
        config: of its method.
        tensors: by their key in the file.
        sites: stem of the keys -> the tensors behind it, for what the method adapts.
        base: the fingerprint of its base; None in files of others.
        complete: whether a path must have tensors if the file's lists mean it.
    """

    path: Path
    config: Config
    tensors: dict[str, Tensor]
    sites: dict[str, dict[str, Tensor]]
    whole: list[str]
    rows: Mapping[str, Sequence[int]]
    base: dict[str, Any] | None
    peft: dict[str, Any]


def read(path: str | os.PathLike[str], *, name: str = "default") -> Stored:
    """Read the directory `path`, or `path/name` as peft lays named adapters out.

    Raises:
        StorageError: a file that is missing, truncated or damaged, an unknown method.
    """
    folder = Path(path)
    if not (folder / layout.CONFIG).exists() and (folder / name / layout.CONFIG).exists():
        folder = folder / name
    peft = _read_config(folder)
    tensors, metadata = _read_tensors(folder)
    try:
        method = method_for(str(peft.get("peft_type")))
        own = json.loads(metadata["peftkit"]) if "peftkit" in metadata else None
        if own is not None:
            _check_digest(folder, own, tensors, peft)
        whole = [str(m) for m in peft.get("modules_to_save") or ()]
        rows = peft.get("trainable_token_indices") or {}
        if not isinstance(rows, Mapping):
            rows = {"embed_tokens": rows}
        sites = _group(tensors, method, whole)
        config = _own_config(method, own["config"]) if own else method.from_peft(peft, _site_shapes(sites))
    except StorageError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StorageError(f"{folder / layout.CONFIG}: {error}") from error
    return Stored(folder, config, tensors, sites, whole, rows, own["base"] if own else None, peft)


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
    found = []
    for stem, tensors in stored.sites.items():
        if stem not in by_stem:
            key = stem + next(iter(tensors))
            names = [s.name for s in by_stem.values()]
            raise StorageError(
                f"{stored.path / layout.TENSORS}: unexpected {key}: the model has no module for it to adapt"
                f"{nearest(stem[len(layout.PREFIX):-1], names)}"
            )
        found.append(by_stem[stem])
    if stored.base is None:
        _check_complete(stored, found, by_stem)
    elif check_base:
        wrong = differing(stored.base, {s.name: s for s in found})
        if wrong:
            raise StorageError(
                f"{stored.path} was saved from another base: the weight of {wrong[0]!r} differs"
                f"{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}; load the base it was trained on, or pass "
                "check_base=False if you are sure"
            )
    also: dict[Site, Sequence[int] | None] = {}
    for wanted, ids in [*((w, None) for w in stored.whole), *stored.rows.items()]:
        hits = [
            s for s in everything
            if s.part is None and any(n == wanted or n.endswith("." + wanted) for n in s.names)
        ]
        if not hits:
            raise StorageError(f"{stored.path}: the model has no module {wanted!r}{nearest(wanted, [s.name for s in everything])}")
        also.update(dict.fromkeys(hits, ids))
    order = {id(s): i for i, s in enumerate(everything)}
    return sorted(found, key=lambda s: order[id(s)]), also


def fill(stored: Stored, attachment: Attachment) -> None:
    """Give the adapters their tensors.

    Raises:
        StorageError: a tensor that is missing, misshapen, of no floating dtype or not finite, or left over.
    """
    file = stored.path / layout.TENSORS
    left = set(stored.tensors)
    for name, adapter in attachment.adapters.items():
        site = attachment.sites[name]
        stems = [layout.stem(site), *(f"{layout.PREFIX}{a}." for a in site.aliases if site.part is None)]
        taken = {}
        for key, expected in adapter.stored_shapes().items():
            stem = next((s for s in stems if s + key in stored.tensors), None)
            if stem is None:
                raise StorageError(f"{file}: missing {stems[0]}{key}; the file is not complete, or for another model")
            taken[key] = tensor = stored.tensors[stem + key]
            left.discard(stem + key)
            if tensor.shape not in expected:
                raise StorageError(
                    f"{file}: {stem}{key} has shape {tuple(tensor.shape)}, expected {tuple(expected[0])}; "
                    "the adapter belongs to a model of another size"
                    + ("" if not isinstance(adapter, WholeModule | TokenRows) else ", or one with resized embeddings")
                )
        adapter.load_tensors(taken)
    if left:
        raise StorageError(f"{file}: unexpected {min(left)}{f' and {len(left) - 1} more' if len(left) > 1 else ''}")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / layout.CONFIG
    if not file.exists():
        raise StorageError(f"{file} is missing; {folder} {'is not an adapter' if folder.is_dir() else 'is no directory'}")
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict) or "peft_type" not in found:
        raise StorageError(f"{file} names no peft_type, so it cannot be told what the adapter is")
    return found


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    file = folder / layout.TENSORS
    if not file.exists():
        pickled = folder / "adapter_model.bin"
        also = f"; {pickled.name} is a pickle, which is not read: convert it to safetensors" if pickled.exists() else ""
        raise StorageError(f"{file} is missing{also}")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise StorageError(f"{file} cannot be read, it is truncated or damaged: {error}") from error
    if not tensors:
        raise StorageError(f"{file} holds no tensors")
    for key, t in tensors.items():
        if not t.is_floating_point() and ".lora_" in key:
            raise StorageError(f"{file}: {key} is {t.dtype}, expected a floating-point dtype")
    return tensors, metadata


def _check_digest(folder: Path, own: dict[str, Any], tensors: Mapping[str, Tensor], peft: Mapping[str, Any]) -> None:
    if digest(tensors, peft) != own["digest"]:
        raise StorageError(
            f"{folder}: the checksum of the tensors and {layout.CONFIG} is not the one they were saved with: one of the "
            "files is damaged, edited, or from another save; save again or restore both"
        )


def _group(tensors: Mapping[str, Tensor], method: type[Config], whole: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Stem -> tensors, for keys that end as the method's do."""
    found: dict[str, dict[str, Tensor]] = {}
    endings = method.tensor_endings()
    wholes = re.compile("|".join(rf"(.*\.)?{re.escape(w)}\..*" for w in whole)) if whole else None
    for key, t in tensors.items():
        ending = next((e for e in endings if key.endswith("." + e)), None)
        if not key.startswith(layout.PREFIX):
            raise StorageError(f"unexpected {key}: keys begin with {layout.PREFIX!r}")
        if ending is not None:
            found.setdefault(key[: -len(ending)], {})[ending] = t
            if not torch.isfinite(t).all():
                raise StorageError(f"{key} has values that are not finite")
        elif not key.endswith(_ROWS) and not (wholes and wholes.fullmatch(key)):
            raise StorageError(f"unexpected {key}: {method.__name__} has tensors {', '.join(endings)}")
    return found


def _site_shapes(sites: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, torch.Size]]:
    # MultiheadAttention's own names differ; patterns are never needed for it, since its stems are unique
    return {
        stem[len(layout.PREFIX) : -1].replace("base_layer.", ""): {k: t.shape for k, t in tensors.items()}
        for stem, tensors in sites.items()
    }


def _own_config(method: type[Config], found: Mapping[str, Any]) -> Config:
    kwargs = {k: v for k, v in found.items() if k != "method"}
    if isinstance(kwargs.get("dtype"), str):
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    unknown = set(kwargs) - method.keys()
    if unknown:
        raise StorageError(f"written by a later peftkit: {method.__name__} knows no {', '.join(sorted(unknown))}")
    return method(**kwargs)


def _check_complete(stored: Stored, found: Sequence[Site], by_stem: Mapping[str, Site]) -> None:
    """peft writes no list of tensors, but its config names modules: each that the model has must have its own."""
    means, have = layout.peft_targets(stored.peft), {id(s.module) for s in found}
    for stem, site in by_stem.items():
        if means(layout.module_path(site)) and id(site.module) not in have:
            raise StorageError(
                f"{stored.path / layout.TENSORS}: no tensors for {stem[len(layout.PREFIX):-1]!r}, which target_modules of "
                f"{layout.CONFIG} names; the file is not complete, or for another model"
            )
