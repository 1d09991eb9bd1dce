"""What a prefix refuses, and implementations that cannot be run here: played by a function that computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_prefix import IDS, P, adapters, family, prefixed
from torch import nn

import peftkit
from peftkit import PrefixTuningConfig, TargetError
from peftkit.testing import models

transformers = pytest.importorskip("transformers")
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

FLASH = "flash_attention_played"


@pytest.fixture
def flash():
    """An implementation by flash-attention's rules: no mask or a 2-D one, aligned at the lower right, a window."""
    seen = []

    def attend(module, query, key, value, attention_mask, sliding_window=None, scaling=None, is_causal=None, **kwargs):
        seen.append((module.config._attn_implementation, None if attention_mask is None else attention_mask.shape))
        q, k = query.shape[2], key.shape[2]
        causal = module.is_causal if is_causal is None else is_causal
        mask = torch.ones(q, k, dtype=torch.bool)
        mask = mask.tril(k - q) if causal else mask
        groups = module.num_key_value_groups
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS._global_mapping[FLASH] = attend
    yield seen
    del ALL_ATTENTION_FUNCTIONS._global_mapping[FLASH]


def test_flash_attention_gets_the_prefix_without_a_mask_and_its_own_name(flash):
    model = prefixed(models.llama().double())
    expected = model(IDS).logits
    model.config._attn_implementation_internal = FLASH
    torch.testing.assert_close(model(IDS).logits, expected)
    assert flash == [(FLASH, None)] * 2


def test_flash_attention_would_drop_the_prefix_out_of_a_window(flash):
    model = prefixed(family("Mistral", sliding_window=8))
    model.config._attn_implementation_internal = FLASH
    model(IDS[:, :5])
    with pytest.raises(RuntimeError, match="sliding window of 8, out of which flash_attention_played would drop"):
        model(IDS)


def test_packed_sequences_are_refused_where_each_would_need_the_prefix(flash):
    model = prefixed(models.llama())
    model.config._attn_implementation_internal = FLASH
    with pytest.raises(RuntimeError, match="packed"):
        model(IDS, cu_seq_lens_q=torch.tensor([0, 7]), cu_seq_lens_k=torch.tensor([0, 7]))


def same(a: nn.Module, b: nn.Module) -> bool:
    return [type(m) for m in a.modules()] == [type(m) for m in b.modules()] and all(
        torch.equal(p, q) and p.requires_grad == q.requires_grad
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("make", "settings", "error", "says"),
    [
        (models.gpt2, {"length": 32}, ValueError, "'transformer.wpe' has 32 positions"),
        (models.llama, {"targets": "q_proj"}, TargetError, "but it is a Linear, no attention"),
        (models.llama, {"targets": "mlp"}, TargetError, "matches no module"),
        (models.linear, {}, TargetError, "matches no module of Sequential"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(make, settings, error, says):
    model = make()
    before, config = copy.deepcopy(model), getattr(model, "config", None)
    with pytest.raises(error, match=says):
        peftkit.inject(model, PrefixTuningConfig(**settings))
    assert same(before, model) and peftkit.adapters(model) == {}
    assert config is None or all(m.config is config for m in model.modules() if "Attention" in type(m).__name__)


def test_attention_by_products_of_its_own_is_refused_by_name():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "vocab_size": 31}
    model = transformers.GPTJModel(transformers.GPTJConfig(**sizes))
    for targets in (None, "attn"):
        with pytest.raises(
            TargetError, match=r"'h\.0\.attn'.* GPTJAttention computes attention by products of its own"
        ):
            peftkit.inject(model, PrefixTuningConfig(targets=targets))


def test_more_tokens_than_positions_are_left():
    model = prefixed(models.gpt2())
    model(IDS[:, :1].expand(-1, 32 - P))
    with pytest.raises(ValueError, match="30 tokens behind a prefix of 3 are more than the 32 positions"):
        model(IDS[:, :1].expand(-1, 30))
    free = prefixed(models.gpt2(), shift_positions=False)
    free(IDS[:, :1].expand(-1, 32))


@pytest.mark.parametrize(
    "settings",
    [{"length": 0}, {"length": 2.0}, {"length": True}, {"init": "xavier"}, {"reparametrize": 0}, {"dtype": torch.int8}],
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        PrefixTuningConfig(**settings)


def test_sizes_that_differ_per_layer_and_between_keys_and_values():
    deep = family(
        "DeepseekV3", num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=6, first_k_dense_replace=2, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
    )  # fmt: skip
    model = prefixed(deep)
    assert [(a.key.shape[-1], a.value.shape[-1]) for a in adapters(model)] == [(8, 6)] * 2
    assert not torch.allclose(model(IDS).logits, deep(IDS).logits)


def test_sizes_that_are_told_wrongly_are_named_at_the_first_forward():
    model = prefixed(models.llama(), kv_heads=3)
    with pytest.raises(
        RuntimeError, match=r"keys of 2 heads of 4, but its prefix has 3 of 4; .*kv_heads=2, head_dim=4"
    ):
        model(IDS)


def test_half_precision_keeps_the_prefix_in_fp32():
    model = prefixed(models.llama().bfloat16())
    assert {p.dtype for p in peftkit.parameters(model)} == {torch.float32}
    assert model(IDS).logits.dtype == torch.bfloat16


def test_it_cannot_be_merged():
    with pytest.raises(peftkit.NotMergeable, match="softmax"):
        peftkit.merge(prefixed(models.llama()))
