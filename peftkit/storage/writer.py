"""Writing an adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.also_train import TokenRows, WholeModule
from peftkit.ledger import Attachment
from peftkit.sites import Site, walk
from peftkit.storage import card, layout, tensorfile
from peftkit.storage.config import meaning, to_json
from peftkit.storage.directory import replacing
from peftkit.storage.errors import StorageError
from peftkit.storage.fingerprint import fingerprint


@dataclass(frozen=True)
class Origin:
    """What is known of the base where the model at hand is a skeleton, which has neither its values nor all its modules.

    Attributes:
        fingerprint: of the base.
        name: the base's, as `base_model_name_or_path`.
        task: peft's `task_type`.
    """

    fingerprint: Mapping[str, Any] = field(default_factory=lambda: fingerprint({}))
    name: str | None = None
    task: str | None = None


def save(
    model: nn.Module,
    attachment: Attachment,
    path: str | os.PathLike[str],
    *,
    origin: Origin | None = None,
    base: Mapping[str, Any] | None = None,
) -> None:
    """Write `attachment` of `model` to the directory `path`, replacing the adapter that is there.

    Args:
        origin: for a skeleton; modules are then named in full, since others of the same ends may not be in it.
        base: the fingerprint, for a skeleton that has all modules of its base and stand-ins for its weights.

    Raises:
        StorageError: an adapted module is not in the model any more, a value is not finite or on the meta device, the
            directory cannot be written. What was there is as it was.
    """
    adapted = _adapted(attachment)
    tensors, own, peft = _content(model, attachment, adapted, origin)
    if base is not None:
        own["base"] = dict(base)
    reads = attachment.config.peft_reads and peft["peft_type"] == attachment.config.peft_type
    with replacing(Path(path)) as fresh:
        tensorfile.write(fresh / layout.TENSORS, tensors, _metadata(own))
        (fresh / layout.CONFIG).write_text(json.dumps(peft, indent=2, sort_keys=True) + "\n", "utf-8")
        if _is_ours(Path(path) / layout.README):
            named, sampled = peft["base_model_name_or_path"], len(own["base"]["names"])
            whole = model if origin is None and base is None else None
            said = card.text(whole, attachment, adapted, tensors, base=named, sampled=sampled, peft_reads=reads)
            (fresh / layout.README).write_text(said, "utf-8")


def stored_bytes(model: nn.Module, attachment: Attachment) -> int:
    """The bytes of the tensor file that `save` would write, header and all; nothing is written.

    Raises:
        StorageError: as `save`, but for values that are not finite.
    """
    tensors, own, _ = _content(model, attachment, _adapted(attachment), None)
    return tensorfile.size(tensors, _metadata(own))


def _content(
    model: nn.Module, attachment: Attachment, adapted: dict[str, Site], origin: Origin | None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The tensors, what their file says of them in its metadata, and `adapter_config.json`."""
    everything = walk(model)
    _check_in_place(attachment, everything)
    tensors = _tensors(attachment, adapted)
    peft = _config(model, attachment, adapted, everything, origin)
    own = {
        "version": 1,
        "config": to_json(attachment.config, list(adapted)),
        "peft": meaning(peft),
        "base": fingerprint(adapted) if origin is None else dict(origin.fingerprint),
    }
    if attachment.config.whole_keys:
        own["sites"] = list(adapted)
    return tensors, own, peft


def _metadata(own: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", "peftkit": json.dumps(own, sort_keys=True, separators=(",", ":"))}


def _is_ours(readme: Path) -> bool:
    """Whether there is none, or one that nobody has edited."""
    if not os.path.lexists(readme):
        return True
    return readme.is_file() and not readme.is_symlink() and card.unedited(readme.read_text("utf-8", errors="replace"))


def _adapted(attachment: Attachment) -> dict[str, Site]:
    return {
        name: site
        for name, site in attachment.sites.items()
        if not isinstance(adapter := attachment.adapters[name], WholeModule | TokenRows) and not adapter.beside
    }


def _check_in_place(attachment: Attachment, everything: list[Site]) -> None:
    there = {id(s.module) for s in everything}
    for name, site in attachment.sites.items():
        if id(site.module) not in there:
            raise StorageError(
                f"{name!r} that carries the adapter {attachment.name!r} is no longer in the model: something "
                f"has replaced that {type(site.module).__name__}, and its adapter with it; attach after replacing"
            )


@torch.no_grad()
def _tensors(attachment: Attachment, adapted: dict[str, Site]) -> dict[str, Tensor]:
    tensors = attachment.config.whole_tensors({name: attachment.adapters[name] for name in adapted})
    for key, value in tensors.items():
        _check_there(key, value)
    for name, adapter in attachment.adapters.items():
        stem = layout.stem(attachment.sites[name])
        for key, value in adapter.tensors().items():
            _check_there(stem + key, value)
            tensors[layout.in_file(stem + key, attachment.config.key_prefix)] = value
    return tensors


def _check_there(key: str, value: Tensor) -> None:
    if value.is_meta:
        raise StorageError(f"{key} is on the meta device and has no values; reset(model) or load first")


def _config(
    model: nn.Module,
    attachment: Attachment,
    adapted: dict[str, Site],
    everything: list[Site],
    origin: Origin | None,
) -> dict[str, Any]:
    whole = [n for n, a in attachment.adapters.items() if isinstance(a, WholeModule)]
    rows = {
        layout.module_path(attachment.sites[n]): list(a.which)
        for n, a in attachment.adapters.items()
        if isinstance(a, TokenRows) and not a.tied
    }
    by_path: dict[str, Any] = {}
    for name, site in adapted.items():  # to peft, the parts of a MultiheadAttention are one
        by_path.setdefault(layout.module_path(site), attachment.adapters[name])
    if origin is None:
        name, task = (
            getattr(getattr(model, "config", None), "_name_or_path", None),
            attachment.config.peft_task(model, whole),
        )
        modules = layout.target_modules(adapted.values(), everything)
    else:
        name, task, modules = origin.name, origin.task, sorted({layout.module_path(s) for s in adapted.values()})
    config = {
        "peft_type": attachment.config.peft_type,
        "auto_mapping": None,
        "base_model_name_or_path": name or None,
        "inference_mode": True,
        "modules_to_save": whole or None,
        "revision": None,
        "target_modules": modules,
        "task_type": task,
        **attachment.config.to_peft(by_path),
    }
    if not any(attachment.adapters[name].stored_shapes() for name in adapted):
        del config["target_modules"]  # peft's configs of methods without tensors of single modules know no such key
    if rows:
        config["trainable_token_indices"] = rows
    return config
