"""GGUF adapters: llama.cpp itself computes what our model computes, and what it would not read is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from storage_helpers import llama, peft_model, tensors_of, trained
from torch import Tensor, nn

import peftkit
from peftkit import DoRAConfig, LoRAConfig, StorageError
from peftkit.formats import rotary

gguf = pytest.importorskip("gguf")

VOCABULARY = 272
PROMPTS = [[1, 7, 200, 31], [3, 3, 90, 150, 260, 4, 17], [9]]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(**kwargs: Any) -> nn.Module:
    """Wide enough that its next tokens are far apart."""
    model = llama(hidden=64, vocab_size=VOCABULARY, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model


def ours(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in PROMPTS])


def written(tmp_path: Path, model: nn.Module, **kwargs: Any) -> Path:
    """The adapter of `model` as GGUF; the model beside it, as a directory without its weights."""
    peftkit.save(model, tmp_path / "adapter")
    (tmp_path / "base").mkdir(exist_ok=True)
    model.config.to_json_file(tmp_path / "base" / "config.json", use_diff=False)
    peftkit.convert(tmp_path / "adapter", tmp_path / "a.gguf", to="gguf", base=tmp_path / "base", **kwargs)
    return tmp_path / "a.gguf"


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    found = gguf.GGUFReader(file)
    return (
        {name: field.contents() for name, field in found.fields.items()},
        {t.name: torch.from_numpy(t.data.copy()) for t in found.tensors},
    )


CASES = {
    "plain": (LoRAConfig(r=4, alpha=12, targets=EVERY), {}),
    "ranks": (
        LoRAConfig(r={"q_proj": 2, "k_proj": 5, "**": 3}, alpha={"v_proj": 1.5, "0.mlp.**": 7, "**": 4}, targets=EVERY),
        {},
    ),
    "stabilised": (
        LoRAConfig(r={"q_proj": 2, "**": 5}, alpha=3, rank_stabilized=True, targets=["q_proj", "k_proj", "o_proj"]),
        {"num_key_value_heads": 4},
    ),
    "embeddings": (LoRAConfig(r=3, alpha=5, targets=["embed_tokens", "lm_head", "v_proj"]), {"head_dim": 24}),
    "tied": (LoRAConfig(r=3, alpha=9, targets="all-linear"), {"tie_word_embeddings": True}),
    "pissa": (LoRAConfig(r=3, init="pissa", targets="all-linear"), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_the_model_does(name, tmp_path):
    pytest.importorskip("xllamacpp")
    from benchmarks.llama_cpp.asked import next_tokens
    from benchmarks.llama_cpp.base import write_base

    config, kwargs = CASES[name]
    model = base(**kwargs)
    write_base(model, tmp_path / "base.gguf")
    bare = ours(model)
    trained(model, config)
    expected = ours(model)
    file = written(tmp_path, model)
    mistaken = tmp_path / "mistaken.gguf"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("peftkit.formats.gguf.interleaved", lambda t, heads: t)
        peftkit.convert(tmp_path / "adapter", mistaken, to="gguf", base=model)
    found = next_tokens(tmp_path / "base.gguf", [None, file, mistaken], PROMPTS, VOCABULARY)

    def off(a: Tensor, b: Tensor) -> float:
        return (a - b).abs().max().item()

    assert off(found[0], bare) < 5e-5
    assert off(found[1], expected) < 5e-5
    assert off(bare, expected) > 0.5
    assert torch.equal(found[1].topk(10).indices, expected.topk(10).indices)
    if name != "embeddings":  # whose q and k are not adapted
        assert off(found[2], expected) > 0.1
    else:
        assert mistaken.read_bytes() == file.read_bytes()


def test_the_file_is_as_llama_cpp_wants_it(tmp_path):
    model = trained(
        base(), LoRAConfig(r={"q_proj": 2, "**": 4}, alpha=6, targets=["q_proj", "embed_tokens", "down_proj"])
    )
    fields, tensors = read(written(tmp_path, model))
    assert fields["general.type"] == "adapter" and fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 6.0
    assert tensors["blk.1.attn_q.weight.lora_a"].shape == (2, 64)
    assert tensors["blk.1.attn_q.weight.lora_b"].shape == (64, 2)
    assert tensors["token_embd.weight.lora_a"].shape == (VOCABULARY, 4)
    assert tensors["token_embd.weight.lora_b"].shape == (64, 4)
    stored = tensors_of(tmp_path / "adapter")
    stem = "base_model.model.model.layers.0.mlp.down_proj"
    assert torch.equal(tensors["blk.0.ffn_down.weight.lora_b"], stored[f"{stem}.lora_B.weight"])  # to the bit
    assert len(tensors) == 2 * (2 + 2 + 1)


def test_scales_that_differ_are_in_b(tmp_path):
    config = LoRAConfig(r=4, alpha={"v_proj": 3, "**": 8}, targets=["v_proj", "up_proj", "down_proj"])
    fields, tensors = read(written(tmp_path, trained(base(), config)))
    stored = tensors_of(tmp_path / "adapter")["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"]
    assert fields["adapter.lora.alpha"] == 8.0
    assert torch.equal(tensors["blk.0.attn_v.weight.lora_b"], (stored.double() * (3 / 8)).float())


def test_half_precision(tmp_path):
    model = trained(base(), LoRAConfig(r=2, targets=["v_proj"]))
    _, tensors = read(written(tmp_path, model, dtype=torch.float16))
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    stored = tensors_of(tmp_path / "adapter")["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"]
    assert torch.equal(tensors["blk.1.attn_v.weight.lora_a"], stored.half())
    with torch.no_grad():
        peftkit.parameters(model)[0].view(-1)[0] = 1e6
    before = (tmp_path / "a.gguf").read_bytes()
    with pytest.raises(StorageError, match=r"v_proj.*beyond the range of torch.float16"):
        written(tmp_path, model, dtype=torch.float16)
    assert (tmp_path / "a.gguf").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "adapter", "base"]


def test_peft_adapters_become_gguf(tmp_path):
    """What peft reads of a directory is what is written, patterns and all."""
    model = trained(base(), LoRAConfig(r={"q_proj": 2, "**": 3}, alpha=6, rank_stabilized=True, targets=EVERY))
    _, expected = read(written(tmp_path, model))
    peft_model(base(), tmp_path / "adapter").save_pretrained(tmp_path / "theirs")
    peftkit.convert(tmp_path / "theirs", tmp_path / "b.gguf", to="gguf", base=tmp_path / "base")
    _, found = read(tmp_path / "b.gguf")
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


def test_base_weights_that_peft_writes_beside_embeddings(tmp_path):
    import peft

    model = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert any(key.endswith("base_layer.weight") for key in tensors_of(tmp_path / "a"))
    peftkit.convert(tmp_path / "a", tmp_path / "a.gguf", to="gguf", base=base())
    assert set(read(tmp_path / "a.gguf")[1]) == {"token_embd.weight.lora_a", "token_embd.weight.lora_b"}
    with pytest.raises(StorageError, match=r"embed_tokens' is for 64 × 272, and the base's config\.json says 64 × 300"):
        larger = llama(hidden=64, vocab_size=300)
        peftkit.convert(tmp_path / "a", tmp_path / "a.gguf", to="gguf", base=larger)


def refused(tmp_path: Path, model: nn.Module, match: str, **config: Any) -> None:
    peftkit.save(model, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({**model.config.to_dict(), **config}))
    with pytest.raises(StorageError, match=match):
        peftkit.convert(tmp_path / "adapter", tmp_path / "a.gguf", to="gguf", base=tmp_path / "base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    ("config", "change", "match"),
    [
        (DoRAConfig(r=2, targets=["v_proj"]), {}, "it is dora, and llama.cpp reads plain LoRA alone"),
        (LoRAConfig(r=2, targets=["v_proj"], also_train=["lm_head"]), {}, r"lm_head\.weight, which is stored whole"),
        (LoRAConfig(r=2, targets=["v_proj"], also_train={"embed_tokens": [3]}), {}, "trainable_tokens_delta, which is"),
        (LoRAConfig(r=2, targets=["v_proj"]), {"model_type": "qwen2"}, "model_type='qwen2', expected 'llama' or 'mistral'"),
        (LoRAConfig(r=2, targets=["v_proj"]), {"num_hidden_layers": 1}, r"no adapter for 'model.layers.1.self_attn.v_proj'"),
        (LoRAConfig(r=2, targets=["v_proj"]), {"hidden_size": 32}, r"is for 32 × 64, and the base's .* says 32 × 32"),
        (LoRAConfig(r=2, targets=["lm_head"]), {"tie_word_embeddings": True}, "no adapter for 'lm_head'"),
        (LoRAConfig(r=2, targets=["embed_tokens"]), {"tie_word_embeddings": True}, "no adapter for 'model.embed_tokens'"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_not_compute(config, change, match, tmp_path):
    refused(tmp_path, trained(base(), config), match, **change)


def test_peft_on_a_base_that_it_changed(tmp_path):
    import peft

    model = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(StorageError, match="init_lora_weights='pissa' has it relative to a base that peft has changed"):
        peftkit.convert(tmp_path / "a", tmp_path / "a.gguf", to="gguf", base=base())


def test_without_a_config(tmp_path):
    peftkit.save(trained(base(), LoRAConfig(r=2, targets=["v_proj"])), tmp_path / "a")
    with pytest.raises(StorageError, match=r"config\.json is missing"):
        peftkit.convert(tmp_path / "a", tmp_path / "a.gguf", to="gguf", base=tmp_path)
    with pytest.raises(StorageError, match="Sequential given as base has no config"):
        peftkit.convert(tmp_path / "a", tmp_path / "a.gguf", to="gguf", base=nn.Sequential())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(StorageError, match="has no num_attention_heads"):
        peftkit.convert(tmp_path / "a", tmp_path / "a.gguf", to="gguf", base=tmp_path)


@pytest.mark.parametrize(("heads", "size", "more"), [(1, 2, ()), (3, 8, (5,)), (4, 6, (2, 3))])
def test_the_two_orders_of_rows(heads, size, more):
    t = torch.randn(heads * size, *more)
    pairs = rotary.interleaved(t, heads)
    assert torch.equal(rotary.halves(pairs, heads), t)
    first = pairs[:size]  # of the first head: x₀ y₀ x₁ y₁ …
    assert torch.equal(first[0::2], t[: size // 2]) and torch.equal(first[1::2], t[size // 2 : size])
    with pytest.raises(ValueError, match="not those of"):
        rotary.interleaved(torch.zeros(heads * size + 1), heads)
