"""The row of a result, the sizes to measure in, and the models that are measured."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkit
from benchmarks.measure import interleaved

# One process and one thread, so its CPU time is its time on a machine that nobody else uses.
clock = time.process_time
timed = functools.partial(interleaved, clock=clock)

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: what was measured.
        measured: in `unit`; a ratio where that begins with ×.
        limit: the most that `measured` may be; None where nothing was promised, or not in this size.
        detail: what the figure comes from; seconds, unless the key says otherwise.
    """

    what: str
    measured: float
    unit: str
    limit: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        return None if self.limit is None else self.measured <= self.limit

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True)
class Size:
    """How much to measure. `QUICK` and `FULL` differ in `adapters` alone; limits hold at these sizes.

    Attributes:
        layers, fewer: blocks, of 7 Linears, of the larger and the smaller model of tiny width.
        adapters: how many to attach, and to load, one after the other on the smaller model.
        rounds: of each interleaved measurement; short calls get many times as many.
        width, tokens: of the model whose train step is measured.
        merge_layers, merge_width: of the model that is merged.
        promised: whether the limits hold in this size.
    """

    layers: int = 96
    fewer: int = 24
    adapters: int = 10
    rounds: int = 7
    width: int = 512
    tokens: int = 256
    merge_layers: int = 12
    merge_width: int = 768
    promised: bool = True

    def limit(self, value: float, *, adapters: int | None = None) -> float | None:
        return value if self.promised and (adapters is None or adapters == self.adapters) else None


QUICK = Size()
FULL = Size(adapters=100)
TINY = Size(layers=2, fewer=1, adapters=3, rounds=2, width=32, tokens=8, merge_layers=1, merge_width=32, promised=False)

Group = Callable[[Size], Iterator[Row]]


def llama(layers: int, width: int = 32, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """A Llama, each of one size with the same random weights; 7 Linears a layer beside the output head."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        num_key_value_heads=max(2, width // 64),
        vocab_size=1024 if width > 64 else 64,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def names_of(model: nn.Module) -> list[str]:
    """Full names of the Linears that are adapted."""
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in LINEARS]


def ours(r: Any = 8) -> peftkit.LoRAConfig:
    """The same LoRA as `theirs`."""
    return peftkit.LoRAConfig(r=r, alpha=16, targets=LINEARS)


def theirs(**settings: Any) -> peft.LoraConfig:
    """The same LoRA as `ours`."""
    return peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": list(LINEARS), **settings})


def against(what: str, times: dict[str, float], limit: float | None) -> Row:
    """The row of a measurement that timed `peftkit` and `peft`."""
    return Row(what, times["peftkit"] / times["peft"], "× peft", limit, times)


def train_steps(
    size: Size, dtype: torch.dtype, tokens: int, our_config: peftkit.Config, their_config: peft.PeftConfig
) -> dict[str, float]:
    """Seconds of a step over the same `tokens` embedded tokens, as 4 sequences, that require a gradient.

    frozen: forward and loss of the base, whose weights are frozen, and backward as far as the embedded tokens.
    peftkit, peft: the same with an adapter on all 7 Linears of a layer, its gradients, and a step of AdamW.
    """
    models = {name: llama(4, size.width, dtype=dtype).requires_grad_(False) for name in ("frozen", "peftkit", "peft")}
    peftkit.inject(models["peftkit"], our_config)
    models["peft"] = peft.get_peft_model(models["peft"], their_config)  # type: ignore[arg-type]
    ids = torch.randint(0, 64, (4, tokens // 4))
    embedded = torch.randn(*ids.shape, size.width, dtype=dtype, requires_grad=True)

    def stepping(model: nn.Module) -> Callable[[], Any]:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        model.train()

        def step() -> None:
            embedded.grad = None
            model(inputs_embeds=embedded, labels=ids).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return step

    return timed({name: stepping(model) for name, model in models.items()}, 3 * size.rounds)
