"""What lies beside a model's weights: the index of its files, its config, its tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from peftkit.checkpoints.files import Checkpoint
from peftkit.storage.jsonfile import read_object

_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5",
    "*.msgpack", "*.msgpack.index.json", "*.gguf", "*.onnx", "*.onnx_data", "*.ot", "*.tflite", "*.mlmodel", "*.distcp",
)  # fmt: skip
_DTYPE_KEYS = ("dtype", "torch_dtype")


def write_index(checkpoint: Checkpoint, folder: Path, tensors: Mapping[str, tuple[str, int]]) -> None:
    """The index of `tensors`, key -> file and bytes, where the checkpoint has one; it says their size."""
    if checkpoint.index is None:
        return
    name, old = checkpoint.index
    metadata = dict(old.get("metadata") or {})
    if "total_size" in metadata:
        metadata["total_size"] = sum(size for _, size in tensors.values())
    order = [*(k for k in old["weight_map"]), *(k for k in tensors if k not in old["weight_map"])]
    new = {**old, "metadata": metadata, "weight_map": {key: tensors[key][0] for key in order}}
    _write(folder / name, new)


def side_files(base: Path) -> list[Path]:
    """What belongs to a model beside its weights, relative to `base`.

    At the top all but weights, of whatever format, and adapters. A directory whole or not at all: one that `modules.json`
    names, as sentence-transformers' further layers, or that holds no weights; no checkpoints of a training.
    """
    layers = _layers(base)
    found = []
    for path in sorted(base.iterdir()):
        if path.name.startswith((".", "checkpoint-", "adapter_config.json")):
            continue
        if path.is_file():  # of a download's cache these are links
            found += [] if _is_weights(path) else [path]
        elif path.is_dir() and not path.is_symlink():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.is_symlink())
            if path.name in layers or not any(map(_is_weights, inside)):
                found += inside
    return [path.relative_to(base) for path in found]


def _is_weights(path: Path) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in _WEIGHTS)


def _layers(base: Path) -> set[str]:
    try:
        listed = json.loads((base / "modules.json").read_text("utf-8"))
        return {str(one["path"]) for one in listed}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def copy_side_files(base: Path, files: Sequence[Path], folder: Path, dtype: torch.dtype | None) -> None:
    """Copy `files` from `base` to `folder`; with `dtype`, the config names that."""
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / path, folder / path)
    config = folder / "config.json"
    if dtype is not None and config.exists():
        _write(config, _in_dtype(read_object(config), str(dtype).removeprefix("torch.")))


def _in_dtype(config: Any, name: str) -> Any:
    """Every mention of the weights' dtype, which composite models repeat for their parts."""
    if not isinstance(config, dict):
        return config
    return {k: name if k in _DTYPE_KEYS and isinstance(v, str) else _in_dtype(v, name) for k, v in config.items()}


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
