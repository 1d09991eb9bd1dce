"""What is compared on one DoRA linear: the frozen base, ours with the norm computed and kept, plain torch, and peft."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.kernels import baselines
from benchmarks.kernels import candidates as lora
from benchmarks.kernels.candidates import BASE, Bound, Candidate, Operands
from benchmarks.kernels.cases import SCALE, Case
from peftkit.kernels import choice
from peftkit.kernels.dora_linear import dora_linear, reference
from peftkit.kernels.dora_norm import reference as norms
from peftkit.kernels.row_norms import row_norms

COMPUTED = 5 / 3  # times the target, where the norm is computed at every step: 20 % for 12 %


@dataclass(frozen=True)
class DoraOperands(Operands):
    """With a magnitude of every output feature, near the norms of the base's rows."""

    m: nn.Parameter


def draw(case: Case, device: torch.device) -> DoraOperands:
    """One set of operands; B is small, as it is in training."""
    o = lora.draw(case, device)
    with torch.no_grad():
        o.b.mul_(0.1)
    m = torch.linalg.vector_norm(o.weight.float(), dim=1) * (1 + 0.1 * torch.randn(case.fan_out, device=device))
    return DoraOperands(o.x, o.dy, o.weight, o.bias, o.a, o.b, o.seed, nn.Parameter(m))


def candidates(case: Case, device: torch.device, compiled: bool = False) -> list[Candidate]:
    """The base first; none is compiled."""
    ways = ["torch"] if choice.why_not_triton(device, case.dtype, case.r) else list(choice.WAYS)
    found = [Candidate(BASE, lambda o: Bound(lambda: _base(o), (o.x,), _held(o), o.dy, None))]
    for way in ways:
        found += [_ours(case, way, kept=False), _ours(case, way, kept=True)]
    found.append(Candidate("plain torch, dense norm", lambda o: _plain(case, o)))
    if baselines.HAS_PEFT:
        found.append(Candidate("peft, fp32 adapters (its default)", lambda o: _peft(case, o, o.a, o.b)))
        if case.dtype is not torch.float32:
            found.append(
                Candidate("peft, adapters of the base's dtype", lambda o: _peft(case, o, *lora.narrow(case, o)))
            )
    return found


def truth(case: Case, o: DoraOperands, exact: list[Tensor]) -> Tensor:
    """y of x, A, B and m in fp64, with the operands' mask."""
    x, a, b, m = exact
    return _dense(case, x, o.weight.double(), None if o.bias is None else o.bias.double(), a, b, m, o.seed)


def _dense(
    case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, m: Tensor, seed: Tensor | None
) -> Tensor:
    """y by the dense formula, the norm a constant."""
    gain = m / norms(weight, a.detach(), b.detach(), SCALE)
    return reference(x, weight, bias, gain, a, b, SCALE, case.dropout, seed)


def _base(o: DoraOperands) -> Tensor:
    return baselines.base(o.x, o.weight, o.bias, o.a, o.b, SCALE)


def _held(o: DoraOperands) -> tuple[Tensor, ...]:
    return *lora.held(o, o.weight), o.m


def _ours(case: Case, way: str, kept: bool) -> Candidate:
    def bind(o: DoraOperands) -> Bound:
        held = row_norms(o.weight, o.a, o.b, SCALE)[0]

        def forward(seed: Tensor | None = None) -> Tensor:
            n = held if kept else row_norms(o.weight, o.a, o.b, SCALE)[0]
            return dora_linear(o.x, o.weight, o.bias, o.m / n, o.a, o.b, SCALE, case.dropout, seed=seed, way=way)

        return Bound(forward, (o.x, o.a, o.b, o.m), (*_held(o), held), o.dy, lambda: forward(o.seed))

    target = case.target if kept or case.target is None else COMPUTED * case.target
    # the way is chosen with the norm kept: what that costs is the same in all
    return Candidate(f"dora_linear, {way}" + (", norm kept" if kept else ""), bind, way if kept else None, target)


def _plain(case: Case, o: DoraOperands) -> Bound:
    def forward() -> Tensor:
        return _dense(case, o.x, o.weight, o.bias, o.a, o.b, o.m, None)

    return Bound(forward, (o.x, o.a, o.b, o.m), _held(o), o.dy, None if case.dropout else forward)


def _peft(case: Case, o: DoraOperands, a: nn.Parameter, b: nn.Parameter) -> Bound:
    m = nn.Parameter(o.m.detach().to(a.dtype))
    layer = baselines.peft_layer(o.weight, o.bias, a, b, SCALE, case.dropout, magnitude=m)

    def forward() -> Tensor:
        return layer(o.x)

    return Bound(forward, (o.x, a, b, m), _held(o), o.dy, None if case.dropout else forward)
