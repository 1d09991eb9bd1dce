"""Small models that schedules are tried on, and training them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw-amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-1),
    "sgd-momentum": lambda ps: torch.optim.SGD(ps, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "sgd-foreach": lambda ps: torch.optim.SGD(ps, lr=1e-1, momentum=0.9, foreach=True),
    "sgd-fused": lambda ps: torch.optim.SGD(ps, lr=1e-1, momentum=0.9, fused=True),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
}
ADAM = OPTIMIZERS["adamw"]


def llama(layers: int = 6, **changed: Any) -> LlamaForCausalLM:
    """A Llama of no size, the same each time."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
        "pad_token_id": None,
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **(sizes | changed)))


def batch(step: int, vocabulary: int = 40) -> Tensor:
    """Token ids, (3, 8), other ones at each step."""
    return torch.randint(0, vocabulary, (3, 8), generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, step: int) -> None:
    """One batch's gradients."""
    ids = batch(step)
    model(ids, labels=ids).loss.backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], schedule: Any = None) -> None:
    """Optimizer steps on the batches of these numbers."""
    for step in steps:
        backward(model, step)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """The names of the parameters that are no longer those bits."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def of_block(name: str) -> int | None:
    """The block of a Llama's parameter."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def stack(layers: int) -> nn.Module:
    """Blocks and nothing else, and nothing drawn for them."""
    linears = [nn.utils.skip_init(nn.Linear, 2, 2) for _ in range(2 * layers)]
    blocks = (nn.Sequential(*pair) for pair in zip(linears[::2], linears[1::2], strict=True))
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


def adam(model: nn.Module) -> torch.optim.AdamW:
    """Over all parameters."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
