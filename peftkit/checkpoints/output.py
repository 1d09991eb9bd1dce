"""A directory of weights that grows beside its target: put in its place when it is whole, gone on with when it is not."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from peftkit.storage import StorageError, directory

_MARK = ".peftkit-merge"  # in a directory that grows; what lacks it is finished, or an old target that was exchanged
_SYNC_BYTES = 256 << 20  # what a power failure may cost


@contextlib.contextmanager
def growing(target: Path, plan: str, *, overwrite: bool) -> Iterator[Path]:
    """A directory to write into, put in the place of `target` when the block ends well.

    Where the block raises `OSError` or is killed, what is written stays, and the same `plan` finds it again; after
    any other error it is removed.

    Raises:
        StorageError: `target` is there, unless with `overwrite` it is a directory of weights or empty; another process is
            at the same; nothing can be written there.
    """
    target = Path(os.path.realpath(target))
    _check_target(target, overwrite=overwrite)
    fresh = target.with_name(f".{target.name}.{plan}.merge")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error}") from error
    lock = directory.claim(fresh)
    if lock is None and directory.LOCKS:
        raise StorageError(f"another process is writing {target} from the same files; wait for it, or stop it")
    try:
        if not (fresh / _MARK).exists():
            _empty(fresh)
            (fresh / _MARK).touch()
        try:
            yield fresh
            (fresh / _MARK).unlink()
            _place(fresh, target, overwrite=overwrite)
        except OSError as error:
            raise StorageError(
                f"{target} is not written yet: {error}. What was done is kept in {fresh}; the same call goes on from there"
            ) from error
        except Exception:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        _remove_others(target)
    finally:
        if lock is not None:
            os.close(lock)


def _check_target(target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise StorageError(f"{target} is a file; the weights are written as a directory, so give another path")
    held = [p.name for p in target.iterdir()]
    if not held:
        return
    if not overwrite:
        raise StorageError(f"{target} is there already; give another path, or overwrite=True to replace it")
    if not any(name.endswith(".safetensors") for name in held):
        raise StorageError(f"{target} holds no safetensors file, so it is not taken for a model, and is not replaced")


def _place(fresh: Path, target: Path, *, overwrite: bool) -> None:
    for path in fresh.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":  # those were synced as they were finished
            directory.sync(path)
    directory.sync(fresh)
    _check_target(target, overwrite=overwrite)  # it may have come meanwhile
    if target.exists():
        fresh.chmod(target.stat().st_mode & 0o7777)
        directory.exchange(fresh, target)
    else:
        os.rename(fresh, target)
    directory.sync(target.parent)
    shutil.rmtree(fresh, ignore_errors=True)  # once exchanged, it is the old one


def _remove_others(target: Path) -> None:
    """What other plans for the same target have left."""
    for left in target.parent.glob(f".{directory.literal(target.name)}.*.merge"):
        lock = directory.claim(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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
