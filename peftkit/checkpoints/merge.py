"""Stored adapters folded into a base's files, a tensor at a time: no model is built, and none has to fit in memory."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit import ledger, merging, storage
from peftkit.checkpoints.files import Checkpoint, Place, open_checkpoint
from peftkit.checkpoints.fitting import Fitted, fit, put, stand_in
from peftkit.checkpoints.output import GrowingFile, Useless, growing
from peftkit.checkpoints.side_files import copy_side_files, side_files, write_index
from peftkit.checkpoints.weighting import Folder, Weighted, weighted
from peftkit.merging import Job
from peftkit.method import NotMergeable
from peftkit.storage import StorageError, layout, tensorfile

_PIECE = 16 << 20  # bytes copied at once
_PACKED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)
_VERSION = 1  # of what a merge computes: what an earlier one has half written is not gone on with by a later one
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Merged:
    """What `merge_checkpoint` wrote.

    Attributes:
        path: the directory.
        changed: keys of the tensors that adapters changed.
        added: keys of tensors that the base lacks, of modules that an adapter holds whole.
        bytes: of all tensors.
    """

    path: Path
    changed: Sequence[str]
    added: Sequence[str]
    bytes: int


def merge_checkpoint(
    base: Folder,
    adapters: Weighted,
    out: Folder,
    *,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
    overwrite: bool = False,
    progress: bool | Progress = False,
) -> Merged:
    """Write the base's files with stored adapters merged in, reading and writing a tensor at a time.

    The weights are, bit for bit, what `load` and `merge(model, keep_base=False)` make of the model that the files hold; with
    `dtype`, of the model in the wider of both dtypes, cast afterwards. Weights other than 1 scale an adapter's change,
    `W + Σ wᵢ ΔWᵢ(W)`, in fp32 or wider. Tokenizer, config and other small files are copied. At every moment `out` is what
    it was or whole; where the writing stops in its middle, the same call goes on from there, if no file has changed.

    Memory: the adapters, and at most eight times the largest tensor.

    Args:
        base: directory of a model's safetensors, one file or several with an index.
        adapters: directory of a stored adapter; or several, or pairs or a mapping of directories and weights.
        out: directory to write.
        dtype: of all floating-point tensors; None keeps the base's. Those of 8 bits stay as they are.
        check_base: as in `load`.
        overwrite: replace `out`, if it holds weights and nothing that would be lost.
        progress: True for a bar, or what to call with the bytes done and all bytes.

    Raises:
        StorageError: the base lacks a tensor that an adapter changes, files that are damaged or do not fit, no space, a
            tensor that `dtype` cannot hold; and as for `load`.
        NotMergeable: an adapter that no weight can hold, a weight that the model ties to another.
        ValueError: two adapters would take the place of one module, or a module taken whole has a weight other than 1.
    """
    check_dtype(dtype)
    folders = weighted(adapters)
    checkpoint = open_checkpoint(base)
    _check_dtype_fits(checkpoint, dtype)
    stored = [storage.read(folder) for folder, _ in folders]
    _check_apart(Path(out), [checkpoint.path, *(one.path for one in stored)])
    for one in stored:
        if not one.config.mergeable:
            raise NotMergeable(
                f"{one.path} is {one.config.method}, whose effect depends on the input, so no weight can hold it"
            )
    fitted = fit(checkpoint, stored, check_base=check_base)
    plan = _Plan.of(checkpoint, fitted, [w for _, w in folders], dtype)
    total = sum(s.bytes for s in plan.shards)
    done = 0
    beside = side_files(checkpoint.path)
    names = (
        {s.name for s in plan.shards}
        | {path.parts[0] for path in beside}
        | {n for n, _ in [checkpoint.index or ("", {})]}
    )
    inputs = [one.path for one in stored], [w for _, w in folders], dtype
    name = _name(checkpoint, *inputs)
    with _reporting(progress) as report, growing(Path(out), name, names, overwrite=overwrite) as fresh:
        _check_space(fresh, total + sum((checkpoint.path / path).stat().st_size for path in beside))
        for shard in plan.shards:
            with GrowingFile(fresh / shard.name, shard.header, shard.bytes) as file:
                for end, item in zip(itertools.accumulate(i.bytes for i in shard.items), shard.items, strict=True):
                    if end > file.done:
                        for piece in plan.pieces(item):
                            file.write(piece)
                        file.tensor_done()
                        _trim()
                    report(done + end, total)
            done += shard.bytes
        write_index(checkpoint, fresh, {i.key: (s.name, i.bytes) for s in plan.shards for i in s.items})
        copy_side_files(checkpoint.path, beside, fresh, dtype)
        if _name(checkpoint, *inputs) != name:
            raise Useless(
                f"files of {checkpoint.path} or of an adapter were changed while they were merged; merge again"
            )
    changed = [i.key for s in plan.shards for i in s.items if i.jobs and i.place is not None]
    added = [i.key for s in plan.shards for i in s.items if i.place is None]
    return Merged(Path(out), changed, added, total)


def check_dtype(dtype: object) -> None:
    """Refuse what no weight is stored in.

    Raises:
        ValueError: `dtype` is no floating-point dtype of 16 bits or more.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(f"dtype: a floating-point dtype of 16 bits or more, such as torch.bfloat16, not {dtype!r}")


def _check_dtype_fits(checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    """Refuse to cast what belongs to packed weights, such as their scales."""
    packed = next((k for k, (_, e) in checkpoint.places.items() if e.dtype in _PACKED and len(e.shape) == 2), None)
    if dtype is not None and packed is not None:
        raise StorageError(
            f"{checkpoint.path} is quantised ({packed} is {checkpoint.dtype(packed)}), and its scales are not to be cast; "
            "leave dtype= away"
        )


def _check_apart(out: Path, inputs: Sequence[Path]) -> None:
    """Refuse to write where something is read from: it may be replaced as a whole."""
    target = Path(os.path.realpath(out))
    for path in inputs:
        read = Path(os.path.realpath(path))
        if target == read or target in read.parents or read in target.parents:
            how = (
                "itself is read"
                if target == read
                else f"{'lies in' if read in target.parents else 'holds'} {path}, which is read"
            )
            raise StorageError(f"{out} {how}; write to a directory beside it")


# -- what is to be written -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """One tensor to write. `name` is the skeleton's, `place` None where the base has none."""

    key: str
    name: str
    place: Place | None
    dtype: torch.dtype
    shape: Sequence[int]
    jobs: Sequence[tuple[Job, str, float]]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Shard:
    name: str
    header: bytes
    items: Sequence[_Item]

    @property
    def bytes(self) -> int:
        return sum(i.bytes for i in self.items)


@dataclass(frozen=True)
class _Plan:
    checkpoint: Checkpoint
    fitted: Fitted
    shards: Sequence[_Shard]

    @classmethod
    def of(cls, checkpoint: Checkpoint, fitted: Fitted, weights: Sequence[float], dtype: torch.dtype | None) -> _Plan:
        """What to write, in the base's order.

        Raises:
            As `merge_checkpoint`, for all that can be known before anything is written.
        """
        jobs = _jobs(checkpoint, fitted, weights)
        names = {key: name for name, key in fitted.keys.items()}
        shards = []
        for file, header in checkpoint.files.items():
            items = [
                _Item(e.key, n, Place(file, e), _out(e.dtype, dtype), e.shape, jobs.get(n, ()))
                for e in header.entries
                if (n := names[e.key])
            ]
            if file == list(checkpoint.files)[-1]:
                items += [
                    _Item(n, n, None, _out(own, dtype), shape, jobs[n]) for n, (own, shape) in fitted.added.items()
                ]
            raw = tensorfile.header_bytes({i.key: (i.dtype, i.shape) for i in items}, header.metadata)
            shards.append(_Shard(file, raw, items))
        return cls(checkpoint, fitted, shards)

    def pieces(self, item: _Item) -> Iterator[memoryview]:
        """The bytes of a tensor as it is to be."""
        if item.jobs:
            yield from _pieces(self._merged(item), item)
        elif item.place is not None:
            own = self.checkpoint.tensor(item.key)
            yield from _pieces(own, item)

    def _merged(self, item: _Item) -> Tensor:
        own = None if item.place is None else self.checkpoint.tensor(item.key)
        kinds = [item.dtype] if own is None else [item.dtype, own.dtype]
        if any(weight != 1 for *_, weight in item.jobs):
            kinds.append(torch.float32)
        wide = kinds[0]
        for kind in kinds[1:]:
            wide = torch.promote_types(wide, kind)
        target = torch.empty(tuple(item.shape), dtype=wide) if own is None else own.to(wide, copy=True)
        del own
        held = put(self.fitted.root, item.name, target)
        merging.fold([j for j, *_ in item.jobs], item.jobs[0][1], held, [w for *_, w in item.jobs])
        put(self.fitted.root, item.name, stand_in(wide, item.shape))
        return held.detach()


def _out(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and own.is_floating_point and own.itemsize > 1 else own


def _jobs(checkpoint: Checkpoint, fitted: Fitted, weights: Sequence[float]) -> dict[str, list[tuple[Job, str, float]]]:
    """By the full name of what they change: the jobs, what the module calls it, and their weights."""
    _, record = ledger.require(fitted.root)
    attachments = record.named(fitted.names)
    for a in attachments:
        for where, adapter in a.adapters.items():
            for name in adapter.merges:
                _check_number(checkpoint, fitted.keys.get(a.sites[where].full_name(name)))
    whose = {id(x): w for a, w in zip(attachments, weights, strict=True) for x in a.adapters.values()}
    found: dict[str, list[tuple[Job, str, float]]] = {}
    for job in merging.checked(fitted.root, attachments):
        site, _, _, adapter = job
        if adapter.replaces and whose[id(adapter)] != 1:
            raise ValueError(
                f"{site.name!r} is taken whole from an adapter, so its weight is 1, not {whose[id(adapter)]}"
            )
        for name in adapter.merges:
            found.setdefault(site.full_name(name), []).append((job, name, whose[id(adapter)]))
    return found


def _check_number(checkpoint: Checkpoint, key: str | None) -> None:
    """Refuse to add to what is packed."""
    dtype = checkpoint.dtype(key) if key is not None else torch.float32
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise NotMergeable(
            f"{checkpoint.path}: {key} is packed {dtype}, which nothing can be added to; merge into the checkpoint that it "
            "was made from"
        )


# -- writing -------------------------------------------------------------------------------------------------------------


def _pieces(value: Tensor, item: _Item) -> Iterator[memoryview]:
    flat = value.reshape(-1)
    step = max(1, _PIECE // max(value.dtype.itemsize, item.dtype.itemsize))
    for piece in flat.split(step) if flat.numel() else ():
        made = piece.to(item.dtype)
        changed = bool(item.jobs) or made is not piece
        if changed and not tensorfile.all_finite(made) and (item.jobs or tensorfile.all_finite(piece)):
            raise Useless(
                f"{item.key} would hold values beyond {item.dtype}, or NaN; is the base right, or the dtype= too narrow?"
            )
        raw: Any = made.contiguous().view(torch.uint8).numpy()
        yield memoryview(raw)


def _trim() -> None:
    """Give the system what is free: glibc's heap keeps holes of the size of tensors, which add up over thousands."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _check_space(fresh: Path, total: int) -> None:
    there = sum(p.stat().st_size for p in fresh.iterdir() if p.is_file())
    free = shutil.disk_usage(fresh).free
    if free < total - there:
        left = [p.name for p in fresh.parent.glob("*.merge") if p != fresh and p.name.startswith(".")]
        more = f" (unfinished merges are there too: {', '.join(left)})" if left else ""
        raise StorageError(
            f"{fresh.parent} has {free:,} bytes free, and {total - there:,} are to be written{more}; make room, or give "
            "another path"
        )


def _name(checkpoint: Checkpoint, adapters: Sequence[Path], weights: Sequence[float], dtype: object) -> str:
    """The same for the same files and settings, so that a later call finds what an earlier one has left."""
    found = hashlib.blake2b(repr((_VERSION, torch.__version__, list(weights), dtype)).encode(), digest_size=6)
    for file, header in checkpoint.files.items():
        at = (checkpoint.path / file).stat()
        place = os.path.realpath(checkpoint.path / file)
        found.update(repr((place, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns)).encode())
        found.update(header.raw)
    for folder in adapters:
        for file in (layout.CONFIG, layout.TENSORS):
            found.update((folder / file).read_bytes())
    return found.hexdigest()


@contextlib.contextmanager
def _reporting(progress: bool | Progress) -> Iterator[Progress]:
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda done, total: None
    else:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("merging", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
