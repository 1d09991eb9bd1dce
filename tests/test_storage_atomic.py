"""Whatever happens while saving: the directory holds the old adapter or the new one, whole; nothing else is lost."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import kill_often, seconds
from storage_helpers import CONFIG, TENSORS, adapter_bits, folder_bytes, same, small, trained

import peftkit
from peftkit import LoRAConfig, StorageError
from peftkit.storage import directory, tensorfile


def loads_as(folder: Path, *candidates: torch.nn.Module) -> int:
    """Which of the models the directory holds the adapter of."""
    model = small()
    peftkit.load(model, folder)
    found = adapter_bits(model)
    return next(i for i, c in enumerate(candidates) if same(found, adapter_bits(c)))


def hidden(parent: Path) -> list[str]:
    return sorted(p.name for p in parent.iterdir() if p.name.startswith("."))


def test_a_killed_save(tmp_path):
    """A child saves one adapter over another for ever and is killed at 200 random moments."""
    target = tmp_path / "adapter"
    first, second = trained(small(), seed=1), trained(small(), LoRAConfig(r=3, targets="all-linear"), seed=2)
    peftkit.save(first, target)
    (target / "tokenizer.json").write_text("{}")
    (target / "checkpoint").mkdir()
    (target / "checkpoint" / "state.txt").write_text("state")
    code = f"""
        import peftkit
        from peftkit import LoRAConfig
        from storage_helpers import small, trained
        models = trained(small(), seed=1), trained(small(), LoRAConfig(r=3, targets="all-linear"), seed=2)
        for i, model in enumerate(models):
            model.load_state_dict(torch.load({str(tmp_path)!r} + f"/{{i}}.pt"))
        def write(which):
            peftkit.save(models[which], {str(target)!r})
        """
    torch.save(first.state_dict(), tmp_path / "0.pt")
    torch.save(second.state_dict(), tmp_path / "1.pt")
    window = 2 * seconds(lambda: peftkit.save(first, tmp_path / "other"))

    def state() -> int:
        assert (target / "tokenizer.json").read_text() == "{}"
        assert (target / "checkpoint" / "state.txt").read_text() == "state"
        return loads_as(target, first, second)

    def interrupted() -> bool:
        left = [p for p in tmp_path.iterdir() if p.name.endswith(".new")]
        for p in left:
            os.utime(p, (0, 0))  # old enough for the next save to remove it
        return bool(left)

    kill_often(code, state, interrupted, window=window)
    peftkit.save(first, target)
    assert hidden(tmp_path) == []
    assert loads_as(target, first, second) == 0 and (target / "tokenizer.json").exists()


@pytest.fixture
def target(tmp_path) -> Path:
    folder = tmp_path / "parent" / "adapter"
    peftkit.save(trained(small()), folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "logs").mkdir()
    (folder / "logs" / "a.txt").write_text("a")
    return folder


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


BREAKS = {
    "mkdir": lambda m: m.setattr(Path, "mkdir", no_space),
    "tensors": lambda m: m.setattr(tensorfile, "_batches", no_space),
    "config": lambda m: m.setattr(Path, "write_text", no_space),
    "fsync": lambda m: m.setattr(os, "fsync", no_space),
    "carry": lambda m: (m.setattr(os, "link", no_space), m.setattr(shutil, "copy2", no_space)),
    "exchange": lambda m: m.setattr(directory, "exchange", no_space),
    "interrupt": lambda m: m.setattr(directory, "exchange", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt())),
}


@pytest.mark.parametrize("where", BREAKS)
def test_a_save_that_fails_changes_nothing(target, monkeypatch, where):
    before = folder_bytes(target)
    model = trained(small(), LoRAConfig(r=3, targets="all-linear"))
    with monkeypatch.context() as patch:
        BREAKS[where](patch)
        with pytest.raises((OSError, StorageError, KeyboardInterrupt)):
            peftkit.save(model, target)
    assert folder_bytes(target) == before
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    peftkit.save(model, target)
    assert folder_bytes(target) != before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_written(target, value):
    before = folder_bytes(target)
    model = trained(small())
    with torch.no_grad():
        peftkit.parameters(model)[2][1, 1] = value
    with pytest.raises(StorageError, match=r"base_model\.model\.2\.lora_A\.weight has values that are not finite"):
        peftkit.save(model, target)
    assert folder_bytes(target) == before and hidden(target.parent) == []


def test_a_module_that_was_replaced_is_not_saved(target):
    before = folder_bytes(target)
    model = trained(small())
    model[2] = torch.nn.Linear(8, 6)
    with pytest.raises(StorageError, match=r"'2' .*no longer in the model"):
        peftkit.save(model, target)
    assert folder_bytes(target) == before


def test_the_meta_device_has_nothing_to_save(target):
    before = folder_bytes(target)
    model = small().to("meta")
    peftkit.inject(model, LoRAConfig(r=1, targets="all-linear"))
    with pytest.raises(StorageError, match="meta"):
        peftkit.save(model, target)
    assert folder_bytes(target) == before


def test_other_files_survive(target):
    (target / "link").symlink_to("tokenizer.json")
    (target / "dangling").symlink_to("nowhere")
    (target / "README.md").write_text("mine")
    (target / "logs").chmod(0o700)
    os.utime(target / "logs", (1e9, 1e9))
    target.chmod(0o750)
    model = trained(small(), seed=5)
    peftkit.save(model, target)
    assert loads_as(target, model) == 0
    assert (target / "tokenizer.json").read_text() == "{}" and (target / "logs" / "a.txt").read_text() == "a"
    assert (target / "logs").stat().st_mtime == 1e9
    assert os.readlink(target / "link") == "tokenizer.json" and (target / "dangling").is_symlink()
    assert (target / "README.md").read_text() == "mine"
    assert stat.S_IMODE(target.stat().st_mode) == 0o750 and stat.S_IMODE((target / "logs").stat().st_mode) == 0o700
    assert hidden(target.parent) == []


def test_a_symbolic_link_stays_one(target, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(target)
    model = trained(small(), seed=5)
    peftkit.save(model, link)
    assert link.is_symlink() and loads_as(target, model) == 0 and hidden(tmp_path) == hidden(target.parent) == []
    (tmp_path / "later").symlink_to(tmp_path / "not-yet")
    peftkit.save(model, tmp_path / "later")
    assert loads_as(tmp_path / "not-yet", model) == 0


def test_relative_paths(target, monkeypatch):
    model = trained(small(), seed=5)
    monkeypatch.chdir(target.parent)
    peftkit.save(model, "adapter")
    assert loads_as(Path("adapter"), model) == 0
    peftkit.save(model, Path("new/deep/er"))
    assert loads_as(target.parent / "new" / "deep" / "er", model) == 0
    peftkit.save(model, "adapter/")
    assert sorted(p.name for p in target.parent.iterdir()) == ["adapter", "new"]


def test_the_working_directory_itself(target, monkeypatch):
    model = trained(small(), seed=5)
    monkeypatch.chdir(target / "logs")
    peftkit.save(model, "..")
    assert Path.cwd() == target / "logs" and Path("a.txt").read_text() == "a"
    monkeypatch.chdir(target)
    peftkit.save(model, ".")
    assert Path.cwd() == target and loads_as(Path("."), model) == 0
    assert loads_as(target, model) == 0


def test_without_an_exchange_in_one_step(target, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    model = trained(small(), seed=5)
    peftkit.save(model, target)
    assert loads_as(target, model) == 0 and (target / "tokenizer.json").exists()
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_where_nothing_can_be_written(target, tmp_path, monkeypatch):
    model = trained(small())
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is a file"):
        peftkit.save(model, tmp_path / "file")
    with pytest.raises(StorageError, match=r"cannot be saved: .*must be writable"):
        peftkit.save(model, tmp_path / "file" / "adapter")
    assert (tmp_path / "file").read_text() == "x"
    before = folder_bytes(target)

    def denied(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name.endswith(".new"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # tests may run as root, whom no mode stops
        patch.setattr(Path, "mkdir", denied)
        with pytest.raises(StorageError, match=rf"{target.parent} must be writable"):
            peftkit.save(model, target)
    with monkeypatch.context() as patch:
        patch.setattr(directory, "exchange", lambda a, b: (_ for _ in ()).throw(OSError(errno.EBUSY, "busy")))
        with pytest.raises(StorageError, match="mount point"):
            peftkit.save(model, target)
    assert folder_bytes(target) == before and hidden(target.parent) == []


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_modes_follow_the_umask(tmp_path, umask, file, folder):
    before = os.umask(umask)
    try:
        peftkit.save(trained(small()), tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == folder
    for path in (tmp_path / "a").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == file, path


def test_what_others_are_writing_is_left_alone(target):
    fresh = target.with_name(f".{target.name}.0123456789ab.new")
    fresh.mkdir()
    os.utime(fresh, (0, 0))
    lock = directory.claim(fresh)
    assert lock is not None
    young = target.with_name(f".{target.name}.ba9876543210.new")
    young.mkdir()
    peftkit.save(trained(small()), target)
    assert fresh.exists() and young.exists()
    os.close(lock)
    peftkit.save(trained(small()), target)
    assert not fresh.exists() and young.exists()


def test_two_at_once(tmp_path):
    """Threads that save over each other: the directory is always one of theirs."""
    models = [trained(small(), seed=s) for s in (1, 2)]
    target = tmp_path / "adapter"
    peftkit.save(models[0], target)
    failed: list[BaseException] = []

    def run(model: torch.nn.Module) -> None:
        try:
            for _ in range(15):
                peftkit.save(model, target)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(m,)) for m in models]
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        loads_as(target, *models)
    assert not failed
    assert hidden(tmp_path) == []


def test_nothing_is_pickled_and_no_network_is_asked(tmp_path, monkeypatch):
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("pickle or network")

    model = trained(small())
    import pickle

    for module, name in (
        (torch, "save"),
        (torch, "load"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "dump"),
        (pickle, "dumps"),
    ):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(socket, "socket", never)
    monkeypatch.setattr(socket, "create_connection", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    peftkit.save(model, tmp_path / "a")
    assert loads_as(tmp_path / "a", model) == 0
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["README.md", CONFIG, TENSORS]
    with pytest.raises(StorageError, match="'bert-base-uncased' is no directory here"):
        peftkit.load(small(), "bert-base-uncased")
    with pytest.raises(StorageError, match=r"'user/adapter' is no directory here; .*HF_HUB_OFFLINE is set"):
        peftkit.load(small(), "user/adapter")  # a name on the Hub, which nobody is asked about: tests run offline
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(StorageError, match=r"'user/adapter' is no directory here; .*pip install 'peftkit\[hub\]'"):
        peftkit.load(small(), "user/adapter")
