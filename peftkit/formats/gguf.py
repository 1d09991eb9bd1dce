"""LoRA as llama.cpp reads it: a GGUF file (https://github.com/ggml-org/llama.cpp, `src/llama-adapter.cpp`).

`general.type` is "adapter", `adapter.type` "lora". The pair of a weight is `<weight>.lora_a (r in)` and `.lora_b (out r)`;
that of the token embedding is `(V r)` and `(dim r)`. There is one `adapter.lora.alpha` for the whole file, and each pair
is scaled by alpha over its own rank. Where the scale of a site differs from that, the rest of it is multiplied into B, in
fp64 and rounded once.

llama.cpp rotates neighbouring rows of q and k for models of the Llama type, so their B has its rows in that order.
"""

from __future__ import annotations

import math
import os
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftkit.formats.rotary import interleaved
from peftkit.formats.source import Source
from peftkit.peft_patterns import PeftPatterns
from peftkit.storage import StorageError, layout
from peftkit.targets import nearest

_LLAMA_TYPES = ("llama", "mistral")  # by model_type: what llama.cpp reads as its architecture "llama"
_NAMES = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_embedding_A": "a", "lora_embedding_B": "b"}


def write(source: Source, out: Path, base: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write the adapter to the file `out`, replacing what is there.

    Args:
        base: the `config.json` of the model that it is for.
        dtype: of the stored tensors, fp32 or fp16.

    Raises:
        StorageError: an adapter that is no plain LoRA of Linears and embeddings, a base that is not of the Llama type or
            not the adapter's, values beyond fp16, a missing package `gguf`. What was there is as it was.
    """
    stored = source.stored
    _check_plain(source)
    _check_base(source, base)
    if dtype not in (torch.float32, torch.float16):
        raise StorageError(f"dtype={dtype}: a GGUF adapter is written as torch.float32 or torch.float16")
    names, sizes = _tensor_names(base), _sizes(base)
    pairs: dict[str, tuple[str, Tensor, Tensor]] = {}
    for stem, tensors in stored.sites.items():
        path = stem[len(layout.PREFIX) : -1]
        if path not in names:
            raise StorageError(
                f"{stored.file}: llama.cpp has no adapter for {path!r} of a {base['model_type']} with "
                f"{base['num_hidden_layers']} layers{nearest(path, names, has='it has those for')}"
            )
        pairs[path] = (names[path], *_pair(source, stem, tensors))
        _check_sizes(source, path, pairs[path], sizes)
    scales = _scales(source, {path: a.shape[0] for path, (_, a, _) in pairs.items()})
    alpha = _alpha({path: scales[path] * a.shape[0] for path, (_, a, _) in pairs.items()})
    made: dict[str, np.ndarray[Any, Any]] = {}
    for path, (name, a, b) in pairs.items():
        rest = scales[path] * a.shape[0] / alpha
        b = b.double() * rest if np.float32(rest) != 1 else b
        if (heads := _heads(path, base)) is not None:
            b = interleaved(b, heads)
        a = a.t() if name.startswith("token_embd.") else a
        for end, t in (("a", a), ("b", b)):
            made[f"{name}.lora_{end}"] = _array(f"{stored.file}: {path}", t, dtype)
    _write(out, made, alpha, dtype)


# -- what can be written -------------------------------------------------------------------------------------


def _check_plain(source: Source) -> None:
    stored = source.stored
    where = f"{stored.path} cannot be written as GGUF"
    if stored.config.method != "lora":
        raise StorageError(f"{where}: it is {stored.config.method}, and llama.cpp reads plain LoRA alone")
    adapted = {stem + name for stem, tensors in stored.sites.items() for name in tensors}
    # a base weight that peft wrote beside an adapted embedding is the base's; of a resized one, the pair's sizes tell
    others = sorted(stored.tensors.keys() - adapted)
    if others:
        raise StorageError(
            f"{where}: llama.cpp would read no {others[0]}, which is stored whole (modules_to_save, trained rows or a "
            "bias); merge the adapter into the base instead"
        )
    init = source.stored.peft.get("init_lora_weights")
    if not stored.own and init in ("pissa", "olora"):
        raise StorageError(
            f"{where}: init_lora_weights={init!r} has it relative to a base that peft has changed; load and save it first"
        )


def _check_base(source: Source, base: Mapping[str, Any]) -> None:
    kind = base.get("model_type")
    if kind not in _LLAMA_TYPES:
        raise StorageError(
            f"{source.stored.path} cannot be written as GGUF: its base has model_type={kind!r}, expected "
            f"{' or '.join(map(repr, _LLAMA_TYPES))}: the names and the order of rows are known for the Llama type alone"
        )
    for key in ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"):
        if not isinstance(base.get(key), int):
            raise StorageError(f"{source.stored.path} cannot be written as GGUF: its base's config.json has no {key}")


def _tensor_names(base: Mapping[str, Any]) -> dict[str, str]:
    """Path of every module that llama.cpp has adapters for -> its tensor there."""
    gguf = _package()
    count = base["num_hidden_layers"]
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, count)
    ends = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    ends += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    paths = ["model.embed_tokens", *(f"model.layers.{i}.{end}" for i in range(count) for end in ends)]
    if not base.get("tie_word_embeddings"):
        paths.append("lm_head")
    else:
        paths.remove("model.embed_tokens")  # the same tensor is the output there, and would be adapted as one too
    return {path: f"{known.get_name(path)}.weight" for path in paths}


def _sizes(base: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Rows and columns of a weight, by the last component of its path."""
    heads, hidden, inner = base["num_attention_heads"], base["hidden_size"], base["intermediate_size"]
    width = base.get("head_dim") or hidden // heads
    q, kv = heads * width, (base.get("num_key_value_heads") or heads) * width
    return {
        "q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q),
        "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
        "embed_tokens": (hidden, base["vocab_size"]), "lm_head": (base["vocab_size"], hidden),
    }  # fmt: skip


def _check_sizes(
    source: Source, path: str, pair: tuple[str, Tensor, Tensor], sizes: Mapping[str, tuple[int, int]]
) -> None:
    _, a, b = pair
    expected, found = sizes[path.rpartition(".")[2]], (b.shape[0], a.shape[1])
    if found != expected:
        raise StorageError(
            f"{source.stored.file}: the pair at {path!r} is for {found[0]} × {found[1]}, and the base's config.json says "
            f"{expected[0]} × {expected[1]}; the adapter is for another model"
        )


def _heads(path: str, base: Mapping[str, Any]) -> int | None:
    """Of the projection at `path`, where its rows are rotated."""
    last = path.rpartition(".")[2]
    if last == "k_proj":
        return base.get("num_key_value_heads") or base["num_attention_heads"]
    return base["num_attention_heads"] if last == "q_proj" else None


# -- numbers -------------------------------------------------------------------------------------------------


def _pair(source: Source, stem: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    found = {_NAMES[name]: t for name, t in tensors.items()}
    for end in "ab":
        if end not in found:
            raise StorageError(f"{source.stored.file}: {stem} lacks its lora_{end.upper()}; the file is not complete")
    a, b = found["a"], found["b"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise StorageError(
            f"{source.stored.file}: {stem} has the shapes {tuple(a.shape)} and {tuple(b.shape)}: no pair"
        )
    return a, b


def _scales(source: Source, ranks: Mapping[str, int]) -> dict[str, float]:
    """What each site multiplies B A by."""
    alpha = PeftPatterns(source.stored.peft.get("alpha_pattern") or {}, source.stored.peft.get("lora_alpha", 8))
    stabilized = bool(source.stored.peft.get("use_rslora"))
    return {path: float(alpha.at(path)) / (math.sqrt(r) if stabilized else r) for path, r in ranks.items()}


def _alpha(wanted: Mapping[str, float]) -> float:
    """The one alpha of the file: that of most sites, whose B then stays as it is."""
    return Counter(float(np.float32(value)) for value in wanted.values()).most_common(1)[0][0]


def _array(what: str, t: Tensor, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    made = t.to(dtype).contiguous()
    if not torch.isfinite(made).all():
        raise StorageError(f"{what} has values beyond the range of {dtype}; write it as torch.float32")
    return made.numpy()


# -- the file ------------------------------------------------------------------------------------------------


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise StorageError("writing GGUF needs the package gguf: pip install 'peftkit[gguf]'") from error
    return gguf


def _write(out: Path, tensors: Mapping[str, np.ndarray[Any, Any]], alpha: float, dtype: torch.dtype) -> None:
    gguf = _package()
    if out.is_dir():
        raise StorageError(f"{out} is a directory; a GGUF adapter is one file, so give its name")
    fresh = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(fresh, "llama")
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        kind = gguf.LlamaFileType.MOSTLY_F16 if dtype == torch.float16 else gguf.LlamaFileType.ALL_F32
        writer.add_file_type(kind)
        for name in sorted(tensors):
            writer.add_tensor(name, tensors[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with fresh.open("rb") as written:
            os.fsync(written.fileno())
        fresh.replace(out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)
