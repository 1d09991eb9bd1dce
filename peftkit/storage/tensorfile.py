"""The safetensors format (https://github.com/huggingface/safetensors), written with a checksum and read strictly.

A file is 8 bytes with the header's length, the header as JSON, and the tensors' bytes one after another. It is read and
written here rather than by the safetensors package because an adapter is thousands of small tensors: one buffer, hashed
and checked in one pass, costs a tenth. The checksum covers every byte of the file but its own digits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from peftkit.storage.errors import StorageError
from peftkit.storage.jsonfile import checked_file, parsed

DIGEST = "peftkit_digest"  # the key of the checksum in the metadata
_BLANK = "0" * 32  # what stands for its digits while they are computed
_HEADER_LIMIT = 100_000_000  # the safetensors package's own
_BATCH_BYTES = 4 << 20
_DIMENSIONS = 64  # as many as torch computes with

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a file: its bytes are `begin` to `end`, counted from the end of the header."""

    key: str
    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int


class Header(NamedTuple):
    """What stands before the tensors.

    Attributes:
        raw: its bytes as they are.
        entries: by where their bytes lie, which is one after another to the end of the file.
        start: of the tensors' bytes in the file.
    """

    raw: bytes
    metadata: dict[str, str]
    entries: list[Entry]
    start: int


@dataclass(frozen=True)
class TensorFile:
    """What a file holds.

    Attributes:
        tensors: views of one buffer, which nothing else shares: clone what is to be kept.
        runs: neighbours of one dtype in one flat piece, with their keys.
        sealed: whether the checksum is that of the bytes; None where the file has none.
    """

    tensors: dict[str, Tensor]
    runs: list[tuple[Tensor, list[str]]]
    metadata: dict[str, str]
    sealed: bool | None

    def not_finite(self) -> str | None:
        """The key of a tensor with a NaN or an infinity; None where there is none."""
        for flat, keys in self.runs:
            if not all_finite(flat):
                return next(k for k in keys if not all_finite(self.tensors[k]))
        return None


def all_finite(t: Tensor) -> bool:
    """Whether no value is NaN or infinite; what is no floating-point number is finite."""
    if not t.is_floating_point():
        return True
    if t.dtype.itemsize == 1:  # torch has no isfinite for these
        t = t.to(torch.float32)
    return bool(torch.isfinite(t).all())


# -- writing -------------------------------------------------------------------------------------------------


@torch.no_grad()
def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new file, with its checksum.

    Raises:
        StorageError: a dtype that the format does not know, a value that is not finite.
    """
    order, raw = _beginning(tensors, metadata)
    found = hashlib.blake2b(raw[8:], digest_size=16)
    with path.open("wb") as file:
        file.write(raw)
        for flat in _batches(tensors, order):
            piece: Any = flat.view(torch.uint8).numpy()
            found.update(piece)
            file.write(piece)
        file.seek(raw.index(_BLANK.encode()))
        file.write(found.hexdigest().encode())


def size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """The bytes of the file that `write` would make.

    Raises:
        StorageError: a dtype that the format does not know.
    """
    _, raw = _beginning(tensors, metadata)
    return len(raw) + sum(t.numel() * t.dtype.itemsize for t in tensors.values())


def _beginning(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[list[str], bytes]:
    """The keys in the order of the file, and what it begins with, its checksum blank."""
    # wide ones first, so that each lies at a multiple of its item's size
    order = sorted(tensors, key=lambda k: (-tensors[k].dtype.itemsize, _name(k, tensors[k].dtype), k))
    return order, header_bytes({k: (tensors[k].dtype, tensors[k].shape) for k in order}, {DIGEST: _BLANK, **metadata})


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """What a file begins with whose tensors, of these dtypes and shapes, follow in this order.

    Raises:
        StorageError: a dtype that the format does not know.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _name(key, dtype), "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _name(key: str, dtype: torch.dtype) -> str:
    if dtype not in _NAMES:
        raise StorageError(f"{key} is {dtype}, which a safetensors file cannot hold; nothing was written")
    return _NAMES[dtype]


def _batches(tensors: Mapping[str, Tensor], order: list[str]) -> Iterator[Tensor]:
    """The tensors in order as flat ones on the CPU, small neighbours together."""
    keys: list[str] = []
    size = 0
    for i, key in enumerate(order):
        t = tensors[key]
        keys.append(key)
        size += t.numel() * t.dtype.itemsize
        after = tensors[order[i + 1]] if i + 1 < len(order) else None
        if after is None or after.dtype != t.dtype or after.device != t.device or size >= _BATCH_BYTES:
            flat = torch.cat([tensors[k].reshape(-1) for k in keys]) if len(keys) > 1 else t.reshape(-1)
            if not all_finite(flat):
                wrong = next(k for k in keys if not all_finite(tensors[k]))
                raise StorageError(f"{wrong} has values that are not finite; nothing was written")
            if flat.numel():
                yield flat.cpu()
            keys, size = [], 0


# -- reading -------------------------------------------------------------------------------------------------


def read(path: Path) -> TensorFile:
    """Read a whole file into memory of its own.

    Raises:
        StorageError: it is truncated, longer than it says, or no safetensors file; the message names it.
    """
    with _opened(path) as file:
        return _read(file)


def read_header(path: Path) -> Header:
    """Read what stands before the tensors, and check that they are all there.

    Raises:
        StorageError: as for `read`.
    """
    with _opened(path) as file:
        return _header(file)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        checked_file(path)
        with path.open("rb") as file:
            yield file
    except StorageError as error:
        raise StorageError(f"{path} cannot be read, it is truncated or damaged: {error}") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def _header(file: BinaryIO) -> Header:
    total = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if total < 8 or length > min(total - 8, _HEADER_LIMIT):
        raise StorageError(f"a file of {total} bytes cannot have a header of {length}")
    raw = file.read(length)
    try:
        header = parsed(raw)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise StorageError("its header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise StorageError("its metadata is no mapping of strings to strings")
    entries = sorted((_entry(key, value) for key, value in header.items()), key=lambda e: (e.begin, e.end))
    end = 0
    for e in entries:
        if e.begin != end:
            raise StorageError(f"{e.key} begins at byte {e.begin}, expected {end}")
        end = e.end
    if end != total - 8 - length:
        raise StorageError(f"its tensors take {end} bytes, but it holds {total - 8 - length}")
    return Header(raw, metadata, entries, 8 + length)


def _read(file: BinaryIO) -> TensorFile:
    header = _header(file)
    size = header.entries[-1].end if header.entries else 0
    data = torch.empty(size, dtype=torch.uint8)
    got = file.readinto(data.numpy()) if size else 0  # type: ignore[attr-defined]
    if got != size:
        raise StorageError(f"its tensors take {size} bytes, but it holds {got}")
    tensors, runs = _views(data, header.entries)
    return TensorFile(tensors, runs, header.metadata, _sealed(header.raw, data, header.metadata))


def _entry(key: str, value: object) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise StorageError(f"{key} has no dtype, shape and data_offsets")
    shape, span = value["shape"], value["data_offsets"]
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise StorageError(f"{key} has the unknown dtype {value['dtype']!r}")
    if not isinstance(shape, list) or not isinstance(span, list) or len(span) != 2:
        raise StorageError(f"{key} has the shape {shape!r} at {span!r}")
    if len(shape) > _DIMENSIONS:
        raise StorageError(f"{key} has {len(shape)} dimensions, expected at most {_DIMENSIONS}")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *span)):
        raise StorageError(f"{key} has the shape {shape!r} at {span!r}, expected whole numbers of at least 0")
    if math.prod(filter(None, shape)) * dtype.itemsize >= 2**63:  # though a 0 leaves no number: torch counts strides
        raise StorageError(f"{key} has the shape {shape!r}, which is larger than any tensor can be")
    if span[1] - span[0] != math.prod(shape) * dtype.itemsize:
        raise StorageError(f"{key} of shape {shape} and {dtype} takes {span[1] - span[0]} bytes")
    return Entry(key, dtype, shape, span[0], span[1])


def _views(data: Tensor, entries: list[Entry]) -> tuple[dict[str, Tensor], list[tuple[Tensor, list[str]]]]:
    tensors: dict[str, Tensor] = {}
    runs: list[tuple[Tensor, list[str]]] = []
    i = 0
    while i < len(entries):
        dtype, begin = entries[i].dtype, entries[i].begin
        j = i
        while j < len(entries) and entries[j].dtype == dtype:
            j += 1
        run = data[begin : entries[j - 1].end]
        if begin % dtype.itemsize:  # other writers may leave it so, and torch cannot view it
            run = run.clone()
        flat = run.view(dtype)
        keys = [e.key for e in entries[i:j]]
        pieces = flat.split([math.prod(e.shape) for e in entries[i:j]])
        for e, piece in zip(entries[i:j], pieces, strict=True):
            tensors[e.key] = piece.view(e.shape)
        runs.append((flat, keys))
        i = j
    return tensors, runs


def _sealed(raw: bytes, data: Tensor, metadata: Mapping[str, str]) -> bool | None:
    stored = metadata.get(DIGEST)
    if stored is None:
        return None
    if not re.fullmatch(r"[0-9a-f]{32}", stored):
        return False
    found = hashlib.blake2b(raw.replace(stored.encode(), _BLANK.encode(), 1), digest_size=16)
    if data.numel():
        found.update(data.numpy())  # type: ignore[arg-type]
    return found.hexdigest() == stored
