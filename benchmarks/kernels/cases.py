"""The shapes that are measured, and what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCALE = 2.0


@dataclass(frozen=True)
class Case:
    """One Linear with a pair, or a decoder layer of seven.

    Attributes:
        tokens, fan_in, fan_out, r: the shape.
        dtype: of x and the base; A and B are fp32.
        dropout: the probability, on the input of A.
        target: the most that forward and backward may take over those of the frozen base, as a share of it;
            None where nothing is asked.
        bias: whether the base has one.
        kind: `"lora"`; `"dora"`, whose target is for the norm kept (`dora.COMPUTED` where it is not); or
            `"layer"`, a decoder layer of width `fan_in` whose MLP is `fan_out` wide.
    """

    tokens: int
    fan_in: int
    fan_out: int
    r: int
    dtype: torch.dtype
    dropout: float = 0.0
    target: float | None = None
    bias: bool = False
    kind: str = "lora"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        what = {"lora": "", "dora": "DoRA, ", "layer": "decoder layer, "}[self.kind]
        return f"{what}T {self.tokens}, {self.fan_in}→{self.fan_out}, r {self.r}, {dtype}, p {self.dropout:g}"


# The Linears of Llama-like models; the ones with a target come first, should time run short.
GPU = (
    Case(8192, 4096, 4096, 16, torch.bfloat16, target=0.10),
    Case(8192, 4096, 4096, 16, torch.bfloat16, 0.1, target=0.15),
    Case(8192, 4096, 14336, 16, torch.bfloat16, target=0.06),
    Case(8192, 4096, 4096, 64, torch.bfloat16, target=0.14),
    Case(8192, 4096, 4096, 16, torch.bfloat16, target=0.12, kind="dora"),
    Case(8192, 4096, 14336, 16, torch.bfloat16, target=0.10, kind="layer"),
    Case(8192, 4096, 4096, 16, torch.bfloat16, 0.1, kind="dora"),
    Case(8192, 14336, 4096, 16, torch.bfloat16),
    Case(8192, 4096, 11008, 16, torch.bfloat16),
    Case(8192, 4096, 4096, 8, torch.bfloat16),
)

# Of no meaning as figures: they show that the benchmark runs.
SMALL = (
    Case(64, 48, 40, 4, torch.float32, target=10.0),
    Case(64, 48, 40, 4, torch.float32, 0.1, bias=True),
)
SMALL_OTHERS = (
    Case(64, 48, 40, 4, torch.float32, target=10.0, kind="dora"),
    Case(64, 48, 40, 4, torch.float32, 0.1, bias=True, kind="dora"),
    Case(64, 128, 96, 4, torch.float32, target=10.0, kind="layer"),
)

MEDIUM = (
    Case(512, 512, 512, 8, torch.float32),
    Case(512, 512, 512, 8, torch.float32, 0.1),
)


def for_device(device: torch.device) -> tuple[Case, ...]:
    """The cases that a device is measured on."""
    return GPU if device.type == "cuda" else SMALL + SMALL_OTHERS
