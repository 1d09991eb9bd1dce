"""peft is the oracle, both ways: it reads the DoRA that `save` writes, and `load` reads what it wrote."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from storage_helpers import (
    config_of,
    llama,
    moved,
    peft_model,
    refused,
    rewrite,
    set_config,
    small,
    tensors_of,
    trained,
)
from storage_models import Attending, bert, call, close, gpt2, t5
from torch import nn

import peftkit
from peftkit import DoRAConfig

peft = pytest.importorskip("peft")


def convolutions() -> nn.Module:
    """Without groups, for which peft's DoRA computes no norm of the weight's shape."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten()).eval()


CASES = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"], {}, {}),
    "llama-bf16": (lambda: llama().bfloat16(), ["q_proj", "up_proj"], {}, {}),
    "bert": (bert, ["query", "dense"], {}, {}),
    "gpt2": (gpt2, ["c_attn", "c_fc"], {"fan_in_fan_out": True}, {}),
    "t5": (t5, ["q", "v", "wo"], {}, {}),
    "conv": (convolutions, ["0", "2"], {}, {}),
    "embedding": (Attending, ["table", "out"], {}, {}),
    "embed_tokens": (llama, ["embed_tokens", "q_proj"], {}, {}),
    "rslora": (llama, ["o_proj"], {"use_rslora": True, "r": 4}, {"rank_stabilized": True, "r": 4}),
    "ranks": (llama, ["q_proj", "v_proj"], {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {"v_proj": 7}},
              {"r": {"*": 2, "v_proj": 1}, "alpha": {"*": 5, "v_proj": 7}}),
    "dropout": (llama, ["q_proj"], {"lora_dropout": 0.1}, {"dropout": 0.1}),
}  # fmt: skip
each = pytest.mark.parametrize("name", CASES)
# peft rounds the norm and the gain to bf16
FACTOR = {"llama-bf16": 2.0}


def made_by_peft(base: nn.Module, folder: Path, **config) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            base, peft.LoraConfig(**{"r": 2, "lora_alpha": 5, "use_dora": True, **config})
        ).eval()
        moved(model, [p for p in model.parameters() if p.requires_grad])
        model.save_pretrained(folder)
    return model


@each
def test_peft_reads_what_save_writes(name, tmp_path):
    make, targets, _, ours = CASES[name]
    model = trained(make(), DoRAConfig(**{"r": 2, "alpha": 5.0, "targets": targets, **ours}))
    assert not torch.equal(call(model), call(make()))
    peftkit.save(model, tmp_path / "a")
    assert config_of(tmp_path / "a")["use_dora"] is True
    assert close(call(peft_model(make(), tmp_path / "a")), call(model), FACTOR.get(name, 1.0))


@each
def test_load_reads_what_peft_wrote(name, tmp_path):
    make, targets, theirs, _ = CASES[name]
    made = made_by_peft(make(), tmp_path / "a", target_modules=targets, **theirs)
    model = make()
    peftkit.load(model, tmp_path / "a")
    assert isinstance(peftkit.adapters(model)["default"], DoRAConfig)
    assert not torch.equal(call(model), call(make()))
    assert close(call(model), call(made), FACTOR.get(name, 1.0))
    peftkit.save(model, tmp_path / "again")
    again = tensors_of(tmp_path / "again")
    for key, value in tensors_of(tmp_path / "a").items():
        if not key.endswith("base_layer.weight"):
            assert torch.equal(again[key], value) and again[key].dtype == value.dtype, key


def test_the_older_name_of_the_magnitude(tmp_path):
    made = made_by_peft(llama(), tmp_path / "a", target_modules=["q_proj"])
    old = {f"{k}.weight" if k.endswith("vector") else k: v for k, v in tensors_of(tmp_path / "a").items()}
    assert any(k.endswith("vector.weight") for k in old)
    rewrite(tmp_path / "a", old)
    model = llama()
    peftkit.load(model, tmp_path / "a")
    assert close(call(model), call(made))


def test_merged_by_both(tmp_path):
    made = made_by_peft(llama(), tmp_path / "a", target_modules=["q_proj", "down_proj"])
    model = llama()
    peftkit.load(model, tmp_path / "a")
    peftkit.merge(model)
    made.merge_adapter()
    assert close(call(model), call(made))
    for k, v in made.get_base_model().named_parameters():
        if "base_layer" in k:
            torch.testing.assert_close(model.get_parameter(k.replace("base_layer.", "")), v)


def test_magnitudes_alone(tmp_path):
    """peft gives such a site a pair whose B is zero, and says that it found no tensors for it."""
    config = DoRAConfig(r=2, targets=["q_proj", "o_proj"], magnitude_only=["o_proj"])
    model = trained(llama(), config)
    peftkit.save(model, tmp_path / "a")
    keys = tensors_of(tmp_path / "a")
    assert sum("o_proj" in k for k in keys) == 2 and sum("q_proj" in k for k in keys) == 6
    other = llama()
    peftkit.load(other, tmp_path / "a")
    assert torch.equal(call(other), call(model))
    rewrite(tmp_path / "a", keys)  # as another program's
    third = llama()
    peftkit.load(third, tmp_path / "a")
    assert torch.equal(call(third), call(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    assert close(call(theirs), call(model))


@pytest.mark.parametrize("own", [True, False])
def test_what_does_not_fit_together_is_refused(own, tmp_path):
    folder = tmp_path / "a"
    peftkit.save(trained(small(), DoRAConfig(r=2, targets="all-linear")), folder)
    found = tensors_of(folder)
    if not own:
        rewrite(folder, found)
    set_config(folder, use_dora=False)
    refused(folder, "use_dora" if own else "lora_magnitude_vector")
    set_config(folder, use_dora=True, init_lora_weights="pissa")
    refused(folder, "pissa" if not own else "init_lora_weights")
    if not own:
        set_config(folder, init_lora_weights=True)
        rewrite(folder, {k: v for k, v in found.items() if k != "base_model.model.0.lora_magnitude_vector"})
        refused(folder, "use_dora", "'0'", "lora_magnitude_vector")
        rewrite(folder, {k: v[:-1] if "magnitude" in k else v for k, v in found.items()})
        refused(folder, "lora_magnitude_vector", "shape")
