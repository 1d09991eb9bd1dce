"""What is fuzzed, and what is asked of it: our own errors alone, no file elsewhere, little memory, little time."""

from __future__ import annotations

import contextlib
import copy
import linecache
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peftkit
from benchmarks.fuzz.mutations import Draw, mutated, pick
from benchmarks.fuzz.seeds import Files, Seed, adapters, bases, foreign
from peftkit import NotMergeable, StorageError, TargetError, storage
from peftkit.checkpoints.files import open_checkpoint
from peftkit.checkpoints.inspection import inspect
from peftkit.checkpoints.verification import verify

TIMES_THE_FILES = 8  # peak of resident memory beyond what there was
CONSTANT = 64 << 20  # bytes: caches, code read for the first time, what an allocator keeps
ADDRESSES = 2 << 30  # bytes of address space beyond what there was: what is asked for and not touched counts as well
SECONDS = 10  # for one input, on a busy machine
_OURS = (StorageError, NotMergeable, TargetError)
_PACKAGE = os.path.dirname(peftkit.__file__)


class Finding(AssertionError):
    """Something that must not happen, with how it came about."""


def read(draw: Draw, folder: Path) -> Callable[[], Any]:
    """`storage.read`."""
    lay(folder / "adapter", mutated(_adapter(draw).adapter, draw))
    return lambda: storage.read(folder / "adapter")


def load(draw: Draw, folder: Path) -> Callable[[], Any]:
    """`load`, on a copy of the model."""
    seed = _adapter(draw)
    lay(folder / "adapter", mutated(seed.adapter, draw))
    model = copy.deepcopy(seed.model)
    check = bool(draw(2))
    return lambda: peftkit.load(model, folder / "adapter", check_base=check)


def look(draw: Draw, folder: Path) -> Callable[[], Any]:
    """`inspect`, and printing what it found."""
    lay(folder / "adapter", mutated(_adapter(draw).adapter, draw))
    return lambda: str(inspect(folder / "adapter"))


def fit(draw: Draw, folder: Path) -> Callable[[], Any]:
    """`verify`."""
    _pair(draw, folder)
    return lambda: verify(folder / "adapter", folder / "base")


def merge(draw: Draw, folder: Path) -> Callable[[], Any]:
    """`merge_checkpoint`."""
    _pair(draw, folder)
    return lambda: peftkit.merge_checkpoint(folder / "base", folder / "adapter", folder / "out", check_base=False)


def checkpoint(draw: Draw, folder: Path) -> Callable[[], Any]:
    """`open_checkpoint`, and every tensor of it."""
    lay(folder / "base", mutated(pick(draw, bases()), draw))

    def run() -> None:
        opened = open_checkpoint(folder / "base")
        for key in opened.places:
            opened.tensor(key).sum()

    return run


def compare(draw: Draw, folder: Path) -> Callable[[], Any]:
    """`difference` of two adapters, or of two checkpoints."""
    files = pick(draw, bases()) if not draw(4) else _adapter(draw).adapter
    lay(folder / "adapter", mutated(files, draw))
    lay(folder / "base", files)
    return lambda: str(peftkit.difference(folder / "adapter", folder / "base").to_dict())


def add(draw: Draw, folder: Path) -> Callable[[], Any]:
    """`combine`."""
    seeds = [s for s in adapters() if s.name.startswith("lora")]
    seed = pick(draw, seeds)
    lay(folder / "adapter", mutated(seed.adapter, draw))
    lay(folder / "base", seed.adapter)
    settings: Any = pick(draw, ({}, {"how": "svd", "r": 2}, {"how": "ties", "density": 0.5, "r": 1}))
    both = [(folder / "adapter", 0.5), (folder / "base", 0.5)]
    return lambda: peftkit.combine(both, folder / "out", **settings)


def change(draw: Draw, folder: Path) -> Callable[[], Any]:
    """`convert` of other programs' files."""
    name, files, base = pick(draw, foreign())
    lay(folder / "adapter", mutated(files, draw))
    lay(folder / "base", base if draw(4) else mutated(base, draw))
    to, suffix = ("gguf", "out.gguf") if not draw(4) else ("peftkit", "out")
    return lambda: peftkit.convert(folder / "adapter" / name, folder / suffix, base=folder / "base", to=to)


TARGETS = {f.__name__: f for f in (read, load, look, fit, merge, checkpoint, compare, add, change)}


def _adapter(draw: Draw) -> Seed:
    return pick(draw, adapters())


def _pair(draw: Draw, folder: Path) -> None:
    seeds = [s for s in adapters() if s.name.endswith("own") or "-linear-" in s.name]
    seed = pick(draw, seeds)
    which = draw(4)
    lay(folder / "adapter", seed.adapter if which == 0 else mutated(seed.adapter, draw))
    lay(folder / "base", seed.base if which > 1 else mutated(seed.base, draw))


def lay(folder: Path, files: Files) -> None:
    """Write `files` below `folder`."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content.kind == "folder":
            path.mkdir()
        elif content.kind == "fifo":
            os.mkfifo(path)
        elif content.kind == "socket":
            with socket.socket(socket.AF_UNIX) as made, contextlib.suppress(OSError):  # a path too long for one
                made.bind(str(path))
        else:
            path.symlink_to(path.name if content.target == "itself" else content.target)


# -- what is asked -------------------------------------------------------------------------------------------------------


def check(target: Callable[[Draw, Path], Callable[[], Any]], draw: Draw) -> str:
    """Run `target` on what `draw` makes of a valid input; returns the name of the error it ended with, or `"fine"`.

    Raises:
        Finding: an error that is not ours or says nothing, a file elsewhere, too much memory or time.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        folder = Path(name) / "case"
        folder.mkdir()
        lay(folder / "secret", {"secret.json": b'{"secret": 1}', "model.safetensors": b"secret"})
        run = target(draw, folder)
        before, size = _tree(Path(name)), _size(folder)
        error, peak, seconds = _measured(run)
        after = _tree(Path(name))
        if error is not None:
            _check_error(error)
            _check_left(before, after)
        elif any(after.get(path) != content for path, content in before.items()):
            raise Finding("a file that was read has changed")
        elif not all(path.startswith("case/out") for path in after.keys() - before.keys()):
            raise Finding(f"it wrote {sorted(after.keys() - before.keys())}")
        if peak > TIMES_THE_FILES * size + CONSTANT:
            raise Finding(f"{peak:,} bytes of memory for {size:,} of files")
        if seconds > SECONDS:
            raise Finding(f"it took {seconds:.1f} s for {size:,} bytes of files")
        return "fine" if error is None else type(error).__name__


def _check_error(error: BaseException) -> None:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.relpath(last.filename, os.path.dirname(_PACKAGE))}:{last.name}"
    shown = f"{type(error).__name__} from {where}: {str(error)[:200]!r}"
    on_purpose = last.filename.startswith(_PACKAGE) and (
        linecache.getline(last.filename, last.lineno or 0).lstrip().startswith("raise ")
    )
    if not isinstance(error, _OURS) and not (type(error) in (ValueError, TypeError) and on_purpose):
        raise Finding(shown) from error
    try:
        str(error).encode()
    except UnicodeError:
        raise Finding(f"a message that cannot be printed: {shown}") from error
    if len(str(error)) > 100_000:
        raise Finding(f"a message of {len(str(error)):,} characters: {shown}") from error


def _check_left(before: dict[str, Any], after: dict[str, Any]) -> None:
    if before != after:
        raise Finding(
            f"it failed, and left {sorted(k for k in before.keys() | after if before.get(k) != after.get(k))}"
        )


def _tree(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "other"
    return found


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if not p.is_symlink() and p.is_file())


def _measured(run: Callable[[], Any]) -> tuple[BaseException | None, int, float]:
    """What it raised, its peak of resident memory in bytes, and its seconds."""
    begin = _memory("VmRSS")
    _forget_peak()
    since = time.monotonic()
    error: BaseException | None = None
    try:
        with _alarm():
            run()
    except Exception as raised:
        error = raised
    seconds = time.monotonic() - since
    return error, _memory("VmHWM") - begin, seconds


class _Hangs(BaseException):
    """So that no handler takes it for an error of the file's."""


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 3 * SECONDS)
    try:
        yield
    except _Hangs as hangs:
        at = traceback.extract_tb(hangs.__traceback__)[-2]
        raise Finding(f"it hangs at {at.filename}:{at.lineno}") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _memory(what: str) -> int:
    if sys.platform != "linux":
        return 0
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(what))


def _forget_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def limit_addresses() -> None:
    """Let the process have little more than it has, so that asking for much is an error, as it is on a small machine."""
    if sys.platform == "linux":
        import resource

        limit = _memory("VmSize") + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def warm_up() -> None:
    """Run each target once on valid files: what torch and transformers allocate once is not the input's."""
    for target in TARGETS.values():
        for first in (0, 1):
            with contextlib.suppress(Finding):
                check(target, lambda n, first=first: min(first, n - 1))
