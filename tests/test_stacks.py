"""Which modules are a model's blocks, and how deep everything else lies."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from schedule_models import llama
from torch import nn

import peftkit
from peftkit import LoRAConfig, stacks
from peftkit.targets import TargetError

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 30}


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(5, 4), *(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3))
    )


MODELS = {
    "llama": (lambda: llama(3), [f"model.layers.{i}" for i in range(3)]),
    "bert": (
        lambda: hf.BertForMaskedLM(hf.BertConfig(**TINY)),
        ["bert.encoder.layer.0", "bert.encoder.layer.1"],
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=16, n_layer=3, n_head=4, vocab_size=30, bos_token_id=1, eos_token_id=1)
        ),
        ["transformer.h.0", "transformer.h.1", "transformer.h.2"],
    ),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=16, d_ff=24, num_layers=2, num_heads=4, d_kv=4, vocab_size=30)
        ),
        ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
    ),
    "albert": (  # one block, used in every layer
        lambda: hf.AlbertModel(hf.AlbertConfig(**{**TINY, "num_hidden_layers": 12, "embedding_size": 8})),
        ["encoder.albert_layer_groups.0"],
    ),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=3)),
        ["model.layers.0", "model.layers.1"],
    ),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**TINY)), ["vit.layers.0", "vit.layers.1"]),
    "torch": (
        lambda: nn.Transformer(16, 4, 2, 1, 24),
        ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0"],
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_are_found(kind):
    make, names = MODELS[kind]
    model = make()
    found = stacks.find(model)
    assert [b.name for b in found] == names
    assert all(model.get_submodule(b.name) is b.module for b in found)


@pytest.mark.parametrize("kind", MODELS)
def test_depths_grow_from_the_embeddings_to_the_head(kind):
    model = MODELS[kind][0]()
    blocks = stacks.find(model)
    depths = stacks.depths(model, blocks)
    for i, block in enumerate(blocks):
        assert {depths[id(m)] for m in block.module.modules()} == {i + 1}
    assert set(depths.values()) <= set(range(len(blocks) + 2))
    for name in ("lm_head", "cls", "classifier", "pooler", "decoder.norm"):
        found = dict(model.named_modules()).get(name)
        assert found is None or depths[id(found)] == len(blocks) + 1, name
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and not any(name.startswith(f"{b.name}.") for b in blocks):
            assert depths[id(module)] == 0, name


def test_between_two_stacks_is_above_the_first():
    model = MODELS["t5"][0]()
    blocks = stacks.find(model)
    depths = stacks.depths(model, blocks)
    assert depths[id(model.encoder.final_layer_norm)] == 2 and depths[id(model.decoder.final_layer_norm)] == 5


def test_a_head_that_is_registered_first_is_above():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(4, 5)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
            self.embed = nn.Embedding(5, 4)

    model = Odd()
    depths = stacks.depths(model, stacks.find(model))
    assert depths[id(model.lm_head)] == 3 and depths[id(model.embed)] == 0


def test_adapters_lie_where_their_hosts_do():
    model = llama(3)
    peftkit.inject(model, LoRAConfig(r=2, targets="all-linear"))
    depths = stacks.depths(model, stacks.find(model))
    found = {depths[id(m)] for n, m in model.named_modules() if ".layers.1." in n}
    assert found == {2}


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_model_has_the_blocks_of_its_own(wrap):
    model = llama(2)
    assert [b.name for b in stacks.find(wrap(model))] == ["model.layers.0", "model.layers.1"]


def test_blocks_that_the_user_names():
    model = llama(4)
    layers = model.model.layers
    for given in ("layers.[13]", ["layers.1", "layers.3"], [layers[3], layers[1]], ["layers.1", "model.layers.3"]):
        assert [b.name for b in stacks.find(model, given)] == ["model.layers.1", "model.layers.3"]
    assert len(stacks.find(model, layers)) == 4
    model = sequential()
    with pytest.raises(TargetError, match="no repeated blocks were found in this Sequential; name them"):
        stacks.find(model)
    assert [b.name for b in stacks.find(model, ["^1", "^2", "^3"])] == ["1", "2", "3"]
