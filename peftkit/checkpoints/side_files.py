"""What lies beside a model's weights: the index of its files, its config, its tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from peftkit.checkpoints.files import Checkpoint
from peftkit.storage.jsonfile import read_object

# weights in other forms, which would be the base's still; adapters; what is hidden
_LEFT = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5",
    "*.msgpack", "*.msgpack.index.json", "*.gguf", "*.onnx", "*.onnx_data", "*.ot", "*.tflite", "*.mlmodel",
    "adapter_config.json", ".*",
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


def copy_side_files(base: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy what belongs to a model beside its weights; with `dtype`, the config names that."""
    _copy(base, folder)
    config = folder / "config.json"
    if dtype is not None and config.exists():
        _write(config, _in_dtype(read_object(config), str(dtype).removeprefix("torch.")))


def _copy(base: Path, folder: Path) -> None:
    for path in sorted(base.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in _LEFT):
            continue
        if path.is_file():  # of a download's cache these are links
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and not path.is_symlink():
            (folder / path.name).mkdir(exist_ok=True)
            _copy(path, folder / path.name)
            if not any((folder / path.name).iterdir()):
                (folder / path.name).rmdir()


def _in_dtype(config: Any, name: str) -> Any:
    """Every mention of the weights' dtype, which composite models repeat for their parts."""
    if not isinstance(config, dict):
        return config
    return {k: name if k in _DTYPE_KEYS and isinstance(v, str) else _in_dtype(v, name) for k, v in config.items()}


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
