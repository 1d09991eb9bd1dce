"""Writing an adapter."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peftkit.also_train import TokenRows, WholeModule
from peftkit.ledger import Attachment
from peftkit.sites import Site, walk
from peftkit.storage import layout
from peftkit.storage.digest import digest
from peftkit.storage.errors import StorageError
from peftkit.storage.fingerprint import fingerprint


def save(model: nn.Module, attachment: Attachment, path: str | os.PathLike[str]) -> None:
    """Write `attachment` of `model` to the directory `path`, replacing the adapter that is there.

    Raises:
        StorageError: an adapted module is not in the model any more, a value is not finite, or is on the meta device.
    """
    from peftkit.storage.directory import replacing

    everything = walk(model)
    _check_in_place(attachment, everything)
    tensors = _tensors(attachment)
    config = _config(model, attachment, everything)
    own = {
        "version": 1,
        "config": to_json(attachment.config, attachment),
        "base": fingerprint(_adapted(attachment)),
        "digest": digest(tensors, config),
    }
    with replacing(Path(path)) as fresh:
        save_file(tensors, fresh / layout.TENSORS, {"format": "pt", "peftkit": json.dumps(own, sort_keys=True)})
        (fresh / layout.TENSORS).chmod(0o666 & ~_umask_of(fresh))
        (fresh / layout.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if not (Path(path) / layout.README).exists():
            (fresh / layout.README).write_text(_readme(config, tensors))


def _adapted(attachment: Attachment) -> dict[str, Site]:
    return {
        name: site
        for name, site in attachment.sites.items()
        if not isinstance(attachment.adapters[name], WholeModule | TokenRows)
    }


def _check_in_place(attachment: Attachment, everything: list[Site]) -> None:
    there = {id(s.module) for s in everything}
    for name, site in attachment.sites.items():
        if id(site.module) not in there:
            raise StorageError(
                f"{name!r} that carries the adapter {attachment.name!r} is no longer in the model: something has replaced "
                f"that {type(site.module).__name__}, and its adapter with it; attach after replacing modules"
            )


def _tensors(attachment: Attachment) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, adapter in attachment.adapters.items():
        stem = layout.stem(attachment.sites[name])
        for key, value in adapter.tensors().items():
            if value.is_meta:
                raise StorageError(f"{stem}{key} is on the meta device and has no values; reset(model) or load first")
            tensors[stem + key] = value.contiguous().cpu()
    floating = [(k, t) for k, t in tensors.items() if t.is_floating_point()]
    for key, t in floating:
        if not torch.isfinite(t).all():
            raise StorageError(f"{key} has values that are not finite; nothing was written")
    seen: dict[int, str] = {}
    for key, t in tensors.items():  # what shares memory, as tied copies do, is stored once for each name
        at = t.untyped_storage().data_ptr()
        if at in seen and t.numel():
            tensors[key] = t.clone()
        seen[at] = key
    return tensors


def _config(model: nn.Module, attachment: Attachment, everything: list[Site]) -> dict[str, Any]:
    adapted = _adapted(attachment)
    whole = [n for n, a in attachment.adapters.items() if isinstance(a, WholeModule)]
    rows = {
        layout.module_path(attachment.sites[n]): a.ids.tolist()  # type: ignore[union-attr]
        for n, a in attachment.adapters.items()
        if isinstance(a, TokenRows) and not a.tied
    }
    config = {
        "peft_type": attachment.config.peft_type,
        "auto_mapping": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "modules_to_save": whole or None,
        "revision": None,
        "target_modules": layout.target_modules(adapted.values(), everything),
        "task_type": None,
        **attachment.config.to_peft({n: attachment.adapters[n] for n in adapted}),
    }
    if rows:
        config["trainable_token_indices"] = rows
    return config


def to_json(config: Any, attachment: Attachment) -> dict[str, Any]:
    """The config with everything that peft's does not tell; predicates become the names they chose."""
    found = {}
    for key in sorted(config.keys()):
        value = getattr(config, key)
        if key in ("targets", "exclude"):
            parts = value if isinstance(value, tuple) else (value,)
            if any(callable(p) or isinstance(p, re.Pattern) for p in parts):
                value = [f"^{n}" for n in _adapted(attachment)] if key == "targets" else None
        elif isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
        found[key] = value
    return {"method": config.method, **found}


def _readme(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    base = config["base_model_name_or_path"]
    count = sum(t.numel() for t in tensors.values())
    head = "---\nlibrary_name: peft\ntags:\n- peftkit\n" + (f"base_model: {base}\n" if base else "") + "---\n\n"
    return (
        f"{head}# Adapter\n\n{config['peft_type']}, {count:,} parameters"
        f"{f' on {base}' if base else ''}. Load it into the base model:\n\n"
        "```python\nimport peftkit\npeftkit.load(model, \"path/to/this/directory\")\n```\n\n"
        "peft reads it as well: `PeftModel.from_pretrained(model, \"path/to/this/directory\")`.\n"
    )


def _umask_of(directory: Path) -> int:
    return ~directory.stat().st_mode & 0o777
