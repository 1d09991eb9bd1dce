"""What is compared on one case: the frozen base, every way of `lora_linear` that can run here, and the baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.kernels import baselines
from benchmarks.kernels.cases import SCALE, Case
from peftkit.kernels import augmented, choice
from peftkit.kernels.lora_linear import lora_linear, reference

BASE = "F.linear, frozen"


@dataclass(frozen=True)
class Operands:
    """Random numbers for one case; a and b are fp32 Parameters, x asks for a gradient."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    a: nn.Parameter
    b: nn.Parameter
    seed: Tensor

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.x, self.dy, self.weight))


@dataclass(frozen=True)
class Bound:
    """A candidate on one set of operands.

    Attributes:
        forward: makes y.
        trained: x, and A and B where there are any.
        kept: what a model holds anyway, and is not saved for backward.
        dy: the gradient of y.
        seeded: makes y with the mask that the operands' seed draws, as fp64 can; None where the mask is another's.
    """

    forward: Callable[[], Tensor]
    trained: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    dy: Tensor
    seeded: Callable[[], Tensor] | None

    def gradients(self, y: Tensor) -> tuple[Tensor, ...]:
        """Those of `trained`; nothing is accumulated, so there is nothing to reset."""
        return torch.autograd.grad(y, self.trained, self.dy)

    def step(self) -> None:
        """Forward and backward."""
        self.gradients(self.forward())


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    Attributes:
        name: in the table.
        bind: takes operands, and makes what is called again and again.
        way: of `choice.WAYS`, for those that the chooser may choose.
        target: the most that is asked of it, over the base.
        compiled: whether torch.compile made it.
    """

    name: str
    bind: Callable[[Operands], Bound]
    way: str | None = None
    target: float | None = None
    compiled: bool = False


def draw(case: Case, device: torch.device) -> Operands:
    """One set of operands, in which no product vanishes or overflows."""

    def randn(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    return Operands(
        randn(case.tokens, case.fan_in).requires_grad_(),
        randn(case.tokens, case.fan_out),
        randn(case.fan_out, case.fan_in).div_(case.fan_in**0.5),
        randn(case.fan_out) if case.bias else None,
        nn.Parameter(randn(case.r, case.fan_in, dtype=torch.float32).div_(case.fan_in**0.5)),
        nn.Parameter(randn(case.fan_out, case.r, dtype=torch.float32).div_(case.r**0.5)),
        torch.randint(2**63 - 1, (1,), device=device),
    )


def candidates(case: Case, device: torch.device, compiled: bool = False) -> list[Candidate]:
    """The base first; `compiled` adds the one that torch.compile makes."""
    found = [Candidate(BASE, lambda o: _bound(baselines.base, case, o, adapted=False)), *ours(case, device)]
    if baselines.HAS_PEFT:
        found.append(Candidate("peft, fp32 adapters (its default)", lambda o: _peft(case, o, o.a, o.b)))
        if case.dtype is not torch.float32:
            found.append(Candidate("peft, adapters of the base's dtype", lambda o: _peft(case, o, *narrow(case, o))))
    if not case.dropout:
        found.append(Candidate("unsloth's order", lambda o: _bound(baselines.unsloth_order, case, o)))
    found.append(Candidate("LoRAFusion's split, not fused", lambda o: _bound(baselines.split_at_s, case, o)))
    if compiled:
        function = baselines.compiled()
        found.append(Candidate("torch.compile of plain torch", lambda o: _bound(function, case, o), compiled=True))
    return found


def truth(case: Case, o: Operands, exact: list[Tensor]) -> Tensor:
    """y of x, A and B in fp64, with the operands' mask."""
    x, a, b = exact
    bias = None if o.bias is None else o.bias.double()
    return reference(x, o.weight.double(), bias, a, b, SCALE, case.dropout, o.seed)


def ours(case: Case, device: torch.device) -> list[Candidate]:
    """`lora_linear` by each way that can run here, and by the augmented one over a base that owns the room."""
    ways = ["torch"] if choice.why_not_triton(device, case.dtype, case.r) else list(choice.WAYS)
    found = [_ours(way, case) for way in ways]
    if "augmented" in ways:
        found.append(_ours("augmented", case, roomy=True))
    return found


def _ours(way: str, case: Case, roomy: bool = False) -> Candidate:
    def bind(o: Operands) -> Bound:
        weight = augmented.with_room(o.weight, case.r) if roomy else o.weight

        def forward(seed: Tensor | None = None) -> Tensor:
            return lora_linear(o.x, weight, o.bias, o.a, o.b, SCALE, case.dropout, seed=seed, way=way)

        # timed as it is trained: with a seed of its own drawing
        return Bound(forward, (o.x, o.a, o.b), held(o, weight), o.dy, lambda: forward(o.seed))

    # a base with room is its owner's to make, so the chooser cannot count on it
    name = f"lora_linear, {way}" + (", base with room" if roomy else "")
    return Candidate(name, bind, None if roomy else way, case.target)


def _bound(function: Callable[..., Tensor], case: Case, o: Operands, adapted: bool = True) -> Bound:
    def forward() -> Tensor:
        return function(o.x, o.weight, o.bias, o.a, o.b, SCALE, case.dropout)

    seeded = forward if adapted and not case.dropout else None
    return Bound(forward, (o.x, o.a, o.b) if adapted else (o.x,), held(o, o.weight), o.dy, seeded)


def _peft(case: Case, o: Operands, a: nn.Parameter, b: nn.Parameter) -> Bound:
    layer = baselines.peft_layer(o.weight, o.bias, a, b, SCALE, case.dropout)

    def forward() -> Tensor:
        return layer(o.x)

    return Bound(forward, (o.x, a, b), (*held(o, o.weight), a, b), o.dy, None if case.dropout else forward)


def narrow(case: Case, o: Operands) -> tuple[nn.Parameter, nn.Parameter]:
    """The pair in the dtype of the base."""
    return nn.Parameter(o.a.detach().to(case.dtype)), nn.Parameter(o.b.detach().to(case.dtype))


def held(o: Operands, weight: Tensor) -> tuple[Tensor, ...]:
    """What a model holds anyway."""
    return tuple(t for t in (weight, o.bias, o.a, o.b, o.seed) if t is not None)
