"""Adapters from one program's files to another's, without building a model."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import torch
from torch import nn

from peftkit import storage
from peftkit.formats import gguf, kohya, torchtune
from peftkit.formats.base import Base
from peftkit.formats.source import Source, names_in_pickle, read_tensors
from peftkit.storage import StorageError, layout
from peftkit.storage.jsonfile import read_object
from peftkit.targets import nearest

_TORCHTUNES = re.compile(r"adapter_(\d+|model)\.pt")
_TO = ("peftkit", "gguf")


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | nn.Module,
    to: str = "peftkit",
    prefix: str | None = None,
    alpha: float | None = None,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
) -> None:
    """Write the adapter at `source`, of whatever format, to `out`; what is there stays whole until the new one is.

    Args:
        source: peftkit's or peft's directory; a file of kohya-ss's sd-scripts or of LyCORIS; torchtune's tensor file, or the
            directory with it. Its keys tell which it is.
        base: the model that the adapter is for: its directory, with `config.json` and safetensors, or the model. For
            `"gguf"` the config alone is enough.
        to: `"peftkit"`, the directory that peft and vLLM read too; or `"gguf"`, the file that llama.cpp reads.
        prefix: of a kohya file with parts for several models, the part to take, such as `"lora_unet"`.
        alpha: of a torchtune file that no `adapter_config.json` with one lies beside, or of the modules of a kohya file
            that have none; without it theirs is their rank.
        dtype: of the tensors in a GGUF file, fp32 (None) or fp16; a directory keeps those of the source.
        check_base: as in `load`; `"gguf"` compares sizes alone.

    Raises:
        StorageError: a key that is unknown or missing, a kind of adapter that the wanted format cannot express, tensors that
            do not fit the base, a damaged file. The message names it, and what was at `out` is as it was.
        ValueError: an unknown format; a `prefix`, `alpha` or `dtype` that this source and format have no use for.
    """
    if to not in _TO:
        raise ValueError(f"to: {to!r} is no format{nearest(to, _TO, has='known are')}")
    if dtype is not None and to != "gguf":
        raise ValueError(f"dtype={dtype} is for to='gguf'; a directory keeps the dtypes of the source")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha={alpha}; expected a number above 0")
    model = Base(base)
    adapter = _read(Path(source), model, prefix, alpha)
    try:
        if to == "gguf":
            gguf.write(adapter, Path(out), model.config, dtype or torch.float32)
        else:
            root, attachment, sample = model.attached(adapter.stored, check_base=check_base)
            storage.save(root, attachment, out, base=sample)
    except StorageError as error:
        raise StorageError(adapter.in_its_own_words(str(error))) from error


def _read(path: Path, base: Base, prefix: str | None, alpha: float | None) -> Source:
    file = _tensor_file(path) if path.is_dir() else path
    if file is None:
        _refuse(path, "is peft's or peftkit's, which says all of it", prefix=prefix, alpha=alpha)
        return Source(storage.read(path), {})
    if file.suffix == ".gguf":
        raise StorageError(f"{file}: GGUF is written here, not read; convert the adapter that it was made from")
    tensors = read_tensors(file)
    keys = list(tensors)
    if torchtune.looks_so(keys):
        _refuse(file, "is torchtune's, which is of one model", prefix=prefix)
        settings = file.parent / layout.CONFIG
        return torchtune.read(file, tensors, read_object(settings) if settings.exists() else None, base.config, alpha)
    if kohya.looks_so(keys):
        return kohya.read(file, tensors, base.weights, prefix, alpha)
    if any(key.startswith(layout.PREFIX) for key in keys):
        raise StorageError(f"{file} has peft's keys; give its directory, with {layout.CONFIG} beside it")
    raise StorageError(
        f"{file}: unexpected {min(keys)}: its keys are none of peft's ({layout.PREFIX}…), kohya's or LyCORIS's "
        "(lora_unet_….lora_down.weight) or torchtune's (layers.0.attn.q_proj.lora_a.weight)"
    )


def _refuse(path: Path, why: str, **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} has no use: {path} {why}")


def _tensor_file(folder: Path) -> Path | None:
    """The file in `folder` that is the adapter; None where it is peft's directory, or peftkit's."""
    named = (p for p in sorted(folder.glob("adapter_*.pt")) if _TORCHTUNES.fullmatch(p.name))
    # its own tensors go before those that it may have written in peft's names beside them
    found = [p for p in named if torchtune.looks_so(names_in_pickle(p))]
    if not found and (folder / layout.CONFIG).exists():
        return None
    found = found or sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise StorageError(f"{folder} has {', '.join(p.name for p in found)}; name the one to convert")
    if not found:
        raise StorageError(f"{folder} is no adapter: it has neither {layout.CONFIG} nor one file of tensors")
    return found[0]
