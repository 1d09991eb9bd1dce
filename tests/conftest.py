"""Every test starts from the same seed, one thread and a fresh compiler, and never reaches a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil
from pathlib import Path

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
