"""Law 8: saved and loaded is bit-equal — in another process, on another device, over a base of another dtype."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from storage_helpers import (
    CONFIG,
    adapter_bits,
    bits,
    config_of,
    folder_bytes,
    llama,
    moved,
    same,
    small,
    tabled,
    tensors_of,
    trained,
)  # fmt: skip
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig, StorageError

ROOT = Path(__file__).parents[1]
X = torch.linspace(-1, 1, 18).reshape(3, 6)
CONFIGS = {
    "plain": LoRAConfig(r=2, alpha=6, targets="all-linear"),
    "gaussian": LoRAConfig(r=3, init="gaussian", rank_stabilized=True, dropout=0.25, targets="all-linear"),
    "pissa": LoRAConfig(r=2, alpha=3, init="pissa", targets="all-linear"),
    "olora": LoRAConfig(r=2, init="olora", rank_stabilized=True, targets="all-linear"),
    "ranks": LoRAConfig(r={"0": 1, "2": 3}, alpha={"*": 4, "^2": 5.5}, targets="all-linear"),
    "rows": LoRAConfig(r=2, rows={"0": [(1, 3), (5, 8)]}, targets="all-linear"),
    "rows-pissa": LoRAConfig(r=1, init="pissa", rows={"2": [(0, 2), (3, 6)]}, targets="all-linear"),
    "bf16": LoRAConfig(r=2, dtype=torch.bfloat16, targets="all-linear"),
    "fp64": LoRAConfig(r=2, dtype=torch.float64, targets="all-linear"),
    "whole": LoRAConfig(r=2, targets="^0", also_train=["2"]),
    "regex": LoRAConfig(r={re.compile("[0-9]"): 2}, targets=re.compile("0|2", re.IGNORECASE)),
    "predicate": LoRAConfig(
        r=2, targets=lambda name, module: isinstance(module, nn.Linear), exclude=lambda name, module: name == "2"
    ),
}  # fmt: skip


def out(model: nn.Module, x: Tensor = X) -> Tensor:
    """Without gradients, so that what is trainable takes the same path as what is not."""
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_bits_come_back(name, tmp_path):
    model = trained(small(), CONFIGS[name])
    peftkit.save(model, tmp_path / "a")
    other = small()
    peftkit.load(other, tmp_path / "a", trainable=True)
    assert same(adapter_bits(other), adapter_bits(model))
    assert torch.equal(out(other), out(model))
    if name != "predicate":
        assert peftkit.adapters(other)["default"] == CONFIGS[name] or "rows" in name  # whose lists become tuples
    # and once more, to the byte
    peftkit.save(other, tmp_path / "b")
    assert tensors_of(tmp_path / "a").keys() == tensors_of(tmp_path / "b").keys()
    if name != "predicate":
        assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_in_another_process(tmp_path):
    model = trained(tabled(), LoRAConfig(r=2, targets="1", also_train={"0": [3, 5], "3": None}))
    peftkit.save(model, tmp_path / "a")
    ids = torch.arange(8)[None]
    torch.save({"bits": adapter_bits(model), "out": out(model, ids)}, tmp_path / "seen.pt")
    code = textwrap.dedent(
        f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import torch
        torch.set_num_threads(1)
        import peftkit
        from storage_helpers import adapter_bits, same, tabled
        model = tabled()
        peftkit.load(model, {str(tmp_path / "a")!r})
        seen = torch.load({str(tmp_path / "seen.pt")!r})
        with torch.no_grad():
            assert torch.equal(model(torch.arange(8)[None]), seen["out"])
        assert same(adapter_bits(model), seen["bits"])
        peftkit.save(model, {str(tmp_path / "b")!r})
        """
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"}, cwd=tmp_path)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


# -- other bases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "pissa", "whole", "bf16"])
def test_a_base_of_another_dtype(before, after, name, tmp_path):
    model = trained(small().to(before), CONFIGS[name])
    peftkit.save(model, tmp_path / "a")
    other = small().to(after)
    peftkit.load(other, tmp_path / "a")
    assert same(adapter_bits(other), adapter_bits(model))
    y = other(X.to(after))
    assert y.dtype == after and torch.isfinite(y).all()
    assert torch.allclose(y.double(), model(X.to(before)).double(), rtol=0.1, atol=0.1)
    peftkit.save(other, tmp_path / "b")
    first, second = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert same(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_base_in_another_dtype_is_refused(dtype, tmp_path):
    peftkit.save(trained(small()), tmp_path)
    with pytest.raises(StorageError, match="another base"):
        peftkit.load(small(seed=3).to(dtype), tmp_path)
    peftkit.load(small(seed=3).to(dtype), tmp_path, check_base=False)


def test_a_base_that_was_trained_a_little(tmp_path):
    """Every weight is sampled, so a step of an optimizer on any of them is seen, if not in every number."""
    peftkit.save(trained(small()), tmp_path)
    base = small()
    with torch.no_grad():
        base[2].weight.mul_(1.001)
    with pytest.raises(StorageError, match="the weight of '2' differs"):
        peftkit.load(base, tmp_path)
    with torch.no_grad():
        base = small()
        base[2].bias.add_(1.0)  # a bias is not an adapted weight
    peftkit.load(base, tmp_path)


def test_the_order_of_the_strides_does_not_matter(tmp_path):
    peftkit.save(trained(small()), tmp_path)
    base = small()
    base[0].weight = nn.Parameter(base[0].weight.detach().t().contiguous().t())
    assert not base[0].weight.is_contiguous()
    peftkit.load(base, tmp_path)
    swapped = small()
    swapped[0].weight = nn.Parameter(swapped[0].weight.detach().flip(1))
    with pytest.raises(StorageError, match="another base"):
        peftkit.load(swapped, tmp_path)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1)])
def test_weights_of_fewer_numbers_than_samples(shape, tmp_path):
    def tiny(value: float) -> nn.Module:
        layer = nn.Linear(shape[1], shape[0])
        with torch.no_grad():
            layer.weight.fill_(value)
        return nn.Sequential(layer)

    peftkit.save(trained(tiny(1.0), LoRAConfig(r=1, targets="all-linear")), tmp_path)
    peftkit.load(tiny(1.0), tmp_path)
    with pytest.raises(StorageError, match="another base"):
        peftkit.load(tiny(2.0), tmp_path)


def test_a_base_with_a_nan_is_still_itself(tmp_path):
    def broken() -> nn.Module:
        base = small()
        with torch.no_grad():
            base[0].weight.fill_(float("nan"))
        return base

    peftkit.save(trained(broken()), tmp_path)
    peftkit.load(broken(), tmp_path)
    with pytest.raises(StorageError, match="another base"):
        peftkit.load(small(), tmp_path)


def test_a_model_with_adapters_is_the_same_base(tmp_path):
    peftkit.save(trained(small()), tmp_path)
    model = trained(small(), LoRAConfig(r=1, targets="all-linear"), name="other")
    peftkit.load(model, tmp_path, name="again")
    assert peftkit.active(model) == ("again",)


# -- merged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "pissa", "whole"])
def test_a_merged_model_saves_the_same_bytes(name, tmp_path):
    model = trained(small(), CONFIGS[name])
    peftkit.save(model, tmp_path / "a")
    peftkit.merge(model)
    peftkit.save(model, tmp_path / "b")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    peftkit.unmerge(model)
    peftkit.load(model, tmp_path / "b", name="second")


# -- other devices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "gaussian", "pissa", "olora", "rows", "whole"])
def test_a_base_whose_weights_come_later(name, tmp_path):
    model = trained(small(), CONFIGS[name])
    peftkit.save(model, tmp_path)
    other = small().to("meta")
    peftkit.load(other, tmp_path)
    assert all(not t.is_meta for n, t in other.state_dict().items() if "peftkit" in n)
    missing = other.load_state_dict(small().state_dict(), strict=False, assign=True)
    assert not missing.unexpected_keys
    assert torch.equal(out(other), out(model))
    assert same(adapter_bits(other), adapter_bits(model))


def test_the_token_rows_of_a_base_whose_weights_come_later(tmp_path):
    config = LoRAConfig(r=2, targets="q_proj", also_train={"embed_tokens": [3, 5]})
    model = trained(llama(), config)
    peftkit.save(model, tmp_path)
    with torch.device("meta"):
        other = llama()
    peftkit.load(other, tmp_path)
    assert torch.equal(bits(tensors_of_model(other)), bits(tensors_of_model(model)))


def tensors_of_model(model: nn.Module) -> Tensor:
    return next(v for k, v in model.state_dict().items() if k.endswith(".rows"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["plain", "pissa", "rows", "whole"])
def test_on_a_gpu_and_back(name, tmp_path):
    model = trained(small().cuda(), CONFIGS[name])
    peftkit.save(model, tmp_path / "a")
    other = small()
    peftkit.load(other, tmp_path / "a")
    assert same(adapter_bits(other), adapter_bits(model))
    third = small().cuda()
    peftkit.load(third, tmp_path / "a")
    assert all(t.is_cuda for t in third.state_dict().values())
    assert torch.equal(out(third, X.cuda()), out(model, X.cuda()))


# -- the rest of the contract --------------------------------------------------------------------------------


def test_what_is_loaded_to_train_on(tmp_path):
    model = trained(small())
    peftkit.save(model, tmp_path)
    frozen, training = small(), small()
    peftkit.load(frozen, tmp_path)
    peftkit.load(training, tmp_path, trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad == ("peftkit" in n) for n, p in training.named_parameters())
    own = peftkit.parameters(training)
    assert all(p.is_leaf and isinstance(p, nn.Parameter) for p in own)
    kept = [p.detach().clone() for p in own]
    optimizer = torch.optim.SGD(own, lr=0.1)
    training(X).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(kept, own, strict=True))
    assert same(adapter_bits(frozen), adapter_bits(model))


def test_the_config_survives_other_writers_of_numbers(tmp_path):
    model = trained(small(), LoRAConfig(r=2, alpha=0.1 + 0.2, dropout=1e-5, targets="all-linear"))
    peftkit.save(model, tmp_path)
    found = config_of(tmp_path)
    assert found["lora_alpha"] == 0.1 + 0.2
    for text in (json.dumps(found), json.dumps(found, indent=4), json.dumps(found).replace("1e-05", "0.00001")):
        (tmp_path / CONFIG).write_text(text)
        other = small()
        peftkit.load(other, tmp_path)
        assert torch.equal(out(other), out(model)) and peftkit.adapters(other)["default"].alpha == 0.1 + 0.2


def test_many_names_one_directory(tmp_path):
    """peft's layout of several: the default in the directory, others in directories of it."""
    model = small()
    for i, name in enumerate(("default", "french", "german")):
        trained(model, LoRAConfig(r=i + 1, targets="all-linear"), name=name, seed=i)
        peftkit.save(model, tmp_path if name == "default" else tmp_path / name, name=name)
    other = small()
    for name in ("french", "default"):
        peftkit.load(other, tmp_path / name if name == "french" else tmp_path, name=name)
    assert peftkit.adapters(other)["french"].r == 2 and peftkit.adapters(other)["default"].r == 1
    with peftkit.using(model, "french"), peftkit.using(other, "french"):
        assert torch.equal(out(other), out(model))


def test_tied_modules_stay_tied(tmp_path):
    config = LoRAConfig(r=1, targets="q_proj", also_train=["embed_tokens", "lm_head"])
    model = llama(tie_word_embeddings=True)
    peftkit.inject(model, config)
    moved(model, peftkit.parameters(model))
    peftkit.save(model, tmp_path)
    other = llama(tie_word_embeddings=True)
    peftkit.load(other, tmp_path, trainable=True)
    assert same(adapter_bits(other), adapter_bits(model))
    assert len(peftkit.parameters(other)) == len(peftkit.parameters(model))
