"""What is compared on a decoder layer of Llama's shape with a pair on all seven Linears: ours, peft, and two orders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import peftkit
from benchmarks.kernels import baselines
from benchmarks.kernels.candidates import Bound, Candidate
from benchmarks.kernels.cases import SCALE, Case

FROZEN = "the layer, frozen"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTH = 2048  # tokens of a sequence


@dataclass(frozen=True)
class LayerOperands:
    """x and dy: (sequences tokens width); positions: cos and sin; weights: of the layer, which all candidates share."""

    x: Tensor
    dy: Tensor
    positions: tuple[Tensor, Tensor]
    weights: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.x, self.dy, *self.weights.values()))


def draw(case: Case, device: torch.device) -> LayerOperands:
    """One set of operands: heads of 128 or fewer, and four times fewer keys, as Llama 3 has them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    length = min(LENGTH, case.tokens)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=case.dtype, device=device)

    x = randn(case.tokens // length, length, case.fan_in).requires_grad_()
    positions = LlamaRotaryEmbedding(_config(case)).to(device)(x.detach(), torch.arange(length, device=device)[None])
    weights = {name: randn(*t.shape).div_(t.shape[-1] ** 0.5) for name, t in _layer(case).state_dict().items()}
    return LayerOperands(x, randn(*x.shape), positions, weights)


def candidates(case: Case, device: torch.device, compiled: bool = False) -> list[Candidate]:
    """The frozen layer first; none is compiled."""

    def adapted(name: str, adapt: Callable[[nn.Module], Any], target: float | None = None) -> Candidate:
        return Candidate(name, lambda o: _bound(case, o, adapt), None, target)

    found = [
        adapted(FROZEN, lambda _: None),
        adapted("peftkit, LoRA", lambda m: _inject(case, m, peftkit.LoRAConfig), case.target),
        adapted("peftkit, DoRA", lambda m: _inject(case, m, peftkit.DoRAConfig)),
    ]
    if baselines.HAS_PEFT:
        found.append(adapted("peft, fp32 adapters (its default)", lambda m: _peft(case, m, True)))
        found.append(adapted("peft, adapters of the base's dtype", lambda m: _peft(case, m, False)))
    if not case.dropout:
        found.append(adapted("unsloth's order", _replaced(case, baselines.unsloth_order)))
    found.append(adapted("LoRAFusion's split, not fused", _replaced(case, baselines.split_at_s)))
    return found


def _config(case: Case) -> Any:
    from transformers import LlamaConfig

    heads = max(4, case.fan_in // 128)
    return LlamaConfig(
        hidden_size=case.fan_in, intermediate_size=case.fan_out, num_attention_heads=heads,
        num_key_value_heads=heads // 4, num_hidden_layers=1, attn_implementation="sdpa",
    )  # fmt: skip


def _layer(case: Case) -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    with torch.device("meta"):
        return LlamaDecoderLayer(_config(case), 0).to(case.dtype)


def _bound(case: Case, o: LayerOperands, adapt: Callable[[nn.Module], Any]) -> Bound:
    holder = nn.ModuleDict({"layer": _layer(case)})
    holder["layer"].load_state_dict(o.weights, assign=True)
    holder.requires_grad_(False).train()
    torch.manual_seed(1)
    adapt(holder)
    trained = [p for p in holder.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:  # B starts at zero, and a magnitude at its norm
            p.add_(torch.randn_like(p), alpha=0.01)
    layer: Any = holder["layer"]

    def forward() -> Tensor:
        y = layer(o.x, position_embeddings=o.positions)
        return y[0] if isinstance(y, tuple) else y

    return Bound(forward, (o.x, *trained), tuple(holder.parameters()), o.dy, None)


def _inject(case: Case, holder: nn.Module, config: Any) -> None:
    peftkit.inject(holder, config(r=case.r, alpha=SCALE * case.r, dropout=case.dropout, targets=LINEARS))


def _peft(case: Case, holder: nn.Module, wide: bool) -> None:
    import peft

    config = peft.LoraConfig(
        r=case.r, lora_alpha=SCALE * case.r, lora_dropout=case.dropout, target_modules=list(LINEARS),  # type: ignore[arg-type]
    )  # fmt: skip
    peft.inject_adapter_in_model(config, holder)
    for name, p in holder.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(torch.promote_types(case.dtype, torch.float32) if wide else case.dtype)


class _Ordered(nn.Module):
    """A Linear with a pair, computed by a baseline's function."""

    def __init__(self, linear: nn.Linear, case: Case, function: Callable[..., Tensor]):
        super().__init__()
        self.linear, self.dropout, self.function = linear, case.dropout, function
        device, (n, k) = linear.weight.device, linear.weight.shape
        self.a = nn.Parameter(torch.randn(case.r, k, device=device) / k**0.5)
        self.b = nn.Parameter(torch.zeros(n, case.r, device=device))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = self.function(flat, self.linear.weight, self.linear.bias, self.a, self.b, SCALE, self.dropout)
        return y.view(*x.shape[:-1], -1)


def _replaced(case: Case, function: Callable[..., Tensor]) -> Callable[[nn.Module], None]:
    def adapt(holder: nn.Module) -> None:
        for name, module in list(holder.named_modules()):
            if name.rpartition(".")[2] in LINEARS:
                parent = holder.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], _Ordered(module, case, function))  # type: ignore[arg-type]

    return adapt
