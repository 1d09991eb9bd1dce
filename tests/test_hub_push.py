"""Pushing to the Hub: whatever happens, the directory is saved whole, and what others wrote there stays."""

from __future__ import annotations

import pytest
from hub_standin import Reply, refusing
from storage_helpers import README, TENSORS, adapter_bits, folder_bytes, same, small, trained

import peftkit
from peftkit import LoRAConfig, StorageError

STEPS = (
    "/api/repos/create",
    "HEAD /alice/lora/resolve/main/README.md",
    "/preupload/",
    "/batch",
    "PUT /large",
    "/commit/",
)


@pytest.mark.parametrize("at", STEPS)
@pytest.mark.parametrize(
    "answer", [refusing(400, message="no"), Reply(200, b"cut off", dies_after=0)], ids=["no", "cut"]
)
def test_an_upload_that_fails_loses_nothing(hub, tmp_path, at, answer):
    first, second = trained(small(), seed=1), trained(small(), seed=2)
    peftkit.save(first, tmp_path / "a", push_to_hub="alice/lora")
    peftkit.save(second, tmp_path / "expected")
    before = dict(hub.repos["alice/lora"].files)
    stopped: list[str] = []

    def stops(request: str) -> Reply | None:
        if at not in request:
            return None
        stopped.append(request)
        return answer

    hub.stops = stops
    with pytest.raises(StorageError) as caught:
        peftkit.save(second, tmp_path / "a", push_to_hub="alice/lora")
    said = str(caught.value)
    assert stopped and f"{tmp_path / 'a'} is whole, but was not uploaded" in said and "\n" not in said
    assert caught.value.__suppress_context__  # no chain of the network's errors is printed
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "expected")
    assert hub.repos["alice/lora"].files == before
    hub.mend()
    again = said.partition("To upload it later: ")[2]
    assert eval(again, {"peftkit": peftkit}).endswith(hub.repos["alice/lora"].commits[-1][0])
    other = small()
    peftkit.load(other, "alice/lora")
    assert same(adapter_bits(other), adapter_bits(second))


def test_an_upload_to_where_one_may_not(hub, tmp_path):
    with pytest.raises(StorageError, match=r"bob/lora.*403.*don't have the rights.*hf auth login"):
        peftkit.save(trained(small()), tmp_path / "a", push_to_hub="bob/lora")
    assert hub.repos == {}


def test_an_upload_without_a_login(hub, tmp_path, logged_out):
    with pytest.raises(StorageError, match=r"401.*hf auth login"):
        peftkit.save(trained(small()), tmp_path / "a", push_to_hub="alice/lora")
    assert hub.repos == {}


@pytest.mark.parametrize("name", ["lora", "./lora", "a/b/c", "alice/lo ra", "alice/"])
def test_an_upload_to_no_name(hub, tmp_path, name):
    with pytest.raises(StorageError, match=r"is whole, but was not uploaded: .*name on the Hub"):
        peftkit.save(trained(small()), tmp_path / "a", push_to_hub=name)
    assert hub.asked == [] and (tmp_path / "a" / TENSORS).exists()


def test_what_is_private_stays_so(hub, tmp_path):
    model = trained(small())
    peftkit.save(model, tmp_path / "a", push_to_hub="alice/secret", private=True)
    assert hub.repos["alice/secret"].private
    peftkit.save(trained(small(), seed=2), tmp_path / "a", push_to_hub="alice/secret")
    peftkit.save(model, tmp_path / "a", push_to_hub="alice/open")
    with pytest.raises(StorageError, match=r"there already, and public.*private=True.*upload\(.*, private=True\)"):
        peftkit.save(trained(small(), seed=3), tmp_path / "a", push_to_hub="alice/open", private=True)
    assert len(hub.repos["alice/open"].commits) == 2


def test_only_an_adapter_is_uploaded(hub, tmp_path):
    with pytest.raises(StorageError, match=r"adapter_config\.json is missing"):
        peftkit.hub.upload(tmp_path, "alice/lora")
    assert hub.asked == []


def test_an_edited_card_on_the_hub_stays(hub, tmp_path):
    peftkit.save(trained(small()), tmp_path / "a", push_to_hub="alice/lora")
    repo = hub.repos["alice/lora"]
    card = repo.files[README]
    peftkit.save(trained(small(), LoRAConfig(r=1, targets="all-linear")), tmp_path / "a", push_to_hub="alice/lora")
    assert repo.files[README] != card and b"`r=1`" in repo.files[README]  # nobody had edited it
    repo.commit({README: card + b"\nTrained on a Sunday.\n"})
    peftkit.save(trained(small()), tmp_path / "a", push_to_hub="alice/lora")
    assert repo.files[README] == card + b"\nTrained on a Sunday.\n"
    assert repo.files[TENSORS] == (tmp_path / "a" / TENSORS).read_bytes()
