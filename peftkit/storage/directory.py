"""Writing a directory so that at every moment the old one or the new one is there, whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from peftkit.storage.errors import StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_YOUNG = 10.0  # seconds within which another process may not have locked its directory yet


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new directory beside `target` to write into; put in its place when the block ends well, else removed.

    Files of the old directory that the new one lacks are carried over, so a tokenizer saved beside an adapter stays.
    Where `target` is a symbolic link, what it points to is replaced.

    Raises:
        StorageError: `target` is a file, or its parent cannot be written to.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise StorageError(f"{target} is a file; an adapter is saved as a directory, so give another path")
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        put_back(target)
        _remove_abandoned(target)
        fresh.mkdir()
    except OSError as error:
        raise StorageError(
            f"{target} cannot be saved: {error}. A new directory is made beside it and put in its place, so "
            f"{target.parent} must be writable"
        ) from error
    lock = claim(fresh)
    try:
        yield fresh
        if target.exists():
            fresh.chmod(target.stat().st_mode & 0o7777)
            _carry_over(target, fresh)
        for file in fresh.iterdir():
            if file.is_file() and not file.is_symlink():
                sync(file)
        sync(fresh)
        put_in_place(fresh, target, "save to")
        if fresh.exists():  # the old one
            _carry_over(fresh, target)  # what came in meanwhile
        sync(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # once exchanged, it is the old one
        let_go(lock)


def put_in_place(fresh: Path, target: Path, verb: str) -> None:
    """Give the directory `fresh` the name `target`, and what was there the name of `fresh`.

    Raises:
        StorageError: another directory cannot have that name; `verb` is how one would do it elsewhere.
    """
    if not target.exists():
        os.rename(fresh, target)
        return
    here = _working_directory()
    try:
        exchange(fresh, target)
    except OSError as error:
        raise StorageError(
            f"{target} cannot be replaced: {error}. It may be a mount point; {verb} a directory inside it"
        ) from error
    if here is not None and Path(here).is_dir() and (Path(here) == target or target in Path(here).parents):
        os.chdir(here)  # the directory of that name now, not the one that is about to go


def put_back(target: Path) -> None:
    """Give `target` its name again where an exchange in three steps was killed after the first."""
    for aside in target.parent.glob(f".{literal(target.name)}.*.old"):
        if not target.exists():
            os.rename(aside, target)
        else:
            shutil.rmtree(aside, ignore_errors=True)


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None


def _carry_over(old: Path, new: Path) -> None:
    """Give `new` what `old` has and it lacks; `old` keeps it too, so a kill in between loses nothing."""
    for left in old.iterdir():
        there = new / left.name
        if left.is_symlink():
            if not there.is_symlink() and not there.exists():
                there.symlink_to(os.readlink(left))
        elif left.is_dir():
            if not there.exists():
                there.mkdir()
                _carry_over(left, there)
                shutil.copystat(left, there)  # last: what goes in changes when it was modified
            elif there.is_dir():
                _carry_over(left, there)
        elif not there.exists():
            try:
                os.link(left, there)
            except OSError:
                shutil.copy2(left, there)


def exchange(a: Path, b: Path) -> None:
    """Swap two directories in one step where the system can; else in three, with a moment in which `b` is not there."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):
            if libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
                return
            if (code := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS):
                raise OSError(code, os.strerror(code), str(a), None, str(b))
    aside = b.with_name(f"{a.name}.old")
    os.rename(b, aside)
    try:
        os.rename(a, b)
    except BaseException:
        os.rename(aside, b)
        raise
    os.rename(aside, a)


def claim(directory: Path) -> int | None:
    """Hold a directory until this process ends, however it ends, so that others can tell one that is abandoned.

    Returns:
        What to close when it is let go; -1 where the file system knows no locks; None where another process holds it.
    """
    if fcntl is None:
        return -1
    try:
        fd = os.open(directory, os.O_RDONLY)
    except OSError:  # gone meanwhile
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        return None if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else -1
    return fd


def let_go(lock: int | None) -> None:
    """The inverse of `claim`."""
    if lock is not None and lock >= 0:
        os.close(lock)


def _remove_abandoned(target: Path) -> None:
    """What killed saves left beside `target`: nothing is in them that the target lacks."""
    if not target.exists():
        return
    for left in target.parent.glob(f".{literal(target.name)}.*.new"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime < _YOUNG:
                continue
        remove_unclaimed(left)


def remove_unclaimed(left: Path) -> None:
    """Remove a directory, if it is known that nobody holds it."""
    lock = claim(left)
    if lock is not None and lock >= 0:
        shutil.rmtree(left, ignore_errors=True)
        os.close(lock)


def literal(name: str) -> str:
    """A glob that means this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def sync(path: Path) -> None:
    """Have the disk hold what the file or directory does."""
    if path.is_dir() and sys.platform == "win32":
        return
    fd = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
