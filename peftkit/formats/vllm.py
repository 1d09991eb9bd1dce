"""vLLM's rules for adapters, as a check of a directory (https://github.com/vllm-project/vllm, `vllm/lora`).

They are those of `peft_helper.py` (settings), `lora_model.py` (files and modules) and `utils.py` (keys). vLLM itself needs
its own build for a device, and is not asked.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peftkit.peft_patterns import PeftPatterns
from peftkit.storage import layout, tensorfile
from peftkit.storage.config import read as read_config

_REQUIRED = ("r", "lora_alpha", "target_modules")
_PAIR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_SKIPPED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")  # base weights that peft may write


def problems(path: str | os.PathLike[str], *, max_rank: int = 16, modules: Collection[str] | None = None) -> list[str]:
    """Why vLLM would refuse the adapter in the directory `path`, or would compute something else; empty where it serves it.

    Args:
        max_rank: vLLM's `max_lora_rank`, 16 unless it was started with another.
        modules: last components of the names of the modules that vLLM's class of the model adapts; None where they are not
            known, and then any but an embedding is taken to be one.

    Raises:
        StorageError: there is no adapter at `path`, or its files are damaged.
    """
    folder = Path(path)
    stored = read_config(folder)
    if not (folder / layout.TENSORS).exists():
        return [f"{layout.TENSORS} is missing"]
    tensors = tensorfile.read(folder / layout.TENSORS).tensors
    found = _of_settings(stored, max_rank)
    if stored["peft_type"] == "LORA":
        found += _of_tensors(stored, tensors, max_rank, modules)
    return found


def _of_settings(stored: Mapping[str, Any], max_rank: int) -> list[str]:
    if stored["peft_type"] != "LORA":
        return [f"peft_type is {stored['peft_type']!r}; vLLM serves LORA alone"]
    found = [f"{key} is missing from {layout.CONFIG}" for key in _REQUIRED if stored.get(key) is None]
    if isinstance(r := stored.get("r"), int) and r > max_rank:
        found.append(f"r is {r}, above max_lora_rank={max_rank}")
    if stored.get("use_dora"):
        found.append("use_dora is true; vLLM has no DoRA")
    if stored.get("modules_to_save"):
        found.append(f"modules_to_save is {stored['modules_to_save']!r}, expected none")
    if stored.get("trainable_token_indices"):
        found.append("trainable_token_indices name trained rows of an embedding, which vLLM does not read")
    if stored.get("bias", "none") != "none" or stored.get("lora_bias"):
        found.append("the adapter has biases, which vLLM does not add")
    return found


def _of_tensors(
    stored: Mapping[str, Any], tensors: Mapping[str, Tensor], max_rank: int, modules: Collection[str] | None
) -> list[str]:
    found = []
    alpha, r = stored.get("lora_alpha"), stored.get("r")
    alphas = PeftPatterns(stored.get("alpha_pattern") or {}, alpha)
    root = math.sqrt if stored.get("use_rslora") else float
    for key, t in tensors.items():
        if key.endswith(_SKIPPED):
            continue
        path, name = _parsed(key)
        if name is None:
            found.append(f"{key} is a key that vLLM does not know")
            continue
        last = path.rpartition(".")[2]
        if modules is not None and last not in modules:
            found.append(f"{key} is for {last!r}, which is none of the modules that the model adapts")
        elif modules is None and name in _EMBEDDING:
            found.append(f"{key} adapts an embedding, which vLLM reads for a few models; pass modules=")
        if name not in (_PAIR[0], _EMBEDDING[0]):
            continue
        if t.shape[0] > max_rank and t.shape[0] != r:
            found.append(f"{key} has rank {t.shape[0]}, above max_lora_rank={max_rank}")
        if isinstance(r, int) and alpha is not None:
            own, used = alphas.at(path) / root(t.shape[0]), alpha / root(r)
            if not math.isclose(own, used, rel_tol=1e-6):
                found.append(f"{key} is to be scaled by {own:g}, but vLLM scales all by lora_alpha and r: {used:g}")
    return found


def _parsed(key: str) -> tuple[str, str | None]:
    """Path of the module and the tensor's name; None where vLLM knows no such key."""
    bare = key.replace(layout.PREFIX, "")
    for name in (*_PAIR, *_EMBEDDING):
        if bare.endswith("." + name):
            return bare[: -len(name) - 1], name
    return bare, None
