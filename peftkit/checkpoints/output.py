"""A directory of weights that grows beside its target: put in its place when it is whole, gone on with when it is not."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from peftkit.storage import StorageError, directory

_SYNC_BYTES = 256 << 20  # what a power failure may cost


class Useless(StorageError):
    """What was written so far is of no use to a later call."""


@contextlib.contextmanager
def growing(target: Path, plan: str, names: set[str], *, overwrite: bool) -> Iterator[Path]:
    """A directory to write `names` into, put in the place of `target` when the block ends well.

    Where it does not, whatever the reason, what is written stays, and the same `plan` finds it again.

    Raises:
        StorageError: `target` is there, unless with `overwrite` it is empty, or holds weights and nothing that the new one
            has not; another process is at the same; nothing can be written there.
    """
    target = Path(os.path.realpath(target))
    fresh = target.with_name(f".{target.name}.{plan}.merge")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        directory.put_back(target)
        _check_target(target, names, overwrite=overwrite)
        fresh.mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error}") from error
    lock = directory.claim(fresh)
    if lock is None:
        raise StorageError(f"another process is writing {target} from the same files; wait for it, or stop it")
    try:
        _take_up(fresh)
        yield fresh
        _check_target(target, names, overwrite=overwrite)  # it may have come meanwhile
        _place(fresh, target)
    except OSError as error:
        raise StorageError(
            f"{target} is not written yet: {error}. What was done is kept in {fresh}; the same call goes on from there"
        ) from error
    except Useless:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    finally:
        if not any(fresh.glob("*")) if fresh.exists() else True:  # nothing was done, or it is in place
            shutil.rmtree(fresh, ignore_errors=True)
            _mark(fresh).unlink(missing_ok=True)
        directory.let_go(lock)
    for left in others(target):
        directory.remove_unclaimed(left)
        _mark(left).unlink(missing_ok=True)


def others(target: Path) -> list[Path]:
    """What calls for the same target, with whatever settings, have left beside it."""
    target = Path(os.path.realpath(target))
    return sorted(p for p in target.parent.glob(f".{directory.literal(target.name)}.*.merge") if p.is_dir())


def _check_target(target: Path, names: set[str], *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise StorageError(f"{target} is a file; the weights are written as a directory, so give another path")
    held = sorted(p.name for p in target.iterdir())
    if held and not overwrite:
        raise StorageError(f"{target} is there already; give another path, or overwrite=True to replace it")
    if held and not any(name.endswith(".safetensors") for name in held):
        raise StorageError(f"{target} holds no safetensors file, so it is not taken for a model, and is not replaced")
    for name in held:
        weights = name.endswith((".safetensors", ".safetensors.index.json")) and not name.startswith("adapter_")
        if not weights and name not in names:
            raise StorageError(
                f"{target} holds {name}, which the new one would not have, and is not replaced, since that would be lost; "
                "move it away, or give another path"
            )


def _mark(fresh: Path) -> Path:
    """Names the directory that grows: once exchanged, what has its path is another one, the old target."""
    return fresh.with_name(fresh.name + ".mark")


def _take_up(fresh: Path) -> None:
    """Empty the directory, unless it is one that grew."""
    mark, own = _mark(fresh), str(fresh.stat().st_ino)
    if not mark.exists() or mark.read_text() != own:
        for path in fresh.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        mark.write_text(own)


def _place(fresh: Path, target: Path) -> None:
    for path in fresh.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":  # those were synced as they were finished
            directory.sync(path)
    directory.sync(fresh)
    if target.exists():
        fresh.chmod(target.stat().st_mode & 0o7777)
    try:
        directory.put_in_place(fresh, target, "write to")
    except StorageError as error:
        raise StorageError(f"{error}. What was done is kept in {fresh}") from error
    _mark(fresh).unlink()
    directory.sync(target.parent)
    shutil.rmtree(fresh, ignore_errors=True)  # once exchanged, it is the old one


class GrowingFile:
    """One file of weights, written from its beginning to its end, over several runs if need be.

    Attributes:
        done: bytes of tensors that are written for good; a new run goes on there.
    """

    def __init__(self, path: Path, header: bytes, size: int):
        self._path, self._header, self._size = path, header, size
        self._part, self._upto = path.with_name(path.name + ".part"), path.with_name(path.name + ".upto")
        self._file: BinaryIO | None = None
        self.done = size if path.exists() else self._kept()
        self._written = self.done

    def _kept(self) -> int:
        try:
            with self._part.open("rb") as file:
                same = file.read(len(self._header)) == self._header
            done = int(self._upto.read_text())
            long_enough = self._part.stat().st_size >= len(self._header) + done
        except (OSError, ValueError):
            return 0
        return done if same and long_enough and 0 <= done <= self._size else 0

    def __enter__(self) -> GrowingFile:
        if self._path.exists():
            self._upto.unlink(missing_ok=True)
            return self
        if self.done:
            self._file = self._part.open("r+b")
            self._file.truncate(len(self._header) + self.done)
            self._file.seek(0, os.SEEK_END)
        else:
            self._upto.unlink(missing_ok=True)
            self._file = self._part.open("wb")
            self._file.write(self._header)
        return self

    def write(self, piece: memoryview | bytes) -> None:
        """Bytes of a tensor."""
        assert self._file is not None
        self._file.write(piece)
        self._written += len(piece)

    def tensor_done(self) -> None:
        """Between two tensors: a new run may go on from here, once it is on the disk."""
        if self._written - self.done >= _SYNC_BYTES:
            self._sync()
            fresh = self._upto.with_name(self._upto.name + ".new")
            fresh.write_text(str(self._written))
            directory.sync(fresh)
            os.replace(fresh, self._upto)
            self.done = self._written

    def _sync(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._file is None:
            return
        try:
            if kind is None:
                assert self._written == self._size, "the header promises other tensors"
                self._sync()
        finally:
            self._file.close()
        if kind is None:
            os.replace(self._part, self._path)
            self._upto.unlink(missing_ok=True)
