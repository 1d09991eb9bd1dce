"""Every test starts from the same seed, one thread and a fresh compiler, and never reaches a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet_torch():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()
