"""Small models of every kind that adapters hang on, with inputs for them. Biases are never zero."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model, what to feed it, and what in it to adapt.

    Attributes:
        name: as it stands in the names of tests.
        make: the model, the same at every call, in eval mode.
        x: an input for it.
        targets: what in it to adapt.
        read: its weights are read without calling their module, so nothing can be dropped from an input there.
        needs: the package that the model comes from, if it is not torch.
    """

    name: str
    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    targets: Any = "all-linear"
    read: bool = False
    needs: str | None = None

    def there(self) -> bool:
        """Whether the package it needs is installed."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    def __str__(self) -> str:
        return self.name


def output(model: nn.Module, x: Tensor) -> Tensor:
    """The one tensor that a model's output is about."""
    y = model(x)
    for name in ("logits", "last_hidden_state"):
        y = getattr(y, name, y)
    return y[0] if isinstance(y, tuple) else y


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew, biases and norms too: what starts at 0 or 1 hides mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(1 + 0.1 * noise if "norm" in name.lower() and name.endswith("weight") else 0.2 * noise)
    return model.eval()


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    """The same without gradients, so that what is trainable takes the same path as what is not."""
    with torch.no_grad():
        return output(model, x)


class Tied(nn.Module):
    """An embedding whose weight is also the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mid = nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.mid(self.embed(ids))))


class Twice(nn.Module):
    """One Linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = self.first
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Attend(nn.Module):
    """Self-attention through `nn.MultiheadAttention`, its in_proj one weight or three."""

    def __init__(self, kdim: int | None = None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=True)
        self.kdim = kdim

    def forward(self, x: Tensor) -> Tensor:
        kv = x if self.kdim is None else x[..., : self.kdim]
        return self.attn(x, kv, kv)[0]


def linear() -> nn.Module:
    """Two Linears."""
    return drawn(nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4)))


def llama(layers: int = 2, **kwargs: Any) -> nn.Module:
    """A decoder; `kwargs` go to its `LlamaConfig`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 31,
    }
    sizes |= {
        "num_hidden_layers": layers,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "attention_bias": True,
    } | kwargs
    return drawn(LlamaForCausalLM(LlamaConfig(**sizes)))


def bert() -> nn.Module:
    """An encoder whose sub-layers end in a norm."""
    from transformers import BertConfig, BertModel

    return drawn(
        BertModel(
            BertConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                vocab_size=31,
                max_position_embeddings=32,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )
    )


def gpt2() -> nn.Module:
    """A decoder whose weights are `(in, out)`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 31, "n_positions": 32}
    return drawn(GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)))


def convolutions() -> nn.Module:
    """With groups, strides, dilation and both kinds of padding."""
    return drawn(
        nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, groups=2, dilation=2, padding="valid"),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1, padding=1, padding_mode="circular"),
        )
    )


def convolution_1d() -> nn.Module:
    """Two `nn.Conv1d`."""
    return drawn(nn.Sequential(nn.Conv1d(3, 4, 3, padding="same"), nn.ReLU(), nn.Conv1d(4, 2, 2)))


def convolution_3d() -> nn.Module:
    """Two `nn.Conv3d`."""
    return drawn(nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 2)))


def encoder() -> nn.Module:
    """torch's own, which reads the weights of its modules."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return drawn(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def ids(high: int = 31) -> Tensor:
    """Tokens below `high`, the same at every call: `(2, 5)`."""
    return torch.randint(1, high, (2, 5), generator=torch.Generator().manual_seed(1))


def numbers(*shape: int) -> Callable[[], Tensor]:
    """What gives normal numbers of this shape, the same at every call."""
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1))


CASES = (
    Case("linear", linear, numbers(3, 6)),
    Case("llama", llama, ids, needs="transformers"),
    Case("bert", bert, ids, needs="transformers"),
    Case("gpt2", gpt2, ids, needs="transformers"),
    Case("shared", lambda: drawn(Twice()), numbers(3, 5)),
    Case("embedding", lambda: drawn(Tied()), lambda: ids(11), targets=["embed", "mid"]),
    Case("conv1d", convolution_1d, numbers(2, 3, 9), targets=["0", "2"]),
    Case("conv2d", convolutions, numbers(2, 2, 9, 9), targets=["0", "2", "4"]),
    Case("conv3d", convolution_3d, numbers(1, 2, 4, 4, 4), targets=["0", "2"]),
    Case("attention", lambda: drawn(Attend()), numbers(2, 5, 8), read=True),
    Case("attention-three", lambda: drawn(Attend(6)), numbers(2, 5, 8), read=True),
    Case("encoder", encoder, numbers(2, 5, 8), read=True),
)
