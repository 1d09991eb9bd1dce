"""A loaded adapter owns its memory: neither the file, nor the buffer it was read into, nor another model shares it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from storage_helpers import TENSORS, adapter_bits, folder_bytes, same, small, tensors_of, trained

import peftkit
from peftkit import LoRAConfig


@pytest.fixture
def target(tmp_path) -> Path:
    peftkit.save(trained(small()), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_saved_adapter_and_a_loaded_one_stand_alone(target):
    """Neither the file nor another model feels what happens to one model, nor a model what happens to the file."""
    model = trained(small())
    peftkit.save(model, target)
    before = folder_bytes(target)
    other, third = small(), small()
    peftkit.load(other, target)
    peftkit.load(third, target, trainable=True)
    with torch.no_grad():
        for p in [*peftkit.parameters(model), *peftkit.parameters(third)]:
            p.zero_()
    assert folder_bytes(target) == before
    kept = adapter_bits(other)
    with (target / TENSORS).open("r+b") as file:
        file.write(b"\xff" * file.seek(0, 2))
        file.truncate(10)
    assert same(adapter_bits(other), kept)
    shutil.rmtree(target)
    assert same(adapter_bits(other), kept)


def test_parameters_own_their_memory(target):
    """Nothing keeps the whole file alive, and no two parameters lie in one storage."""
    model = small()
    peftkit.load(model, target)
    storages = [p.untyped_storage() for n, p in model.named_parameters() if "peftkit" in n]
    assert len({s.data_ptr() for s in storages}) == len(storages) == 4
    assert sum(s.nbytes() for s in storages) == sum(t.nbytes for t in tensors_of(target).values())


def test_from_the_base_too(tmp_path):
    peftkit.save(trained(small(), LoRAConfig(r=2, init="pissa", targets="all-linear")), tmp_path / "a")
    model = small()
    peftkit.load(model, tmp_path / "a")
    own = [p.untyped_storage() for n, p in model.named_parameters() if "peftkit" in n]
    assert len({s.data_ptr() for s in own}) == len(own) == 8
    assert sum(s.nbytes() for s in own) == sum(t.nbytes for t in tensors_of(tmp_path / "a").values())
