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


# -- what runs when ------------------------------------------------------------------------------------------------------


def test_depth_goes_by_when_a_module_runs_not_by_when_it_was_registered():
    config = hf.OPTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=4, ffn_dim=24, vocab_size=30, word_embed_proj_dim=8
    )
    model = hf.OPTForCausalLM(config)
    depths = stacks.depths(model, stacks.find(model))
    decoder = model.model.decoder
    assert depths[id(decoder.final_layer_norm)] == depths[id(decoder.project_out)] == 4
    assert depths[id(decoder.project_in)] == depths[id(decoder.embed_positions)] == 0

    config = hf.BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=30, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = hf.BartForConditionalGeneration(config)
    depths = stacks.depths(model, stacks.find(model))
    assert depths[id(model.model.encoder.layernorm_embedding)] == 0
    assert depths[id(model.model.decoder.layernorm_embedding)] == 2  # after the encoder, before the decoder's blocks


def test_a_setting_that_is_read_later_does_not_move_what_ran_before():
    text = {**TINY, "num_key_value_heads": 4}
    vision = {**TINY, "image_size": 16, "patch_size": 8}
    vision.pop("vocab_size")
    config = hf.LlavaConfig(text_config=hf.LlamaConfig(**text), vision_config=hf.CLIPVisionConfig(**vision))
    model = hf.LlavaForConditionalGeneration(config)
    depths = stacks.depths(model, stacks.find(model))
    assert depths[id(model.model.multi_modal_projector)] == 2  # between the tower's two blocks and the text's


class NormFirst(nn.Module):
    """Registers what runs last first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.to_logits = nn.LayerNorm(4), nn.Linear(4, 5)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
        self.project, self.unused = nn.Linear(5, 4), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.project(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.finish(x)

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_logits(self.norm(x))


def test_a_model_that_registers_its_end_first():
    model = NormFirst()
    depths = stacks.depths(model, stacks.find(model))
    found = {name: depths[id(m)] for name, m in model.named_children()}
    assert found == {"norm": 3, "to_logits": 3, "layers": 0, "project": 0, "unused": 0}


# -- what is no block ----------------------------------------------------------------------------------------------------


def linears(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(count))


def test_a_list_of_heads_is_no_stack():
    model = nn.ModuleDict({"layers": linears(3), "heads": linears(4)})
    assert [b.name for b in stacks.find(model)] == ["layers.0", "layers.1", "layers.2"]


def test_of_unlike_stacks_beside_each_other_the_longest_counts_and_of_equal_length_none():
    class Other(nn.Sequential):
        pass

    other = nn.ModuleList(Other(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
    model = nn.ModuleDict({"mergers": linears(2), "blocks": other})
    assert {b.name.split(".")[0] for b in stacks.find(model)} == {"blocks"}
    model = nn.ModuleDict({"attentions": linears(3), "ffns": other})
    with pytest.raises(
        TargetError, match=r"has attentions and ffns beside each other, 3 each.*blocks='attentions\.\*'"
    ):
        stacks.find(model)
    assert len(stacks.find(model, ["^attentions.0", "ffns.[012]"])) == 4
    model = nn.ModuleDict({"layer1": linears(2), "layer2": linears(3)})  # a ResNet's
    assert len(stacks.find(model)) == 5


def test_a_model_that_holds_itself():
    model = nn.ModuleDict({"layers": linears(2), "head": nn.Linear(4, 2)})
    model.again = model
    blocks = stacks.find(model, "layers.*")
    assert stacks.depths(model, blocks)[id(model["head"])] == 3
