"""Kernels in Triton run where there is a GPU, or interpreted: `TRITON_INTERPRET=1 pytest tests/gpu`."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import INTERPRETED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU, and TRITON_INTERPRET=1 is not set"))
        elif INTERPRETED and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
