"""peft's and vLLM's view of directories: converting peft's to ours, what is not known of peft, what vLLM would not serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from storage_helpers import config_of, llama, peft_model, rewrite, same, set_config, tensors_of, trained
from storage_models import call, close
from torch import nn

import peftkit
from peftkit import (
    DoRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoRAConfig,
    ParallelAdapterConfig,
    StorageError,
    VeRAConfig,
)
from peftkit.formats import vllm
from peftkit.method import registered

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "down_proj"]
METHODS = {
    "lora": LoRAConfig(r={"q_proj": 2, "**": 3}, alpha=5, rank_stabilized=True, targets=TARGETS),
    "lora-embedding": LoRAConfig(r=2, targets=["embed_tokens", "v_proj"], also_train=["lm_head"]),
    "lora-rows": LoRAConfig(r=2, targets=TARGETS, also_train={"embed_tokens": [3, 7]}),
    "dora": DoRAConfig(r=2, targets=TARGETS),
    "ia3": IA3Config(targets=["k_proj", "v_proj", "down_proj"]),
    "vera": VeRAConfig(r=4, targets=TARGETS),
    "loha": LoHaConfig(r=2, alpha=3, targets=TARGETS),
    "lokr": LoKrConfig(r=1, targets=TARGETS),
}


@pytest.mark.parametrize("name", METHODS)
def test_peft_to_ours_and_back(name, tmp_path):
    """What we save, as peft writes it after reading, converted: the same tensors, loaded strictly, and read by peft."""
    model = trained(llama(), METHODS[name])
    peftkit.save(model, tmp_path / "a")
    theirs = peft_model(llama(), tmp_path / "a")
    theirs.save_pretrained(tmp_path / "theirs")
    llama().save_pretrained(tmp_path / "base")
    peftkit.convert(tmp_path / "theirs", tmp_path / "ours", base=tmp_path / "base")
    peftkit.convert(tmp_path / "theirs", tmp_path / "from-module", base=llama())
    first, second = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "ours")
    assert same(first, second)
    other = llama()
    peftkit.load(other, tmp_path / "ours")
    assert close(call(other), call(model), 4)
    assert close(call(peft_model(llama(), tmp_path / "ours")), call(model), 4)
    assert same(tensors_of(tmp_path / "from-module"), second)
    with pytest.raises(StorageError, match="was saved from another base"):  # it has the base's fingerprint
        peftkit.load(llama(seed=1), tmp_path / "ours")


def test_the_base_is_checked(tmp_path):
    peftkit.save(trained(llama(), METHODS["lora"]), tmp_path / "a")
    llama(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(StorageError, match="was saved from another base"):
        peftkit.convert(tmp_path / "a", tmp_path / "b", base=tmp_path / "base")
    assert not (tmp_path / "b").exists()
    peftkit.convert(tmp_path / "a", tmp_path / "b", base=tmp_path / "base", check_base=False)
    peftkit.load(llama(seed=1), tmp_path / "b")


def test_converting_leaves_the_model_alone(tmp_path):
    model = trained(llama(), METHODS["dora"])
    peftkit.save(model, tmp_path / "a")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    peftkit.convert(tmp_path / "a", tmp_path / "b", base=model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert peftkit.active(model) == ("default",) and list(peftkit.adapters(model)) == ["default"]


@pytest.mark.parametrize("kind", [t.value for t in peft.PeftType])
def test_every_method_of_peft_is_read_or_named(kind, tmp_path):
    known = {c.peft_type for c in registered().values()}
    if kind in known:
        assert kind in {"LORA", "IA3", "VERA", "LOHA", "LOKR", "PREFIX_TUNING", "PROMPT_TUNING"}
        return
    peftkit.save(trained(llama(), METHODS["loha"]), tmp_path / "a")
    rewrite(tmp_path / "a", tensors_of(tmp_path / "a"))
    set_config(tmp_path / "a", peft_type=kind)
    for read in (lambda: peftkit.load(llama(), tmp_path / "a"), lambda: convert(tmp_path)):
        with pytest.raises(
            StorageError, match=f"peft_type '{kind}' belongs to no method; known are .*IA3, .*LORA"
        ) as caught:
            read()
        assert all(k in str(caught.value) for k in known)


def convert(folder: Path) -> None:
    peftkit.convert(folder / "a", folder / "b", base=llama())


# -- vLLM ----------------------------------------------------------------------------------------------------


def problems(tmp_path: Path, config: Any, **kwargs: Any) -> list[str]:
    peftkit.save(trained(llama(), config), tmp_path / "a")
    return vllm.problems(tmp_path / "a", **kwargs)


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(r=2, alpha=5, targets="all-linear"),
        LoRAConfig(r=16, rank_stabilized=True, targets=["gate_proj"]),
        LoRAConfig(r={"q_proj": 2, "**": 3}, alpha={"q_proj": 4, "**": 6}, targets=TARGETS),  # of one scale
        LoRAConfig(r=2, init="pissa", targets=TARGETS),
    ],
)  # fmt: skip
def test_vllm_serves_plain_lora(config, tmp_path):
    assert problems(tmp_path, config) == []
    assert (
        problems(
            tmp_path, config, modules={"q_proj", "down_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
        )
        == []
    )


WRONG: list[tuple[Any, dict[str, Any], list[str]]] = [
    (DoRAConfig(r=2, targets=["q_proj"]), {}, ["use_dora is true", "lora_magnitude_vector is a key that vLLM does not"]),
    (LoRAConfig(r=2, targets=["q_proj"], also_train=["lm_head"]), {}, ["modules_to_save is", "lm_head.weight is a key"]),
    (LoRAConfig(r=2, targets=["q_proj"], also_train={"embed_tokens": [3]}), {}, ["trainable_token", "tokens_delta is a"]),
    (LoRAConfig(r=2, targets=["embed_tokens"]), {}, ["lora_embedding_A adapts an embedding", "lora_embedding_B adapts"]),
    (LoRAConfig(r=9, targets=["gate_proj"]), {"max_rank": 8}, ["r is 9, above max_lora_rank=8"]),
    (LoRAConfig(r={"layers.0.**": 4, "**": 3}, targets=["gate_proj", "1.mlp.up_proj"]), {"max_rank": 3},
     ["layers.0.mlp.gate_proj.lora_A.weight has rank 4, above max_lora_rank=3"]),
    (LoRAConfig(r=2, targets=["q_proj"]), {"modules": {"qkv_proj"}}, ["is for 'q_proj', which is none of the modules"]),
    (LoRAConfig(r=2, alpha={"layers.0.**": 3, "**": 4}, targets=["q_proj"]), {}, ["is to be scaled by"]),
    (LoHaConfig(r=2, targets=["q_proj"]), {}, ["peft_type is 'LOHA'; vLLM serves LORA alone"]),
    (ParallelAdapterConfig(bottleneck=4), {}, ["peft_type is 'PARALLEL_ADAPTER'"]),
]  # fmt: skip


@pytest.mark.parametrize(("config", "kwargs", "words"), WRONG)
def test_what_vllm_would_not_serve_is_named(config, kwargs, words, tmp_path):
    found = "\n".join(problems(tmp_path, config, **kwargs))
    for word in words:
        assert word in found, found


def test_settings_that_vllm_misses(tmp_path):
    peftkit.save(trained(llama(), LoRAConfig(r=2, targets=["q_proj"])), tmp_path / "a")
    stored = config_of(tmp_path / "a")
    for key in ("r", "lora_alpha", "target_modules"):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({k: v for k, v in stored.items() if k != key}))
        assert f"{key} is missing from adapter_config.json" in vllm.problems(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**stored, "bias": "all"}))
    assert vllm.problems(tmp_path / "a") == ["the adapter has biases, which vLLM does not add"]
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    assert vllm.problems(tmp_path / "a") == ["adapter_model.safetensors is missing"]
    with pytest.raises(StorageError, match="is missing"):
        vllm.problems(tmp_path / "none")


def test_what_peft_writes_beside_resized_embeddings(tmp_path):
    """Base weights beside an adapted embedding: vLLM skips them."""
    model: nn.Module = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert any("base_layer" in key for key in tensors_of(tmp_path / "a"))
    assert vllm.problems(tmp_path / "a", modules={"q_proj", "embed_tokens"}) == []
