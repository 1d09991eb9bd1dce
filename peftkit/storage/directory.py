"""Writing a directory so that at every moment the old one or the new one is there, whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new directory beside `target` to write into; put in its place when the block ends well, else removed.

    Files of the old directory that the new one lacks are moved over, so a tokenizer saved beside an adapter stays.

    Raises:
        NotADirectoryError: `target` is a file.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; an adapter is saved as a directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
    try:
        fresh.chmod(0o777 & ~_umask())
        yield fresh
        for file in fresh.iterdir():
            _sync(file)
        _sync(fresh)
        if not target.exists():
            os.rename(fresh, target)
            _sync(target.parent)
            return
        _exchange(fresh, target)
        _sync(target.parent)
        # `fresh` is the old directory now
        for left in fresh.iterdir():
            if not (target / left.name).exists():
                os.rename(left, target / left.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _exchange(a: Path, b: Path) -> None:
    """Swap two directories in one step where the system can; else in two, the old one keeping its name until the last."""
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


def _sync(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
