"""torchtune's LoRA and DoRA (https://github.com/pytorch/torchtune, `modules/peft`).

`layers.0.attn.q_proj.lora_a.weight (r in)`, `…lora_b.weight (out r)` and DoRA's `…magnitude (out)`, in its own names. Where
torchtune rotates neighbouring rows of q and k, as for Llama, B and the magnitudes have their rows in that order.
Its `adapter_config.json` has the rank and alpha; the tensors are in `adapter_model.pt`, once `adapter_0.pt`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from peftkit import peft_lora
from peftkit.formats.rotary import halves
from peftkit.formats.source import Source, from_peft_form
from peftkit.storage import StorageError
from peftkit.targets import nearest

_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_TENSORS = {
    "lora_a.weight": "lora_A.weight",
    "lora_b.weight": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
    "magnitude.weight": "lora_magnitude_vector",
}
_KEY = re.compile(r"(?:layers\.(\d+)\.(.+?)|(output))\.(lora_a\.weight|lora_b\.weight|magnitude(?:\.weight)?)")
# By `model_type`: whether torchtune rotates neighbouring rows, and so permutes what transformers keeps in halves. Read at
# bd2a0fc: the rope of `models/<family>/_component_builders.py`, and what brings transformers' weights into its layout.
_ROTATES_NEIGHBOURS = {
    "llama": True,  # llama2, llama3: RotaryPositionalEmbeddings; convert_weights.hf_to_tune permutes
    "mistral": True,  # RotaryPositionalEmbeddings; convert_weights.hf_to_tune
    "gemma": True,  # RotaryPositionalEmbeddings; convert_weights.hf_to_tune
    "gemma2": True,  # RotaryPositionalEmbeddings; gemma2_hf_to_tune permutes
    "qwen2": False,  # Qwen2RotaryPositionalEmbeddings; qwen2_hf_to_tune only renames
    "qwen3": False,  # Qwen2RotaryPositionalEmbeddings; qwen3_hf_to_tune only renames
}


def looks_so(keys: Sequence[str]) -> bool:
    """Whether keys are of this format."""
    return any(_KEY.fullmatch(key) for key in keys)


def read(
    file: Path,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any] | None,
    base: Mapping[str, Any],
    alpha: float | None,
) -> Source:
    """The adapter in `tensors`.

    Args:
        file: where they were read.
        settings: torchtune's `adapter_config.json`; None where there is none.
        base: the base's `config.json`, for its heads.
        alpha: where `settings` say none.

    Raises:
        StorageError: an unknown key, a base that torchtune does not have or whose heads do not fit, no alpha.
        ValueError: an alpha beside that of `settings`.
    """
    heads = _heads(file, base)
    own = (settings or {}).get("lora_alpha")
    if own is not None and not (type(own) in (int, float) and abs(own) <= sys.float_info.max):
        raise StorageError(f"{file}: adapter_config.json beside it says lora_alpha={str(own)[:40]}, expected a number")
    if alpha is not None and own is not None:
        raise ValueError(f"alpha={alpha!r} has no use: adapter_config.json beside {file} says lora_alpha={own}")
    scale = alpha if own is None else own
    if scale is None:
        raise StorageError(f"{file}: no adapter_config.json beside it says lora_alpha; pass alpha=")
    made: dict[tuple[str, str], tuple[Tensor, str]] = {}
    for key, t in tensors.items():
        path, name = _placed(file, key)
        if t.dim() != (1 if name == "lora_magnitude_vector" else 2) or not t.is_floating_point():
            raise StorageError(f"{file}: {key} has the shape {tuple(t.shape)} and {t.dtype}, which no {name} has")
        if name != "lora_A.weight" and (count := heads.get(path.rpartition(".")[2])) is not None:
            try:
                t = halves(t, count)
            except ValueError as error:
                raise StorageError(f"{file}: {key} is not of this base: {error}") from error
        made[path, name] = t, key
    ranks = {path: t.shape[0] for (path, name), (t, _) in made.items() if name == "lora_A.weight"}
    for path, _ in made:
        if path not in ranks:
            raise StorageError(f"{file}: {path!r}, in torchtune's own words {_theirs(path)!r}, has no lora_a.weight")
    dora = any(name == "lora_magnitude_vector" for _, name in made)
    pairs = {path: (r, float(scale)) for path, r in ranks.items()}
    return from_peft_form(file, {"peft_type": "LORA", **peft_lora.settings(pairs, use_dora=dora)}, made)


def _placed(file: Path, key: str) -> tuple[str, str]:
    """Path of the module in transformers, and peft's name of the tensor."""
    found = _KEY.fullmatch(key)
    if found is not None and found[3]:
        return "lm_head", _TENSORS[found[4]]
    if found is None or found[2] not in _MODULES:
        every = [f"layers.0.{m}.{t}" for m in _MODULES for t in ("lora_a.weight", "lora_b.weight", "magnitude")]
        near = nearest(re.sub(r"[0-9]+", "0", key), every, has="known are")
        raise StorageError(f"{file}: unexpected {key}{near}")
    return f"model.layers.{found[1]}.{_MODULES[found[2]]}", _TENSORS[found[4]]


def _theirs(path: str) -> str:
    back = {ours: theirs for theirs, ours in _MODULES.items()}
    layer, _, module = path.removeprefix("model.layers.").partition(".")
    return f"layers.{layer}.{back[module]}" if module in back else "output"


def _heads(file: Path, base: Mapping[str, Any]) -> dict[str, int]:
    """Number of heads by the projection whose rows are permuted."""
    kind = base.get("model_type")
    if not isinstance(kind, str) or kind not in _ROTATES_NEIGHBOURS:
        raise StorageError(
            f"{file}: the base's config.json says model_type={kind!r}; how torchtune orders the rows of q and k is "
            f"known for {', '.join(_ROTATES_NEIGHBOURS)}"
        )
    heads = _count(file, base, "num_attention_heads")
    if not _ROTATES_NEIGHBOURS[kind]:
        return {}
    own = base.get("num_key_value_heads")
    return {"q_proj": heads, "k_proj": heads if own is None else _count(file, base, "num_key_value_heads")}


def _count(file: Path, base: Mapping[str, Any], name: str) -> int:
    found = base.get(name)
    if type(found) is not int or found < 1:
        raise StorageError(f"{file}: the base's config.json has {name}={found!r}, expected a number of heads")
    return found
