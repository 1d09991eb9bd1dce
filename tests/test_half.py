"""Half fine-tuning: halves by category, rounds, and what the frozen half keeps."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_models import adam, backward, bits, changed, llama, train
from test_stacks import MODELS

from peftkit import (
    HalfFineTuning,
)


def on(schedule: object, suffix: str) -> list[str]:
    return [name for name in schedule.trained if suffix in name]  # type: ignore[attr-defined]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), layers=st.integers(1, 6), rounds=st.integers(1, 3))
def test_half_of_every_category(seed, layers, rounds):
    """2404.18466: 2 of Q, K, V and O in each block; 2 of up, gate and down in half of the blocks, 1 in the others."""
    model = llama(layers)
    half = HalfFineTuning(model, adam(model), seed)
    for _ in range(rounds):
        feed_forward = []
        for i in range(layers):
            assert len(on(half, f"layers.{i}.self_attn.")) == 2
            feed_forward.append(len(on(half, f"layers.{i}.mlp.")))
        assert set(feed_forward) <= {1, 2} and feed_forward.count(2) in {layers // 2, (layers + 1) // 2}
        assert len(on(half, "norm")) in {layers, layers + 1}  # of 2 a block and the last one
        assert len(on(half, "embed_tokens")) == len(on(half, "lm_head")) == 1
        assert set(half.trained) | set(half.frozen) == {n for n, _ in model.named_parameters()}
        assert not set(half.trained) & set(half.frozen)
        half.new_round()


def test_every_matrix_has_its_turn():
    model = llama(4)
    half = HalfFineTuning(model, adam(model))
    counts = dict.fromkeys(bits(model), 0)
    for _ in range(400):
        for name in half.trained:
            counts[name] += 1
        half.new_round()
    for name, count in counts.items():
        expected = 400 if "embed" in name or "lm_head" in name else 200
        assert abs(count - expected) < 4 * 10 + (name.startswith("model.norm") * 10), name  # 4 standard deviations


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 30}


CATEGORIES = {
    "bert": (
        MODELS["bert"][0],
        {"attention": r"attention\..*(query|key|value|dense)", "ffn": r"(intermediate|output)\.dense"},
    ),
    "gpt2": (MODELS["gpt2"][0], {"attention": r"attn\.c_\w+", "ffn": r"mlp\.c_\w+"}),
    "t5": (
        MODELS["t5"][0],
        {"self": r"layer\.0\.SelfAttention\.[qkvo]", "cross": r"layer\.1\.EncDec.*", "ffn": r".*DenseReluDense.*"},
    ),
    "opt": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=4, ffn_dim=24, vocab_size=30, word_embed_proj_dim=16
        )),
        {"attention": r"self_attn\.\w+", "ffn": r"fc[12]"},
    ),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)),
        {"attention": r"self_attn\.\w+", "experts": r"mlp\.experts\.\w+"},
    ),
    "swin": (
        lambda: hf.SwinModel(hf.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32)),
        {"attention": r"blocks\.0\.attention\.\w_proj"},
    ),
    "torch": (
        lambda: torch.nn.Transformer(16, 4, 2, 2, 24),
        {"self": r"self_attn\.\w+", "cross": r"multihead_attn\.\w+", "ffn": r"linear[12]"},
    ),
    "split": (
        lambda: torch.nn.ModuleDict({"layers": torch.nn.ModuleList(
            torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(16, 4, kdim=8, vdim=8)}) for _ in range(4)
        )}),
        {"attention": r"attn\.(q_proj|k_proj|v_proj|out_proj)"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CATEGORIES)
def test_categories_of_other_models(kind):
    """Half of each, whatever is fused, stacked or beside it (routers, tables of positions); biases go with their weights."""
    make, categories = CATEGORIES[kind]
    model = make()
    half = HalfFineTuning(model, adam(model))
    for _ in range(8):
        trained = set(half.trained)
        everything = trained | set(half.frozen)
        for category, pattern in categories.items():
            counts = []
            for block in half.blocks:
                full = re.compile(re.escape(block.name) + r"\." + pattern)
                names = {n for n in everything if full.fullmatch(stem(n)) and not n.endswith("bias")}
                assert names or category == "cross", (block.name, category)
                counts += [(len(names & trained), len(names))] if names else []
            assert all(2 * count == total for count, total in counts), (category, counts)
        for name in everything:
            weight = name.removesuffix("bias") + "weight"
            if name.endswith(".bias") and weight in everything:
                assert (name in trained) == (weight in trained)
        half.new_round()


def stem(name: str) -> str:
    """A parameter's name as the matrix's: without `.weight`, and `in_proj` for what MultiheadAttention calls so."""
    return name.removesuffix(".weight").removesuffix("_weight")


def test_stacked_experts_rest_by_matrix_with_their_biases():
    config = hf.GptOssConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        vocab_size=30, num_local_experts=3, num_experts_per_tok=2, pad_token_id=None,
    )  # fmt: skip
    model = hf.GptOssForCausalLM(config)
    half = HalfFineTuning(model, adam(model))
    seen = set()
    for _ in range(6):
        on_ = set(half.trained)
        for i in range(4):
            for matrix in ("gate_up_proj", "down_proj"):
                name = f"model.layers.{i}.mlp.experts.{matrix}"
                assert (name in on_) == (f"{name}_bias" in on_)
                seen.add((matrix, name in on_))
        half.new_round()
    assert len(seen) == 4


def test_relative_positions_are_no_fifth_matrix():
    model = MODELS["t5"][0]()
    half = HalfFineTuning(model, adam(model))
    for _ in range(10):
        matrices = [n for n in half.trained if "encoder.block.0.layer.0.SelfAttention" in n and "relative" not in n]
        assert len(matrices) == 2
        half.new_round()


@pytest.mark.parametrize("warm", [False, True])
def test_the_frozen_half_keeps_its_bits_and_has_no_state(warm):
    model = llama(4)
    optimizer = adam(model)
    if warm:
        train(model, optimizer, range(2))
    half = HalfFineTuning(model, optimizer, seed=3)
    for stage in range(3):
        before, expected = bits(model), set(half.trained)
        for step in range(3):
            backward(model, 3 * stage + step)
            optimizer.step()
            assert {n for n, p in model.named_parameters() if p in optimizer.state} == expected
            optimizer.zero_grad()
        assert changed(before, model) == expected
        half.new_round()
        assert set(half.trained) != expected
        assert {n for n, p in model.named_parameters() if p in optimizer.state} == expected & set(half.trained)


def test_a_round_goes_on_where_it_stopped():
    whole, first = llama(4), llama(4)
    kept = None
    for model in (whole, first):
        optimizer = adam(model)
        half = HalfFineTuning(model, optimizer, seed=3)
        for step in range(6 if model is whole else 4):
            if step == 3:
                half.new_round()
            train(model, optimizer, [step])
        kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), json.loads(json.dumps(half.state_dict()))))
    assert kept is not None
    again = llama(4)
    again.load_state_dict(kept[0])
    optimizer = adam(again)
    optimizer.load_state_dict(kept[1])
    half = HalfFineTuning(again, optimizer, seed=3)
    half.load_state_dict(kept[2])
    train(again, optimizer, range(4, 6))
    assert changed(bits(whole), again) == set()


def test_the_next_stage_with_an_optimizer_of_its_own():
    model = llama(4)
    first = HalfFineTuning(model, adam(model))
    trained = first.trained
    first.close()
    second = HalfFineTuning(model, optimizer := adam(model))
    assert second.trained == trained  # the same seed, the same first round
    second.load_state_dict(first.state_dict())
    second.new_round()
    assert second.trained != trained and second.state_dict()["switches"] == 2
    train(model, optimizer, range(1))
    assert {n for n, p in model.named_parameters() if p in optimizer.state} == set(second.trained)
