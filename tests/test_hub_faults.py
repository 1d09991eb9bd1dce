"""What can be wrong on the Hub, or on the way from it: one error, and the model as it was."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_standin import Reply, refusing
from storage_helpers import CONFIG, adapter_bits, refused, same, small, trained

import peftkit


def test_no_such_repository(hub):
    refused("alice/nothing", "'alice/nothing' is no directory here", "on the Hub", "404")


def test_a_private_one_without_a_login(hub, logged_out):
    hub.make("bob/secret", {}, private=True)
    refused("bob/secret", "401", "hf auth login")


def test_a_gated_one(hub, logged_out):
    hub.make("bob/gated", {CONFIG: b"{}"}, gated=True)
    refused("bob/gated", "gated (401)", f"{hub.url}/bob/gated", "hf auth login")


def test_a_repository_that_is_forbidden(hub):
    hub.make("bob/it", {CONFIG: b"{}"})
    hub.stops = lambda request: refusing(403, message="Your address is blocked")
    refused("bob/it", "403", "Your address is blocked", "hf auth login")


def test_no_adapter_in_it(hub, tmp_path):
    hub.make("bob/model", {"config.json": b"{}", "weights.gguf": b""})
    refused("bob/model", "holds no adapter_config.json", "2 files", "'config.json'")
    hub.make("bob/old", {CONFIG: b'{"peft_type": "LORA"}', "adapter_model.bin": b"pickle"})
    refused("bob/old", "holds no adapter_model.safetensors", "adapter_model.bin is a pickle", "convert it")
    assert not [r for r in hub.asked if "resolve" in r and ".bin" in r]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_down(hub, status):
    hub.make("alice/lora", {})
    hub.stops = lambda request: refusing(status, message="come back later")
    refused("alice/lora", str(status), "come back later")


def test_a_hub_that_is_not_there(hub):
    hub.close()
    refused("alice/lora", "cannot be reached", "ConnectError")


def test_something_else_answers(hub):
    hub.make("alice/lora", {})
    hub.stops = lambda request: Reply(200, b"<html>Welcome to our hotel</html>", {"Content-Type": "text/html"})
    refused("alice/lora", "on the Hub")


class Broken:
    """The tensors arrive in a way of their own; `times` counts how often they were asked for."""

    def __init__(self, change: Any) -> None:
        self.change, self.times = change, 0

    def __call__(self, request: str, reply: Reply) -> Reply | None:
        if not request.startswith("GET /large/"):
            return None
        self.times += 1
        return self.change(reply)


def dies(reply: Reply) -> Reply:
    return replace(reply, dies_after=0)


def shorter(reply: Reply) -> Reply:
    return replace(reply, body=reply.body[:-9])


def longer(reply: Reply) -> Reply:
    return replace(reply, body=reply.body + b"more")


def other_bits(reply: Reply) -> Reply:
    return replace(reply, body=reply.body[:-1] + bytes([reply.body[-1] ^ 1]))


@pytest.mark.parametrize("change", [dies, shorter, longer])
def test_a_download_that_breaks_off_can_be_repeated(hub, tmp_path, change):
    model = trained(small())
    peftkit.save(model, tmp_path / "a", push_to_hub="alice/lora")
    hub.breaks = broken = Broken(change)
    refused("alice/lora", "'alice/lora' on the Hub")
    assert broken.times
    hub.mend()
    other = small()
    peftkit.load(other, "alice/lora")
    assert same(adapter_bits(other), adapter_bits(model))


def test_a_download_that_breaks_off_and_goes_on(hub, tmp_path):
    model = trained(small())
    peftkit.save(model, tmp_path / "a", push_to_hub="alice/lora")
    hub.breaks = broken = Broken(lambda reply: replace(reply, dies_after=300) if broken.times == 1 else None)
    other = small()
    peftkit.load(other, "alice/lora")
    assert broken.times == 2 and same(adapter_bits(other), adapter_bits(model))


def test_bits_that_flip_on_the_way_are_noticed(hub, tmp_path):
    model = trained(small())
    peftkit.save(model, tmp_path / "a", push_to_hub="alice/lora")
    hub.breaks = Broken(other_bits)
    said = refused("alice/lora", "is damaged", "copy of 'alice/lora' on the Hub", "delete")
    hub.mend()
    found = re.search(r"delete (\S+) and load again", said)
    assert found is not None and Path(found[1]).parent == tmp_path / "cache"
    shutil.rmtree(found[1])  # what it says to do helps
    other = small()
    peftkit.load(other, "alice/lora")
    assert same(adapter_bits(other), adapter_bits(model))


def test_another_etag_is_another_name_in_the_cache_alone(hub, tmp_path):
    model = trained(small())
    peftkit.save(model, tmp_path / "a", push_to_hub="alice/lora")
    hub.breaks = lambda request, reply: (
        Reply(reply.status, reply.body, {**reply.headers, "X-Linked-ETag": '"0123"'})
        if "safetensors" in request
        else None
    )
    other = small()
    peftkit.load(other, "alice/lora")
    assert same(adapter_bits(other), adapter_bits(model))
