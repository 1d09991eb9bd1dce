"""What Linears that read the same x could share: one S = x [A₁ A₂ …]ᵀ, one dA, one low-rank dX.

`python -m benchmarks.siblings` measures forward and backward of siblings apart, as `lora_linear` computes them, and with
those products shared, both over the frozen base, in turns. It writes `results/siblings-<device>.json`. Sharing here knows
its siblings beforehand: what it would cost to find them, and to prove at every call that x is the same, comes on top.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.kernels.report import environment, result_path
from benchmarks.measure import interleaved, write_result
from peftkit.kernels.lora_linear import lora_linear

SCALE = 2.0


@dataclass(frozen=True)
class Case:
    """Siblings of one x: tokens, in, the outs, rank."""

    tokens: int
    fan_in: int
    outs: tuple[int, ...]
    r: int
    dtype: torch.dtype

    def __str__(self) -> str:
        outs = ", ".join(map(str, self.outs))
        return f"T {self.tokens}, {self.fan_in}→({outs}), r {self.r}, {str(self.dtype).removeprefix('torch.')}"


CPU = tuple(
    Case(*shape, 8, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in (
        (2048, 1024, (1024,) * 3),
        (2048, 1024, (1024, 256, 256)),
        (2048, 1024, (4096, 4096)),
        (512, 512, (512,) * 3),
    )
)
GPU = tuple(Case(8192, 4096, outs, 16, torch.bfloat16) for outs in ((4096, 1024, 1024), (4096,) * 3, (14336, 14336)))


class _Shrink(torch.autograd.Function):
    """S of all siblings in one product, and backward dA and the low-rank part of dX in one each."""

    @staticmethod
    def forward(ctx: Any, x, *pairs):
        low = torch.cat(pairs).to(x.dtype)
        ctx.save_for_backward(x, low)
        ctx.ranks = [a.shape[0] for a in pairs]
        return tuple(s.contiguous() for s in F.linear(x, low).split(ctx.ranks, 1))

    @staticmethod
    def backward(ctx: Any, *ds: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, low = ctx.saved_tensors
        together = torch.cat(ds, 1)
        return together @ low, *(together.t() @ x).split(ctx.ranks)


class _Expand(torch.autograd.Function):
    """x Wᵀ + scale · S Bᵀ, for an S that is made elsewhere."""

    @staticmethod
    def forward(ctx: Any, x, weight, s, b):
        ctx.save_for_backward(weight, s, b)
        return F.linear(x, weight).addmm_(s, b.to(x.dtype).t(), alpha=SCALE)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, s, b = ctx.saved_tensors
        ds = dy.new_empty(len(dy), b.shape[1]).addmm_(dy, b.to(dy.dtype), beta=0, alpha=SCALE)
        return dy @ weight, None, ds, (s.t() @ dy).mul_(SCALE).t().to(b.dtype)


@dataclass(frozen=True)
class Operands:
    """x, and of every sibling W, A, B and dY."""

    x: Tensor
    weights: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    dy: list[Tensor]

    def gradients(self, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, (self.x, *self.a, *self.b), self.dy)

    def frozen(self) -> None:
        torch.autograd.grad([F.linear(self.x, w) for w in self.weights], self.x, self.dy)

    def apart(self) -> tuple[Tensor, ...]:
        each = zip(self.weights, self.a, self.b, strict=True)
        return self.gradients([lora_linear(self.x, w, None, a, b, SCALE) for w, a, b in each])

    def shared(self) -> tuple[Tensor, ...]:
        each = zip(self.weights, _Shrink.apply(self.x, *self.a), self.b, strict=True)  # type: ignore[arg-type]
        return self.gradients([_Expand.apply(self.x, w, s, b) for w, s, b in each])  # type: ignore[misc]


def draw(case: Case, device: torch.device) -> Operands:
    """Random numbers; pairs in the dtype of x."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=case.dtype, device=device)

    k, r = case.fan_in, case.r
    return Operands(
        randn(case.tokens, k).requires_grad_(),
        [randn(n, k) / k**0.5 for n in case.outs],
        [(randn(r, k) / k**0.5).requires_grad_() for _ in case.outs],
        [randn(n, r).requires_grad_() for n in case.outs],
        [randn(case.tokens, n) for n in case.outs],
    )


def measure(case: Case, device: torch.device, rounds: int = 15) -> dict[str, Any]:
    """Milliseconds, and what is over the frozen base as a share of it."""
    o = draw(case, device)

    def settled(run: Any) -> Any:
        def settle() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return settle

    # one thread of one process on a CPU; a GPU's work is not on its clock
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    candidates = {"frozen": settled(o.frozen), "apart": settled(o.apart), "shared": settled(o.shared)}
    times = interleaved(candidates, rounds, clock=clock, inner=10 if device.type == "cuda" else 1)
    over = {name: times[name] / times["frozen"] - 1 for name in ("apart", "shared")}
    shown = {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}
    return {"case": str(case), **shown, "milliseconds": {k: 1e3 * v for k, v in times.items()}, "over": over}


def main() -> None:
    """Measure, print, write."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    rows = [measure(case, device) for case in (GPU if device.type == "cuda" else CPU)]
    table = Table("case", "apart, % over the base", "shared", title="siblings")
    for row in rows:
        table.add_row(row["case"], *(f"{100 * row['over'][k]:.1f}" for k in ("apart", "shared")))
    Console(width=120).print(table)
    write_result(f"siblings-{result_path(environment(device)['device']).stem}", rows)


if __name__ == "__main__":
    main()
