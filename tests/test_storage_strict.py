"""Law 9: tensors, files and bases that do not fit are an error that names them; the model is as before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from storage_helpers import (
    CONFIG,
    TENSORS,
    adapter_bits,
    llama,
    refused,
    rewrite,
    same,
    set_config,
    small,
    snapshot,
    tensors_of,
    trained,
    unchanged,
)  # fmt: skip
from torch import nn

import peftkit
from peftkit import LoRAConfig, StorageError

A0 = "base_model.model.0.lora_A.weight"
B0 = "base_model.model.0.lora_B.weight"


def test_whole_it_loads(folder):
    model = small()
    peftkit.load(model, folder)
    assert same(adapter_bits(model), adapter_bits(trained(small())))


def test_foreign_it_loads(foreign):
    model = small()
    peftkit.load(model, foreign)
    assert same(adapter_bits(model), adapter_bits(trained(small())))


# -- tensors -------------------------------------------------------------------------------------------------


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = tensors_of(folder)
    edit(tensors)
    rewrite(folder, tensors)


@pytest.mark.parametrize("key", [A0, B0])
def test_missing_tensor(foreign, key):
    change(foreign, lambda t: t.pop(key))
    refused(foreign, TENSORS, f"missing {key}")


def test_missing_pair(foreign):
    change(foreign, lambda t: [t.pop(A0), t.pop(B0)])
    refused(foreign, TENSORS, "no tensors for '0'", CONFIG)


@pytest.mark.parametrize("key", ["base_model.model.3.lora_A.weight", "base_model.model.1.lora_A.weight"])
def test_unexpected_module(foreign, key):
    change(foreign, lambda t: t.update({key: torch.ones(2, 6)}))
    refused(foreign, f"unexpected {key}")


@pytest.mark.parametrize(
    "key",
    ["base_model.model.0.bias", "base_model.model.0.lora_C.weight", "base_model.model.0.lora_magnitude_vector",
     "0.lora_A.weight", "base_model.model.classifier.weight", "base_model.model.0.lora_A"],
)  # fmt: skip
def test_unexpected_tensor(foreign, key):
    change(foreign, lambda t: t.update({key: torch.ones(2, 6)}))
    refused(foreign, f"unexpected {key}", TENSORS)


@pytest.mark.parametrize("shape", [(2, 7), (2,), (2, 6, 1), (6, 2), (2, 0)])
def test_misshapen_tensor(foreign, shape):
    change(foreign, lambda t: t.update({A0: torch.ones(shape)}))
    refused(foreign, "lora_A.weight", str(shape))


@pytest.mark.parametrize("shape", [(8, 3), (8,), (7, 2), ()])
def test_misshapen_second_tensor(foreign, shape):
    change(foreign, lambda t: t.update({B0: torch.ones(shape)}))
    refused(foreign, B0, str(shape), "(8, 2)", TENSORS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite(foreign, value, dtype):
    def edit(tensors):
        tensors[B0] = tensors[B0].to(dtype)
        tensors[B0][3, 1] = value

    change(foreign, edit)
    refused(foreign, TENSORS, f"{B0} has values that are not finite")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64]
)
def test_dtypes_that_are_no_weights(foreign, dtype):
    change(foreign, lambda t: t.update({A0: t[A0].to(dtype)}))
    refused(foreign, TENSORS, f"{A0} is {dtype}")


def test_no_tensors_at_all(foreign):
    rewrite(foreign, {})
    refused(foreign, "holds no tensors", TENSORS)


@pytest.mark.parametrize("edit", ["missing", "nan", "swapped"])
def test_another_program_that_keeps_our_metadata(folder, edit):
    from safetensors import safe_open

    with safe_open(folder / TENSORS, framework="pt") as file:
        metadata = file.metadata()
    tensors = tensors_of(folder)
    if edit == "missing":
        del tensors[A0]
    elif edit == "nan":
        tensors[A0][0, 0] = float("nan")
    else:
        tensors["base_model.model.0.lora_A.weight"] = tensors[A0].flip(0)
    save_file(tensors, folder / TENSORS, metadata)
    words = ["checksum", TENSORS] + ([f"{A0} has values that are not finite"] if edit == "nan" else [])
    refused(folder, *words)


def test_whole_modules_and_rows(tmp_path):
    class Net(nn.Module):
        def __init__(self, rows: int = 9):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.mid, self.head = nn.Embedding(rows, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    config = LoRAConfig(r=1, targets="mid", also_train={"head": None, "table": [2, 5]})
    peftkit.save(trained(Net(), config), tmp_path)
    prefix = "base_model.model."
    tensors = tensors_of(tmp_path)
    rewrite(tmp_path, {**tensors, f"{prefix}head.weight": tensors[f"{prefix}head.weight"].to(torch.int8)})
    refused(tmp_path, f"{prefix}head.weight is torch.int8, expected torch.float32", model=Net())
    rewrite(tmp_path, {k: v for k, v in tensors.items() if k != f"{prefix}head.bias"})
    refused(tmp_path, f"missing {prefix}head.bias", model=Net())
    rewrite(tmp_path, {**tensors, f"{prefix}head.extra": torch.ones(1)})
    refused(tmp_path, f"unexpected {prefix}head.extra", model=Net())
    delta = f"{prefix}table.token_adapter.trainable_tokens_delta"
    rewrite(tmp_path, {**tensors, delta: torch.ones(3, 4)})
    refused(tmp_path, f"{delta} has shape (3, 4), expected (2, 4)", model=Net())
    rewrite(tmp_path, tensors)
    refused(tmp_path, "token 5 lies beyond the 4 rows of 'table'", model=Net(rows=4))
    set_config(tmp_path, trainable_token_indices={"table": [2, -5]})
    refused(tmp_path, "trainable_token_indices", CONFIG, model=Net())
    set_config(tmp_path, trainable_token_indices={"tabel": [2, 5]})
    refused(tmp_path, "no module 'tabel'", "'table'", model=Net())


# -- files ---------------------------------------------------------------------------------------------------


def test_pickles_are_not_read(folder):
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nabort\n(tR.")  # a process that unpickles this is gone
    refused(folder, TENSORS, "adapter_model.bin is a pickle", "safetensors")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_file_that_is_not_there(folder, name):
    (folder / name).unlink()
    refused(folder, name, "missing")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_file_that_is_a_directory(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, name, "cannot be read")


def test_no_directory(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no directory")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "file")


def test_config_of_one_save_and_tensors_of_another(folder, tmp_path):
    peftkit.save(trained(small(), LoRAConfig(r=2, alpha=9, targets="all-linear")), tmp_path / "other")
    shutil.copy(tmp_path / "other" / CONFIG, folder / CONFIG)
    refused(folder, CONFIG, "lora_alpha is 9, but was 6")


# -- the base ------------------------------------------------------------------------------------------------


def test_another_base_of_the_same_shapes(folder):
    message = refused(folder, "another base", "'0'", "check_base=False", model=small(seed=3))
    assert "and 1 more" in message
    one = small()
    with torch.no_grad():
        one[2].weight.copy_(small(seed=3)[2].weight)
    assert "more" not in refused(folder, "another base", "'2'", model=one)


def test_more_and_fewer_layers(tmp_path):
    config = LoRAConfig(r=1, targets="q_proj")
    peftkit.save(trained(llama(layers=2), config), tmp_path / "two")
    peftkit.save(trained(llama(layers=1), config), tmp_path / "one")
    wide = llama(layers=2)
    with torch.no_grad():  # the first layer alone is no reason to take it
        for own, other in zip(
            wide.model.layers[0].parameters(), llama(layers=1).model.layers[0].parameters(), strict=True
        ):
            own.copy_(other)
    for strict in (True, False):
        refused(
            tmp_path / "two",
            "unexpected",
            "layers.1.self_attn.q_proj.lora_A.weight",
            model=llama(layers=1),
            check_base=strict,
        )
        refused(tmp_path / "one", "no tensors for 'model.layers.1.self_attn.q_proj'", model=wide, check_base=strict)
    for name, base in (("two", llama(layers=1)), ("one", wide)):
        rewrite(tmp_path / name, tensors_of(tmp_path / name))
        refused(tmp_path / name, "layers.1.self_attn.q_proj", model=base)


def test_a_base_of_other_sizes(tmp_path):
    peftkit.save(trained(llama(), LoRAConfig(r=2, targets="q_proj")), tmp_path)
    refused(tmp_path, "layers.0.self_attn.q_proj", model=llama(hidden=32))
    refused(tmp_path, "shape (2, 16), expected (2, 32)", model=llama(hidden=32), check_base=False)


def test_a_module_that_cannot_be_adapted(tmp_path, folder):
    refused(folder, "unexpected", "no module", model=nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Linear(8, 6)))
    wrapped = small()
    torch.nn.utils.parametrizations.weight_norm(wrapped[0])
    before = [n for n, _ in wrapped.named_parameters()]
    with pytest.raises(StorageError):
        peftkit.load(wrapped, folder)
    assert before == [n for n, _ in wrapped.named_parameters()] and not peftkit.adapters(wrapped)


# -- names ---------------------------------------------------------------------------------------------------


def test_a_name_that_is_taken(folder):
    model = small()
    peftkit.load(model, folder)
    before = snapshot(model)
    with pytest.raises(ValueError, match="attached already"):
        peftkit.load(model, folder)
    with pytest.raises(ValueError, match="attached already"):
        peftkit.load(model, folder, name="default")
    assert unchanged(before, model)
    peftkit.load(model, folder, name="second")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a b", "a.b", "-x", "a:b", "a\n", "ä", "/etc", None, 5])
def test_names_that_would_leave_the_directory(folder, name):
    model = small()
    before = snapshot(model)
    with pytest.raises(ValueError, match="an adapter's name"):
        peftkit.load(model, folder, name=name)
    assert unchanged(before, model)


def test_a_failed_attach_leaves_the_model(folder, monkeypatch):
    """Whatever comes up after everything was read."""
    from peftkit.ledger import Ledger

    model = small()
    before = snapshot(model)

    def fail(*args: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(Ledger, "_graft_readers", fail)
    with pytest.raises(RuntimeError, match="boom"):
        peftkit.load(model, folder)
    assert unchanged(before, model)
