"""Models that compute in ways of their own: prefixes, prompts and series adapters act there, or are refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peftkit
from peftkit import LoRAConfig, PrefixTuningConfig, PromptTuningConfig, SeriesAdapterConfig, TargetError
from peftkit.testing.models import drawn

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 5, 7, 11, 2], [4, 6, 8, 9, 2]])
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
DECODER = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PAIR = {"vocab_size": 31, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
PAIR |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
PAIR |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


def small(name: str, **sizes) -> nn.Module:
    made = getattr(transformers, f"{name}Config")(**sizes)
    kind = "ForConditionalGeneration" if made.is_encoder_decoder and name != "Marian" else "ForCausalLM"
    return drawn(getattr(transformers, "MarianMTModel" if name == "Marian" else name + kind)(made))


def attached(model: nn.Module, config) -> nn.Module:
    peftkit.inject(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in peftkit.parameters(model):
            p.copy_(0.5 * torch.randn_like(p))
    return model


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Marian", PAIR),
        ("Pegasus", PAIR),
        ("UMT5", {"vocab_size": 31, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}),
    ],
)
def test_a_prefix_acts_in_encoder_decoders_that_give_positions_in_their_own_way(name, sizes):
    model = attached(small(name, **sizes), PrefixTuningConfig(length=2))
    with torch.no_grad():
        y = model(input_ids=IDS, decoder_input_ids=IDS).logits
        with peftkit.disabled(model):
            assert not torch.allclose(model(input_ids=IDS, decoder_input_ids=IDS).logits, y, rtol=1e-3)
    for p in peftkit.parameters(model):
        assert p.requires_grad


def test_a_sparse_attention_is_refused():
    model = nn.Sequential()
    model.add_module("self_attn", transformers.models.llama.modeling_llama.LlamaAttention(llama_config(), 0))
    model.self_attn.indexer = nn.Linear(16, 16)
    with pytest.raises(TargetError, match="leaves out tokens by an index"):
        peftkit.inject(model, PrefixTuningConfig(length=2))


def llama_config():
    made = transformers.LlamaConfig(**DECODER)
    made._attn_implementation = "sdpa"
    return made


def test_a_class_derived_from_an_attention_of_transformers():
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Own(LlamaAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    plain, own = (drawn(transformers.LlamaForCausalLM(llama_config())) for _ in range(2))
    own.model.layers[1].self_attn.__class__ = Own
    config = PrefixTuningConfig(length=2)
    with torch.no_grad():
        assert torch.equal(attached(own, config)(IDS).logits, attached(plain, config)(IDS).logits)
    peftkit.eject(own)
    assert type(own.model.layers[1].self_attn) is Own


def test_a_checkpoint_inside_an_attention_would_lose_the_prefix():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.num_heads = 2

        def core(self, *qkv):
            return nn.functional.scaled_dot_product_attention(*qkv)

        def forward(self, x):
            qkv = [f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)]
            return torch.utils.checkpoint.checkpoint(self.core, *qkv, use_reentrant=True).transpose(1, 2).flatten(2)

    model = nn.ModuleDict({"self_attn": Attention()})
    peftkit.inject(model, PrefixTuningConfig(length=2, kv_heads=2, head_dim=4))
    with pytest.raises(RuntimeError, match="'self_attn' computes attention in a reentrant checkpoint"):
        model["self_attn"](torch.randn(1, 3, 8, requires_grad=True))


def test_a_reparametrised_prefix_comes_off_the_meta_device():
    base = drawn(transformers.LlamaForCausalLM(llama_config()))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(llama_config())
    peftkit.inject(model, PrefixTuningConfig(length=2, reparametrize=4))
    model.load_state_dict(base.state_dict(), strict=False, assign=True)
    model.model.rotary_emb = base.model.rotary_emb
    peftkit.reset(model)
    assert all(not p.is_meta for p in peftkit.parameters(model))


def test_peft_prefixes_on_a_model_with_alibi_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    sizes = {k: v for k, v in DECODER.items() if k != "intermediate_size"}
    base = small("Falcon", **sizes, alibi=True, multi_query=False, new_decoder_architecture=False)
    theirs = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = small("Falcon", **sizes, alibi=True, multi_query=False, new_decoder_architecture=False)
    with pytest.raises(peftkit.StorageError, match="ALiBi"):
        peftkit.load(ours, tmp_path / "theirs")
    peftkit.inject(ours, PrefixTuningConfig(length=2))
    peftkit.save(ours, tmp_path / "ours")
    assert "PEFTKIT_PREFIX" in (tmp_path / "ours" / "adapter_config.json").read_text()


def test_a_prompt_refuses_padding_on_the_left_where_places_count():
    windowed = small("Mistral", **DECODER, num_key_value_heads=2, sliding_window=3)
    attached(windowed, PromptTuningConfig(length=2))
    with pytest.raises(ValueError, match="padding on the left"):
        windowed(IDS, attention_mask=PADDED)
    assert windowed(IDS, attention_mask=PADDED.flip(1)).logits.shape[1] == IDS.shape[1]
    whole = attached(drawn(transformers.LlamaForCausalLM(llama_config())), PromptTuningConfig(length=2))
    assert torch.isfinite(whole(IDS, attention_mask=PADDED).logits).all()


def test_a_prompt_sees_from_a_mask_that_tokens_see_none_behind_them():
    sizes = {"vocab_size": 31, "d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2}
    model = attached(small("XGLM", **sizes), PromptTuningConfig(length=2))
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), torch.finfo(torch.float32).min)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, attention_mask=mask).logits, model(IDS).logits)


def test_a_model_that_changes_embeddings_by_their_ids_has_no_prompt():
    sizes = {k: v for k, v in DECODER.items() if k != "vocab_size"}
    config = transformers.EsmConfig(vocab_size=31, pad_token_id=1, mask_token_id=30, token_dropout=True, **sizes)
    with pytest.raises(TargetError, match="matches no module"):
        peftkit.inject(transformers.EsmModel(config), PromptTuningConfig(length=2))


def test_a_series_adapter_stands_before_a_residual_that_the_block_is_given():
    model = small("Bloom", vocab_size=31, hidden_size=16, n_layer=1, n_head=2)
    where = peftkit.inject(model, SeriesAdapterConfig(bottleneck=2, targets=["attention", "mlp"])).sites
    assert {w.partition("h.0.")[2] for w in where} == {"self_attention.dense", "mlp.dense_4h_to_h"}
    peftkit.inject(model, LoRAConfig(r=1, targets="dense_4h_to_h"), name="beside")
