"""Models that peft and peftkit are both put on, and how near their outputs must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

IDS = torch.arange(12).reshape(2, 6) % 29


def bert(seed: int = 0, labels: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=labels)).eval()


def distilbert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=32, dim=16, hidden_dim=24, n_layers=1, n_heads=2, num_labels=3)
    return transformers.DistilBertForSequenceClassification(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config).eval()


def albert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=32,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    return transformers.AlbertModel(config).eval()


def conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.Flatten()
    ).eval()


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(32, 16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        return self.out(h + self.attn(h, h, h)[0])


class Suffixes(nn.Module):
    """`0` is an end of `a.0`, and as a regular expression `h.1.0` means `h.110` too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module("0", nn.Linear(6, 6))
        self.a = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.h = nn.ModuleDict({"1": nn.ModuleList([nn.Linear(6, 6)]), "110": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(getattr(self, "0")(x)).tanh()
        return self.h["110"](self.h["1"][0](x).tanh())


def call(model: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__.removeprefix(
            "Grafted"
        )
        if name.startswith("T5"):
            return model(input_ids=IDS, decoder_input_ids=IDS).logits
        if "Sequential" in name:
            return model(torch.linspace(-1, 1, 2 * 3 * 9 * 9).reshape(2, 3, 9, 9))
        if name == "Suffixes":
            return model(torch.linspace(-1, 1, 12).reshape(2, 6))
        out = model(IDS)
    for key in ("logits", "last_hidden_state"):
        if hasattr(out, key):
            return getattr(out, key)
    return out


def close(a: Tensor, b: Tensor, factor: float = 1.0) -> bool:
    """As near as two orders of summation are, in the dtype; not near by being large."""
    eps = torch.finfo(a.dtype).eps
    return a.dtype == b.dtype and bool(((a - b).abs().max() <= factor * 32 * eps * b.abs().max()).item())
