"""Tiny models of many families, with where their sub-layers are, written down by hand.

Sites are `kind: where a series adapter hangs | where a parallel one hangs`, for the first layer of each stack; "-" is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.testing.models import drawn, ids, numbers


@dataclass(frozen=True)
class Family:
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    sites: str

    def __str__(self) -> str:
        return self.name

    def expected(self) -> list[tuple[str, str | None, str | None]]:
        """Of each sub-layer in order: its kind, the place of a series adapter, of a parallel one."""
        found = []
        for line in self.sites.strip().splitlines():
            kind, places = line.split(":")
            series, parallel = (place.strip() for place in places.split("|"))
            found.append((kind.strip(), None if series == "-" else series, None if parallel == "-" else parallel))
        return found


def of(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A transformers model by the start of its classes' names."""

    def make() -> nn.Module:
        import transformers

        cls = getattr(transformers, sizes.pop("cls", f"{name}Model"))
        return drawn(cls(getattr(transformers, f"{name}Config")(**sizes)))

    return make


def text() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def both() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids()}


def image() -> dict[str, Tensor]:
    return {"pixel_values": numbers(2, 3, 8, 8)()}


def sound() -> dict[str, Tensor]:
    return {"input_features": numbers(2, 8, 16)(), "decoder_input_ids": ids()}


SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 31, "num_hidden_layers": 1}
WIDE = SIZES | {"intermediate_size": 24}
GROUPED = WIDE | {"num_key_value_heads": 1, "pad_token_id": 0}
D_MODEL: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 31,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
N_EMBD: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 31}

SELF_ATTN_AND_MLP = """
    attention: layers.0.self_attn | layers.0.self_attn
    mlp: layers.0.mlp | layers.0.mlp"""
LIKE_BERT = """
    attention: encoder.layer.0.attention.output.dense | encoder.layer.0.attention.output
    mlp: encoder.layer.0.output.dense | encoder.layer.0.output"""
LIKE_BART = """
    attention: encoder.layers.0.self_attn | encoder.layers.0.self_attn
    mlp: encoder.layers.0.fc2 | -
    attention: decoder.layers.0.self_attn | decoder.layers.0.self_attn
    attention: decoder.layers.0.encoder_attn | decoder.layers.0.encoder_attn
    mlp: decoder.layers.0.fc2 | -"""

FAMILIES = (
    Family("llama", of("Llama", **GROUPED), text, SELF_ATTN_AND_MLP),
    Family("qwen3", of("Qwen3", **GROUPED, head_dim=16), text, SELF_ATTN_AND_MLP),  # q_norm is as wide as the model
    Family("olmo2", of("Olmo2", **GROUPED), text, SELF_ATTN_AND_MLP),  # q_norm spans all heads
    Family("gemma2", of("Gemma2", **GROUPED, head_dim=8), text, SELF_ATTN_AND_MLP),
    Family("phi3", of("Phi3", **GROUPED), text, SELF_ATTN_AND_MLP),  # o_proj registered before qkv_proj
    Family("mixtral", of("Mixtral", **GROUPED, num_local_experts=2), text, SELF_ATTN_AND_MLP),
    Family(
        "gpt_oss",
        of("GptOss", **GROUPED, num_local_experts=3, num_experts_per_tok=2, head_dim=8),
        text,
        SELF_ATTN_AND_MLP,
    ),
    Family(
        "granitemoe",
        of("GraniteMoe", **GROUPED, num_local_experts=3),
        text,
        "attention: layers.0.self_attn | layers.0.self_attn\nmlp: layers.0.block_sparse_moe | layers.0.block_sparse_moe",
    ),
    Family("bert", of("Bert", **WIDE), text, LIKE_BERT),
    Family("square bert", of("Bert", **SIZES, intermediate_size=16), text, LIKE_BERT),  # `intermediate` is d -> d
    Family("roberta", of("Roberta", **WIDE), text, LIKE_BERT),
    Family("deberta", of("DebertaV2", **WIDE), text, LIKE_BERT),
    Family(
        "mpnet",
        of("MPNet", **WIDE),
        text,
        """
        attention: encoder.layer.0.attention.attn | encoder.layer.0.attention.attn
        mlp: encoder.layer.0.output.dense | encoder.layer.0.output""",
    ),
    Family(
        "albert",
        of("Albert", **WIDE | {"num_hidden_layers": 3}, embedding_size=8),
        text,
        """
        attention: encoder.albert_layer_groups.0.albert_layers.0.attention.dense | -
        mlp: encoder.albert_layer_groups.0.albert_layers.0.ffn_output | -""",
    ),
    Family(
        "distilbert",
        of("DistilBert", dim=16, hidden_dim=24, n_heads=2, n_layers=1, vocab_size=31),
        text,
        """
        attention: transformer.layer.0.attention | transformer.layer.0.attention
        mlp: transformer.layer.0.ffn | transformer.layer.0.ffn""",
    ),
    Family(
        "modernbert",
        of("ModernBert", **WIDE, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        text,
        "attention: layers.0.attn | layers.0.attn\nmlp: layers.0.mlp | layers.0.mlp",
    ),
    Family("gpt2", of("GPT2", **N_EMBD), text, "attention: h.0.attn | h.0.attn\nmlp: h.0.mlp | h.0.mlp"),
    Family(
        "gpt_neo",
        of("GPTNeo", hidden_size=16, num_layers=1, num_heads=2, vocab_size=31, attention_types=[[["global"], 1]]),
        text,
        "attention: h.0.attn | h.0.attn\nmlp: h.0.mlp | h.0.mlp",
    ),
    Family(
        "gpt_neox",
        of("GPTNeoX", **WIDE),
        text,
        "attention: layers.0.attention | layers.0.attention\nmlp: layers.0.mlp | layers.0.mlp",
    ),
    Family(
        "falcon",
        of("Falcon", **SIZES),
        text,
        "attention: h.0.self_attention | h.0.self_attention\nmlp: h.0.mlp | h.0.mlp",
    ),
    Family(
        "opt",
        of("OPT", **SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32),
        text,
        """
        attention: decoder.layers.0.self_attn | decoder.layers.0.self_attn
        mlp: decoder.layers.0.fc2 | -""",
    ),
    Family(
        "t5",
        of("T5", d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=31),
        both,
        """
        attention: encoder.block.0.layer.0.SelfAttention | encoder.block.0.layer.0.SelfAttention
        mlp: encoder.block.0.layer.1.DenseReluDense | encoder.block.0.layer.1.DenseReluDense
        attention: decoder.block.0.layer.0.SelfAttention | decoder.block.0.layer.0.SelfAttention
        attention: decoder.block.0.layer.1.EncDecAttention | decoder.block.0.layer.1.EncDecAttention
        mlp: decoder.block.0.layer.2.DenseReluDense | decoder.block.0.layer.2.DenseReluDense""",
    ),
    Family("bart", of("Bart", **D_MODEL), both, LIKE_BART),
    Family(
        "whisper",
        of("Whisper", **D_MODEL, num_mel_bins=8, max_source_positions=8, max_target_positions=16),
        sound,
        LIKE_BART,
    ),
    Family(
        "vit",
        of("ViT", **WIDE | {"vocab_size": None}, image_size=8, patch_size=4),
        image,
        "attention: layers.0.attention | layers.0.attention\nmlp: layers.0.mlp | layers.0.mlp",
    ),
    Family(
        "xlnet",
        of("XLNet", d_model=16, n_layer=1, n_head=2, d_inner=24, vocab_size=31),
        text,
        "attention: - | -\nmlp: layer.0.ff.layer_2 | -",  # ff registers its norm first and applies it last
    ),
)


# -- hand-written ---------------------------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """The norm inside, in front, as lucidrains has it."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 12), nn.GELU(), nn.Linear(12, d))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Attention(nn.Module):
    """The norm in front again, and one behind the output projection in a Sequential: no residual in either."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.to_qkv = nn.Linear(d, 3 * d, bias=False)
        self.to_out = nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        return self.to_out((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Numbered(nn.Module):
    """`ModuleList([attention, feed_forward])`: sub-layers without names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([Attention(), FeedForward()]) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed_forward in self.layers:  # type: ignore[misc]
            x = attention(x) + x
            x = feed_forward(x) + x
        return x


class Backwards(nn.Module):
    """Children registered in another order than they run; the norm applied last, over a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(12, 8)
        self.first = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.second(torch.relu(self.first(x))))


class Layer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = mlp
        self.ln = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(self.ln(x))


def stack(mlp: nn.Module | None = None) -> nn.Module:
    """One layer in a model whose root is not a layer itself, as CLIP's first release is written."""
    return drawn(
        nn.Sequential(Layer(mlp or nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))), nn.Linear(8, 3))
    )
