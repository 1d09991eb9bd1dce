"""An adapter read from a file of any format, in peft's form: what every reader here makes and every writer takes."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit.storage import StorageError, layout, tensorfile
from peftkit.storage.reader import FLOATS, Stored, understood
from peftkit.storage.tensorfile import all_finite


@dataclass(frozen=True)
class Source:
    """An adapter and where it comes from.

    Attributes:
        stored: the adapter.
        origin: peft's key -> the key in the file, where those differ.
    """

    stored: Stored
    origin: Mapping[str, str]

    def in_its_own_words(self, message: str) -> str:
        """A message about peft's keys, with the file's in their place."""
        for key in sorted(self.origin, key=len, reverse=True):
            message = re.sub(rf"{re.escape(key)}(?![\w.])", lambda m: self.origin[m[0]], message)
        return message


def from_peft_form(
    file: Path, settings: Mapping[str, Any], tensors: Mapping[tuple[str, str], tuple[Tensor, str]]
) -> Source:
    """The adapter of these settings and tensors, which are those of whole modules at the paths.

    Args:
        file: where it was read.
        settings: of `adapter_config.json`, without the targets.
        tensors: path of the module and peft's name for the tensor -> the tensor, and its key in `file`.

    Raises:
        StorageError: the settings and tensors make no adapter.
    """
    # one expression for these paths alone: in a list, a path would also mean others that end so
    targets = "|".join(re.escape(path) for path in sorted({path for path, _ in tensors}))
    peft = {**settings, "target_modules": targets}
    keys = {f"{layout.PREFIX}{path}.{name}": found for (path, name), found in tensors.items()}
    origin = {key: theirs for key, (_, theirs) in keys.items()}
    stored = understood(file, peft, {key: t for key, (t, _) in keys.items()})
    return Source(stored, origin)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle that holds nothing else.

    Raises:
        StorageError: the file is missing or damaged, holds something else than tensors, or values that are not finite.
    """
    if not file.is_file():
        raise StorageError(f"{file} is {'a directory' if file.is_dir() else 'not there'}; expected a file of tensors")
    found = tensorfile.read(file).tensors if file.suffix == ".safetensors" else _unpickled(file)
    if not found:
        raise StorageError(f"{file} holds no tensors")
    for key, t in found.items():
        if t.is_floating_point() and t.dtype not in FLOATS:
            raise StorageError(f"{file}: {key} is {t.dtype}; expected a dtype of 16 bits or more")
        if not all_finite(t):
            raise StorageError(f"{file}: {key} has values that are not finite")
    return found


def names_in_pickle(file: Path) -> list[str]:
    """The names that a pickle gives to what it holds; none where it holds no dict.

    Raises:
        StorageError: it is damaged, or holds what only a program could make.
    """
    found = _loaded(file)
    return [key for key in found if isinstance(key, str)] if isinstance(found, dict) else []


def _loaded(file: Path) -> object:
    _check_stored(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle leads to
        raise StorageError(
            f"{file} cannot be read as tensors alone, and no other pickle is opened, since it could run any program: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _unpickled(file: Path) -> dict[str, Tensor]:
    found = _loaded(file)
    if not isinstance(found, dict):
        raise StorageError(f"{file} holds a {type(found).__name__}; expected tensors by their names")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise StorageError(f"{file}: {key!r} is a {type(value).__name__}; expected tensors by their names")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested:
            raise StorageError(f"{file}: {key} is a {value.layout} on {value.device}; expected a plain tensor")
        if value.dim() > 64 or value.nbytes > value.untyped_storage().nbytes():
            raise StorageError(
                f"{file}: {key} has the shape {tuple(value.shape)[:8]}, for which the file does not hold the numbers"
            )
    return {key: t.detach() for key, t in found.items()}


def _check_stored(file: Path) -> None:
    """Refuse an archive that holds more than its bytes, packed or several times the same: torch writes none."""
    try:
        with zipfile.ZipFile(file) as archive:
            held = sum(part.file_size for part in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # of torch's old format, or damaged, which torch says
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error}") from error
    if held > file.stat().st_size:
        raise StorageError(f"{file} is packed: its {file.stat().st_size:,} bytes unpack to {held:,}; save it unpacked")
