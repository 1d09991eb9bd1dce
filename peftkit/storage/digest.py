"""A checksum over what an adapter means: its tensors, their names, and the fields of its config that change them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# fields that others fill in or change without changing the adapter
_INCIDENTAL = frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"})


def digest(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """Hex digest of the tensors' bytes, names, dtypes and shapes, and of the config."""
    found = hashlib.blake2b(digest_size=16)
    meaning = {k: v for k, v in config.items() if k not in _INCIDENTAL}
    found.update(json.dumps(meaning, sort_keys=True).encode())
    for key in sorted(tensors):
        t = tensors[key]
        found.update(f"\n{key} {t.dtype} {tuple(t.shape)}\n".encode())
        if t.numel():
            found.update(t.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
