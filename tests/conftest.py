"""Every test starts from the same seed, one thread and a fresh compiler, and never reaches a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet_torch():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A small adapter as peftkit writes it; not to be changed."""
    from storage_helpers import small, trained

    import peftkit

    folder = tmp_path_factory.mktemp("adapter") / "saved"
    peftkit.save(trained(small()), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.fixture
def foreign(folder) -> Path:
    """The same, as another program writes it: without our checksum."""
    from storage_helpers import rewrite, tensors_of

    rewrite(folder, tensors_of(folder))
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the Hub that huggingface_hub finds, with a login and an empty cache; no other machine is asked."""
    pytest.importorskip("huggingface_hub")
    import socket

    from hub_standin import TOKEN, Hub
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http, disable_progress_bars

    real = socket.getaddrinfo

    def local(host: Any, *args: Any, **kwargs: Any) -> Any:
        assert host in ("127.0.0.1", "localhost"), f"a test asked for {host}"
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", local)
    at_once = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(file_download, "time", at_once)  # between two attempts
    monkeypatch.setattr(_http, "time", at_once)
    found = Hub()
    for name, value in {  # read from the environment when it is imported
        "ENDPOINT": found.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": found.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    disable_progress_bars()
    yield found
    found.close()


@pytest.fixture
def offline(hub, monkeypatch):
    """Called, it cuts huggingface_hub off, as `HF_HUB_OFFLINE=1` does."""
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def logged_out(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
