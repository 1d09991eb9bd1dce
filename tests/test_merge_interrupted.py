"""Whatever happens while files are merged: what is there is the old or the new, whole, and the work goes on later."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import ROOT, kill_often, seconds
from safetensors.torch import load_file, save_file
from storage_helpers import folder_bytes, small, trained

import peftkit
from peftkit import LoRAConfig, StorageError
from peftkit.checkpoints import merge, output, side_files
from peftkit.storage import directory


@pytest.fixture
def base(tmp_path) -> Path:
    """Two files, an index, and something beside them."""
    folder = tmp_path / "base"
    folder.mkdir()
    found = small().state_dict()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {key: names[key.startswith("2")] for key in found}
    for name in names:
        save_file({k: v for k, v in found.items() if where[k] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def adapters(tmp_path) -> list[Path]:
    peftkit.save(trained(small(), seed=1), tmp_path / "a0")
    peftkit.save(trained(small(), LoRAConfig(r=3, targets="all-linear"), seed=2), tmp_path / "a1")
    return [tmp_path / "a0", tmp_path / "a1"]


@pytest.fixture
def expected(tmp_path, base, adapters) -> list[dict[str, bytes]]:
    found = []
    for adapter in adapters:
        peftkit.merge_checkpoint(base, adapter, tmp_path / "whole")
        found.append(folder_bytes(tmp_path / "whole"))
        shutil.rmtree(tmp_path / "whole")
    assert found[0] != found[1]
    return found


def left(parent: Path) -> list[Path]:
    return sorted(p for p in parent.iterdir() if p.name.startswith("."))


def work(parent: Path) -> list[Path]:
    """The directories that grow there."""
    return [p for p in left(parent) if p.is_dir()]


def test_a_killed_merge(tmp_path, base, adapters, expected):
    """A child merges one adapter over another for ever and is killed at 200 random moments."""
    out = tmp_path / "out"
    code = f"""
        import peftkit
        from peftkit.checkpoints import output
        output._SYNC_BYTES = 1  # every tensor is one to go on from
        def write(which):
            peftkit.merge_checkpoint({str(base)!r}, {[str(a) for a in adapters]!r}[which], {str(out)!r}, overwrite=True)
        """
    window = 2 * seconds(lambda: peftkit.merge_checkpoint(base, adapters[0], out, overwrite=True))
    kill_often(code, lambda: expected.index(folder_bytes(out)), lambda: bool(left(tmp_path)), window=window)
    peftkit.merge_checkpoint(base, adapters[1], out, overwrite=True)
    assert folder_bytes(out) == expected[1] and left(tmp_path) == []


class Stop(BaseException):
    """As a kill, but in this process."""


def stopping(after: int, kind: Any) -> Any:
    """A progress that stops the work after so many tensors."""
    count = 0

    def progress(done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise kind

    return progress


@pytest.mark.parametrize("after", range(1, 5))
def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch, base, adapters, expected, after):
    monkeypatch.setattr(output, "_SYNC_BYTES", 1)
    out = tmp_path / "out"
    with pytest.raises(Stop):
        peftkit.merge_checkpoint(base, adapters[0], out, progress=stopping(after, Stop))
    assert not out.exists() and len(work(tmp_path)) == 1
    made = []
    pieces = merge._Plan.pieces
    monkeypatch.setattr(merge._Plan, "pieces", lambda plan, item: made.append(item.key) or pieces(plan, item))
    peftkit.merge_checkpoint(base, adapters[0], out)
    assert folder_bytes(out) == expected[0] and left(tmp_path) == []
    assert len(made) == 4 - after, made


@pytest.mark.parametrize("change", ["adapter", "weight", "dtype", "base"])
def test_what_was_written_for_other_files_is_not_taken(tmp_path, monkeypatch, base, adapters, change):
    monkeypatch.setattr(output, "_SYNC_BYTES", 1)
    out = tmp_path / "out"
    kwargs: dict[str, Any] = {"check_base": False}
    with pytest.raises(Stop):
        peftkit.merge_checkpoint(base, {adapters[0]: 0.5}, out, progress=stopping(3, Stop), **kwargs)
    assert len(work(tmp_path)) == 1
    other = {adapters[change == "adapter"]: 2.0 if change == "weight" else 0.5}
    if change == "dtype":
        kwargs["dtype"] = torch.bfloat16
    if change == "base":
        (file, *_) = base.glob("*.safetensors")
        save_file({k: v + 1 for k, v in load_file(file).items()}, file, {"format": "pt"})
    peftkit.merge_checkpoint(base, other, tmp_path / "whole", **kwargs)
    peftkit.merge_checkpoint(base, other, out, **kwargs)
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole")
    assert left(tmp_path) == []  # and what nobody goes on with has gone


@pytest.mark.parametrize("damage", ["shorter", "another header", "no number", "too far"])
def test_a_half_written_file_that_was_changed(tmp_path, monkeypatch, base, adapters, expected, damage):
    monkeypatch.setattr(output, "_SYNC_BYTES", 1)
    out = tmp_path / "out"
    with pytest.raises(Stop):
        peftkit.merge_checkpoint(base, adapters[0], out, progress=stopping(1, Stop))
    (folder,) = work(tmp_path)
    (part,), (upto,) = folder.glob("*.part"), folder.glob("*.upto")
    raw = part.read_bytes()
    if damage == "shorter":
        part.write_bytes(raw[:-5])
    elif damage == "another header":
        part.write_bytes(raw[:9] + b"?" + raw[10:])
    else:
        upto.write_text("?" if damage == "no number" else "99999")
    peftkit.merge_checkpoint(base, adapters[0], out)
    assert folder_bytes(out) == expected[0]


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["write", "copy", "exchange", "sync"])
def test_a_disk_that_fills(tmp_path, monkeypatch, base, adapters, expected, where):
    """The old is there, whole; with room again, the same call makes the new."""
    out = tmp_path / "out"
    peftkit.merge_checkpoint(base, adapters[0], out)
    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(output.GrowingFile, "write", no_space)
        elif where == "copy":
            patch.setattr(side_files.shutil, "copyfile", no_space)
        elif where == "exchange":
            patch.setattr(directory, "exchange", no_space)
        else:
            patch.setattr(output.os, "fsync", no_space)
        with pytest.raises(StorageError, match=r"No space left.*(the same call goes on|is kept)"):
            peftkit.merge_checkpoint(base, adapters[1], out, overwrite=True)
    assert folder_bytes(out) == expected[0]
    peftkit.merge_checkpoint(base, adapters[1], out, overwrite=True)
    assert folder_bytes(out) == expected[1] and left(tmp_path) == []


FULL = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from pathlib import Path
import torch, peftkit
from peftkit import StorageError
from peftkit.checkpoints import merge
from storage_helpers import folder_bytes, small, trained
disk, base, adapters = Path({disk!r}), {base!r}, {adapters!r}
models = trained(small(), seed=1), trained(torch.nn.Sequential(torch.nn.Linear(2000, 2000)))
merge._check_space = lambda folder, total: None  # which tells it beforehand
def save(which):
    peftkit.save(models[which], disk / "there")
def write(which):
    peftkit.merge_checkpoint(base, adapters[which], disk / "there", overwrite=True)
for act in (save, write):
    for room in (0, 4096, 8192):
        act(0)
        before = folder_bytes(disk / "there")
        with open(disk / "filler", "wb") as filler:
            filler.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - room))
        try:
            act(1)
        except (StorageError, OSError) as error:
            assert "space" in str(error), error
        else:
            raise AssertionError("it has fitted")
        assert folder_bytes(disk / "there") == before
        (disk / "filler").unlink()
        act(1)
        assert folder_bytes(disk / "there") != before and os.listdir(disk) == ["there"], os.listdir(disk)
    import shutil
    shutil.rmtree(disk / "there")
print("held")
"""


def test_a_disk_that_is_full(tmp_path, base, adapters):
    """A small file system of its own, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    program = tmp_path / "program.py"
    paths = {"disk": str(disk), "base": str(base), "adapters": [str(a) for a in adapters], "root": str(ROOT)}
    program.write_text(FULL.format(**paths))
    command = f"mount -t tmpfs -o size=1m none {disk} && echo mounted && exec {sys.executable} {program}"
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", command]
    done = subprocess.run(inside, capture_output=True, text=True)
    if "mounted" not in done.stdout:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert "held" in done.stdout, done.stderr


def test_too_little_room_is_told_beforehand(tmp_path, monkeypatch, base, adapters):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(StorageError, match=r"has 10 bytes free, and 442 are to be written"):
        peftkit.merge_checkpoint(base, adapters[0], tmp_path / "out")
    assert left(tmp_path) == [] and not (tmp_path / "out").exists()


def test_two_at_once(tmp_path, base, adapters, expected):
    """Of the same settings one waits for the other; of others it may, and is first; nothing done is lost."""
    tried = []

    def progress(done: int, total: int) -> None:
        if not tried:
            tried.append(True)
            with pytest.raises(StorageError, match="another process is writing"):
                peftkit.merge_checkpoint(base, adapters[0], tmp_path / "out")
            peftkit.merge_checkpoint(base, adapters[1], tmp_path / "out")

    with pytest.raises(StorageError, match="is there already"):
        peftkit.merge_checkpoint(base, adapters[0], tmp_path / "out", progress=progress)
    assert folder_bytes(tmp_path / "out") == expected[1]
    peftkit.merge_checkpoint(base, adapters[0], tmp_path / "out", overwrite=True)
    assert folder_bytes(tmp_path / "out") == expected[0] and left(tmp_path) == []


def test_an_old_target_left_by_a_kill_is_not_taken_for_work(tmp_path, base, adapters, expected):
    """A kill just after the exchange leaves the old files under the name of the work."""
    out = tmp_path / "out"
    with pytest.raises(Stop):
        peftkit.merge_checkpoint(base, adapters[0], out, progress=stopping(4, Stop))
    (old,) = work(tmp_path)
    os.rename(old, tmp_path / "exchanged")
    peftkit.merge_checkpoint(base, adapters[1], old)  # all files finished, of another model
    peftkit.merge_checkpoint(base, adapters[0], out)
    assert folder_bytes(out) == expected[0]


@pytest.mark.parametrize("what", ["caller", "space", "exchange"])
def test_an_error_loses_nothing(tmp_path, monkeypatch, base, adapters, expected, what):
    """Of a caller's own, of a disk that is still full, of a directory that cannot be replaced: the work is kept."""
    monkeypatch.setattr(output, "_SYNC_BYTES", 1)
    out = tmp_path / "out"
    peftkit.merge_checkpoint(base, adapters[1], out)
    with pytest.raises(RuntimeError):
        peftkit.merge_checkpoint(
            base, adapters[0], out, overwrite=True, progress=stopping(4, RuntimeError("of the caller's own"))
        )
    with monkeypatch.context() as patch:
        if what == "space":
            patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 0, -1000))
        if what == "exchange":
            patch.setattr(directory, "exchange", no_space)
        for _ in range(2 if what != "caller" else 0):
            with pytest.raises(StorageError, match="make room|cannot be replaced.*What was done is kept"):
                peftkit.merge_checkpoint(base, adapters[0], out, overwrite=True)
    assert folder_bytes(out) == expected[1]
    pieces = merge._Plan.pieces
    made = []
    monkeypatch.setattr(merge._Plan, "pieces", lambda plan, item: made.append(item.key) or pieces(plan, item))
    peftkit.merge_checkpoint(base, adapters[0], out, overwrite=True)
    assert folder_bytes(out) == expected[0] and left(tmp_path) == [] and made == []


def test_an_exchange_in_three_steps_that_was_killed(tmp_path, monkeypatch, base, adapters, expected):
    """Where a system knows no other exchange: what was set aside gets its name back."""
    out = tmp_path / "out"
    peftkit.merge_checkpoint(base, adapters[0], out)
    monkeypatch.setattr(sys, "platform", "darwin")
    rename = os.rename

    def killed(a: Path, b: Path) -> None:
        if str(b) == str(out):
            raise Stop
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(Stop):
            peftkit.merge_checkpoint(base, adapters[1], out, overwrite=True)
    assert not out.exists()  # the handler of an exception was not reached either: it is as killed
    with pytest.raises(StorageError, match="is there already"):
        peftkit.merge_checkpoint(base, adapters[1], out)
    assert folder_bytes(out) == expected[0]
    peftkit.merge_checkpoint(base, adapters[1], out, overwrite=True)
    assert folder_bytes(out) == expected[1] and left(tmp_path) == []


def test_a_file_system_without_locks(tmp_path, monkeypatch, base, adapters, expected):
    def unknown(*args: Any) -> None:
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(directory.fcntl, "flock", unknown)
    peftkit.merge_checkpoint(base, adapters[0], tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == expected[0] and left(tmp_path) == []


def test_progress_is_told(tmp_path, base, adapters):
    told: list[tuple[int, int]] = []
    peftkit.merge_checkpoint(base, adapters[0], tmp_path / "out", progress=lambda *at: told.append(at))
    assert [done for done, _ in told] == sorted({done for done, _ in told}) and told[-1] == (440, 440)
