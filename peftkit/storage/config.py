"""Both forms of a config in JSON: our own, whole, in the tensor file; and peft's, in `adapter_config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peftkit.method import Config
from peftkit.storage import layout
from peftkit.storage.errors import StorageError
from peftkit.storage.jsonfile import read_object

# fields that others fill in or change without changing the adapter
_INCIDENTAL = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
)


def to_json(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """Every field of `config`; a predicate becomes the names that it chose.

    Raises:
        StorageError: a field that JSON cannot hold.
    """
    found = {}
    for key in sorted(config.keys()):
        value = getattr(config, key)
        if key in ("targets", "exclude"):
            parts = value if isinstance(value, tuple) else (value,)
            if any(callable(p) for p in parts):
                value = [f"^{n}" for n in names] if key == "targets" else None
        found[key] = _plain(value, key)
    return {"method": config.method, **found}


def from_json(method: type[Config], found: Mapping[str, Any]) -> Config:
    """The inverse."""
    kwargs = {k: _rich(v) for k, v in found.items() if k != "method"}
    unknown = set(kwargs) - method.keys()
    if unknown:
        raise StorageError(f"written by a later peftkit: {method.__name__} knows no {', '.join(sorted(unknown))}")
    return method(**kwargs)


def _plain(value: Any, key: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, re.Pattern):
        return {"regex": value.pattern, "flags": value.flags}
    if isinstance(value, Mapping):
        return {"items": [[_plain(k, key), _plain(v, key)] for k, v in value.items()]}
    if isinstance(value, Sequence | set | frozenset | range):
        return [_plain(v, key) for v in value]
    if hasattr(value, "tolist"):  # numpy's and torch's numbers and arrays
        return value.tolist()
    raise StorageError(f"the config's {key} holds a {type(value).__name__}, which cannot be stored")


def _rich(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_rich(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "dtype" in value:
        dtype = getattr(torch, value["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"torch has no dtype {value['dtype']!r}")
        return dtype
    if "regex" in value:
        return re.compile(value["regex"], value["flags"])
    return {_rich(k): _rich(v) for k, v in value["items"]}


def read(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` says.

    Raises:
        StorageError: it is missing, no JSON, or names no `peft_type`.
    """
    file = folder / layout.CONFIG
    if not file.exists():
        raise StorageError(
            f"{file} is missing; {folder} {'is not an adapter' if folder.is_dir() else 'is no directory'}"
        )
    found = read_object(file)
    if not isinstance(found.get("peft_type"), str):
        raise StorageError(f"{file} names no peft_type, so it cannot be told what the adapter is")
    return found


def meaning(peft: Mapping[str, Any]) -> dict[str, Any]:
    """The part of peft's config that changes the adapter."""
    return {k: v for k, v in peft.items() if k not in _INCIDENTAL}


def check_unchanged(folder: Path, saved: Mapping[str, Any], peft: Mapping[str, Any]) -> None:
    """Compare peft's config with its copy beside the tensors.

    Raises:
        StorageError: a field is not what it was when the tensors were saved.
    """
    for key, value in saved.items():
        now = peft.get(key, "nothing")
        if now != value and not _unordered(key, now, value):
            raise StorageError(
                f"{folder / layout.CONFIG}: {key} is {_short(now)}, but was {_short(value)} when {layout.TENSORS} was "
                "saved; the file is damaged, edited, or from another save: restore it, or save again"
            )


def _unordered(key: str, now: Any, value: Any) -> bool:
    """Lists of modules are sets to peft."""
    return (
        key in ("target_modules", "modules_to_save")
        and isinstance(now, list)
        and isinstance(value, list)
        and sorted(map(str, now)) == sorted(map(str, value))
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
