"""A base's weights on disk: one safetensors file or several with an index, as transformers and diffusers write them.

Headers are read when it is opened. A tensor is mapped into memory when it is asked for; its pages go when it goes.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkit.storage import StorageError, tensorfile
from peftkit.storage.jsonfile import read_object
from peftkit.storage.tensorfile import Entry, Header
from peftkit.targets import nearest

_INDEX = ".safetensors.index.json"
_USUAL = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Place(NamedTuple):
    """Where a tensor is: its file, and the entry there."""

    file: str
    entry: Entry

    @property
    def bytes(self) -> int:
        return self.entry.end - self.entry.begin


@dataclass(frozen=True)
class Checkpoint:
    """A directory of weights.

    Attributes:
        path: the directory.
        files: name -> header, in the order of the names.
        places: key -> where it is.
        index: name and content of the index file; None where one file holds all.
        config: what `config.json` says; empty where there is none.
    """

    path: Path
    files: Mapping[str, Header]
    places: Mapping[str, Place]
    index: tuple[str, dict[str, Any]] | None
    config: Mapping[str, Any]

    def dtype(self, key: str) -> torch.dtype:
        return self.places[key].entry.dtype

    def shape(self, key: str) -> torch.Size:
        return torch.Size(self.places[key].entry.shape)

    def tensor(self, key: str) -> Tensor:
        """The tensor, mapped: it takes memory as far as it is read, until it is dropped; writing to it changes no file.

        Raises:
            StorageError: the file has gone, or has changed its length.
            KeyError: there is no such tensor.
        """
        place = self.places[key]
        _, dtype, shape, begin, end = place.entry
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        at = self.files[place.file].start + begin
        page = at - at % mmap.ALLOCATIONGRANULARITY
        file = self.path / place.file
        try:
            with file.open("rb") as opened:
                # a copy on write, which nobody writes to: torch warns of memory that it must not write to
                mapped = mmap.mmap(opened.fileno(), at - page + end - begin, access=mmap.ACCESS_COPY, offset=page)
        except (OSError, ValueError) as error:
            raise StorageError(f"{file} cannot be read at {key}: {error}") from error
        if at % dtype.itemsize:  # torch cannot view it
            raw = torch.frombuffer(mapped, dtype=torch.uint8, offset=at - page, count=end - begin)
            return raw.clone().view(dtype).view(shape)
        return torch.frombuffer(mapped, dtype=dtype, offset=at - page, count=math.prod(shape)).view(shape)

    def nearest(self, key: str) -> str:
        """A hint at the key that is meant."""
        return nearest(key, self.places)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of all weights in the directory `path`.

    Raises:
        StorageError: no safetensors there, several that no index names, an index and files that do not agree, a file that
            is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise StorageError(f"{folder} is {'a file' if folder.exists() else 'not there'}; expected a model's directory")
    index = _index(folder)
    names = _listed(folder, *index) if index is not None else [_only(folder)]
    files, places = {}, {}
    for name in names:
        files[name] = tensorfile.read_header(folder / name)
        for entry in files[name].entries:
            if entry.key in places:
                raise StorageError(f"{folder}: {entry.key} is in {places[entry.key].file} and in {name}")
            places[entry.key] = Place(name, entry)
    if index is not None:
        for key, name in index[1]["weight_map"].items():
            if key not in places or places[key].file != name:
                found = f"it is in {places[key].file}" if key in places else "no file has it"
                raise StorageError(f"{folder / index[0]}: {key} should be in {name}, but {found}")
    return Checkpoint(folder, files, places, index, _config(folder))


def _index(folder: Path) -> tuple[str, dict[str, Any]] | None:
    found = sorted(p.name for p in folder.glob(f"*{_INDEX}"))
    usual = "model" + _INDEX
    if usual in found and (folder / _USUAL).exists():
        raise StorageError(f"{folder} has {_USUAL} and {usual}; remove the one that is not the model's")
    if len(found) > 1 and usual not in found:
        raise StorageError(f"{folder} has several indices, {', '.join(found)}; expected one, or {usual}")
    if not found:
        return None
    name = usual if usual in found else found[0]
    read = read_object(folder / name)
    shards = read.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(v, str) for v in shards.values()):
        raise StorageError(f"{folder / name} has no weight_map of keys to files")
    return name, read


def _listed(folder: Path, name: str, index: Mapping[str, Any]) -> list[str]:
    names = sorted(set(index["weight_map"].values()))
    for file in names:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise StorageError(f"{folder / name} names {file!r}, which is no safetensors file beside it")
        if not os.path.isfile(folder / file):  # pathlib's raises where a name is too long for any file
            raise StorageError(f"{folder / name} names {file}, which is not there; the download is not complete")
    return names


def _only(folder: Path) -> str:
    found = sorted(p.name for p in folder.glob("*.safetensors") if p.is_file())
    if _USUAL in found:
        return _USUAL
    if len(found) == 1:
        return found[0]
    if found:
        raise StorageError(f"{folder} has {len(found)} safetensors files and no index that says which are the model's")
    pickled = next((p.name for kind in _PICKLES for p in sorted(folder.glob(kind))), None)
    also = f"; {pickled} is a pickle, which is not read: convert it to safetensors" if pickled else ""
    raise StorageError(f"{folder} has no safetensors file{also}")


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_object(file) if file.exists() else {}
