"""Loading from the Hub what was pushed to it, against a stand-in of its HTTP interface."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hub_standin import TOKEN, Reply
from storage_helpers import CONFIG, README, TENSORS, adapter_bits, folder_bytes, refused, same, small, trained

import peftkit
from peftkit import LoRAConfig, StorageError


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS, README)}


# -- there and back ------------------------------------------------------------------------------------------------------


def test_what_was_pushed_is_what_is_loaded(hub, tmp_path):
    model = trained(small())
    url = peftkit.save(model, tmp_path / "a", push_to_hub="alice/lora")
    repo = hub.repos["alice/lora"]
    assert url == f"{hub.url}/alice/lora/commit/{repo.commits[-1][0]}"
    assert len(repo.commits) == 2 and not repo.private  # the Hub's own first one, and ours
    assert {k: v for k, v in repo.files.items() if k != ".gitattributes"} == files(tmp_path / "a")
    other = small()
    report = peftkit.load(other, "alice/lora")
    assert report.rows and same(adapter_bits(other), adapter_bits(model))
    assert not [r for r in hub.asked if r.startswith("GET") and README in r]


def test_restoring(hub, tmp_path):
    model = trained(small())
    peftkit.save(model, tmp_path / "a", push_to_hub="alice/lora")
    other = trained(small(), seed=5)
    before = peftkit.parameters(other)
    peftkit.restore(other, "alice/lora", revision="main")
    assert same(adapter_bits(other), adapter_bits(model))
    assert all(a is b for a, b in zip(peftkit.parameters(other), before, strict=True))


def test_a_save_pushes_only_where_it_is_told_to(hub, tmp_path):
    assert peftkit.save(trained(small()), tmp_path / "a") is None
    with pytest.raises(ValueError, match="push_to_hub"):
        peftkit.save(trained(small()), tmp_path / "b", private=True)
    assert hub.asked == [] and not (tmp_path / "b").exists()


def test_nothing_but_the_adapter_is_pushed_or_fetched(hub, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"secret")
    peftkit.save(trained(small()), folder, push_to_hub="alice/lora")
    assert set(hub.repos["alice/lora"].files) == {CONFIG, TENSORS, README, ".gitattributes"}
    hub.repos["alice/lora"].commit({"adapter_model.bin": b"x", "../evil": b"x", "sub/../../evil": b"x", "/evil": b"x"})
    peftkit.load(small(), "alice/lora")
    assert {p.name for p in (tmp_path / "cache").rglob("snapshots/*/*")} == {CONFIG, TENSORS}
    assert not list(tmp_path.rglob("evil"))


def test_revisions(hub, tmp_path):
    models = [trained(small(), seed=s) for s in (1, 2)]
    for i, model in enumerate(models):
        peftkit.save(model, tmp_path / str(i), push_to_hub="alice/lora")
    repo = hub.repos["alice/lora"]
    first, second = (sha for sha, _ in repo.commits[1:])
    repo.tags["v1"] = first
    for revision, model in ((None, models[1]), ("v1", models[0]), (first, models[0]), (second, models[1])):
        other = small()
        peftkit.load(other, "alice/lora", revision=revision)
        assert same(adapter_bits(other), adapter_bits(model)), revision
    refused("alice/lora", "'v2'", "no such revision (404)", revision="v2")


def test_both_files_are_of_one_commit(hub, tmp_path):
    """While one is being fetched, a commit comes in."""
    first, second = trained(small()), trained(small(), LoRAConfig(r=3, targets="all-linear"))
    peftkit.save(first, tmp_path / "a", push_to_hub="alice/lora")
    peftkit.save(second, tmp_path / "b")

    def push(request: str, reply: Reply) -> None:
        if request.startswith("GET") and CONFIG in request and len(hub.repos["alice/lora"].commits) == 2:
            hub.repos["alice/lora"].commit(files(tmp_path / "b"))

    hub.breaks = push
    other = small()
    peftkit.load(other, "alice/lora")
    assert len(hub.repos["alice/lora"].commits) == 3 and same(adapter_bits(other), adapter_bits(first))


def test_a_named_adapter_in_its_directory(hub, tmp_path):
    model = trained(small(), name="task-a")
    peftkit.save(model, tmp_path / "a", name="task-a")
    hub.make("alice/several", {f"task-a/{k}": v for k, v in files(tmp_path / "a").items()})
    other = small()
    peftkit.load(other, "alice/several", name="task-a")
    assert same(adapter_bits(other), adapter_bits(model))
    refused("alice/several", "holds no adapter_config.json", "'task-a'", "name=")


def test_pushing_again(hub, tmp_path):
    model = trained(small())
    url = peftkit.save(model, tmp_path / "a", push_to_hub="alice/lora")
    assert (
        peftkit.save(model, tmp_path / "a", push_to_hub="alice/lora") == url
    )  # nothing is new, so nothing is committed
    assert len(hub.repos["alice/lora"].commits) == 2
    peftkit.save(trained(small(), seed=2), tmp_path / "a", push_to_hub="alice/lora")
    assert len(hub.repos["alice/lora"].commits) == 3


# -- what is a name, and what a path -------------------------------------------------------------------------------------


def test_a_directory_comes_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here, there = trained(small(), seed=1), trained(small(), seed=2)
    peftkit.save(there, "elsewhere", push_to_hub="alice/lora")
    peftkit.save(here, "alice/lora")
    hub.asked.clear()
    other = small()
    peftkit.load(other, "alice/lora")
    assert same(adapter_bits(other), adapter_bits(here)) and hub.asked == []
    with pytest.raises(ValueError, match=r"is a path here.*peftkit\.hub\.download"):
        peftkit.load(small(), "alice/lora", revision="main")
    other = small()
    peftkit.load(other, peftkit.hub.download("alice/lora", revision="main"))
    assert same(adapter_bits(other), adapter_bits(there))


@pytest.mark.parametrize(
    "path",
    ["./x", "../x", "/x", "x/", "a/b/c", "a/b/", "~/x", "a//b", "./a/b", "C:/x", "a\\b", "a\\b/c", "lora", "", "a/..",
     "a/b--c", "a/b.git", "a/b c", "a/-b", "ä/b", "a/\0", "https://h/x", "hf://a/b", "a/b@v1", Path("a/b"), Path("lora")],
)  # fmt: skip
def test_paths_are_not_looked_for_on_the_hub(hub, path):
    said = refused(path)
    assert hub.asked == [] and ("no directory" in said)


def test_the_end_of_a_path_that_is_not_there(hub, tmp_path, monkeypatch):
    """`out/adaptor`, mistyped, is somebody's repository perhaps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    hub.make("out/adaptor", {})
    refused("out/adaptor", "no directory here", "out/ is here", "revision='main'")
    assert hub.asked == []
    refused("out/adaptor", "holds no adapter_config.json", revision="main")


def test_a_file_is_no_directory(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alice").mkdir()
    (tmp_path / "alice" / "lora").write_text("x")
    refused("alice/lora", "is no directory")
    assert hub.asked == []


# -- offline -------------------------------------------------------------------------------------------------------------


def test_what_is_refused_anyway_asks_nobody(hub):
    for name in ("default", "../x"):
        with pytest.raises(ValueError, match="name"):
            peftkit.load(trained(small()), "alice/lora", name=name)
    with pytest.raises(KeyError):
        peftkit.restore(trained(small()), "alice/lora", name="other")
    assert hub.asked == []


@pytest.mark.parametrize("named", ["default", "task-a"])
def test_offline_takes_what_the_cache_has(hub, tmp_path, offline, named):
    model = trained(small(), name=named)
    peftkit.save(model, tmp_path / "a", name=named)
    inside = "" if named == "default" else f"{named}/"
    hub.make("alice/lora", {inside + k: v for k, v in files(tmp_path / "a").items()})
    peftkit.load(small(), "alice/lora", name=named)
    offline()
    hub.asked.clear()
    other = small()
    peftkit.load(other, "alice/lora", name=named)
    assert same(adapter_bits(other), adapter_bits(model)) and hub.asked == []
    refused("alice/lora", "HF_HUB_OFFLINE", name=named, revision="v1")


def test_offline_without_a_copy(hub, offline, tmp_path):
    hub.make("alice/lora", {})
    offline()
    refused("alice/lora", "no directory here", "HF_HUB_OFFLINE is set", str(tmp_path / "cache"))
    with pytest.raises(StorageError, match=r"is whole, but was not uploaded: .*HF_HUB_OFFLINE"):
        peftkit.save(trained(small()), tmp_path / "a", push_to_hub="alice/lora")
    assert hub.asked == [] and set(folder_bytes(tmp_path / "a")) == {CONFIG, TENSORS, README}


def test_offline_with_half_a_copy(hub, tmp_path, offline):
    peftkit.save(trained(small()), tmp_path / "a", push_to_hub="alice/lora")
    hub.breaks = lambda request, reply: replace(reply, dies_after=0) if "GET /large/" in request else None
    refused("alice/lora")
    offline()
    refused("alice/lora", "HF_HUB_OFFLINE", "no whole copy")


def test_where_the_hub_is_down_the_cache_is_taken(hub, tmp_path):
    model = trained(small())
    peftkit.save(model, tmp_path / "a", push_to_hub="alice/lora")
    peftkit.load(small(), "alice/lora")
    hub.close()
    other = small()
    peftkit.load(other, "alice/lora")
    assert same(adapter_bits(other), adapter_bits(model))


def test_without_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("alice/lora", "no directory here", "pip install 'peftkit[hub]'")
    model = trained(small())
    with pytest.raises(StorageError, match=r"is whole, but was not uploaded: .*pip install 'peftkit\[hub\]'"):
        peftkit.save(model, tmp_path / "a", push_to_hub="alice/lora")
    other = small()
    peftkit.load(other, tmp_path / "a")
    assert same(adapter_bits(other), adapter_bits(model))


# -- with nothing patched ------------------------------------------------------------------------------------------------


def test_as_the_environment_says(hub, tmp_path):
    """In a process of its own, where `HF_ENDPOINT` names the stand-in."""
    code = """
import sys, peftkit
from storage_helpers import adapter_bits, same, small, trained
assert "huggingface_hub" not in sys.modules
model = trained(small())
peftkit.save(model, "out", push_to_hub="alice/lora")
other = small()
peftkit.load(other, "alice/lora")
assert same(adapter_bits(other), adapter_bits(model))
try:
    peftkit.load(small(), "alice/nothing")
except peftkit.StorageError as error:
    assert "404" in str(error) and error.__cause__ is None and error.__suppress_context__
else:
    raise AssertionError
"""
    root = Path(__file__).parents[1]
    env = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "alice/lora" in hub.repos
