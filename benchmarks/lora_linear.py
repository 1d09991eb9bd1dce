"""What one LoRA linear costs over its frozen base: plain F.linear, `lora_linear`, and peft's layer, in turns.

Forward and backward with the base frozen and x needing a gradient, one thread; then a forward pass on one
row, where overhead is all there is. Beside each time: the bytes saved for backward, and errors against fp64
beside those of peft.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import interleaved, saved_bytes, write_result
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from peftkit.kernels.lora_linear import lora_linear, reference

SCALE = 2.0


@dataclass
class Case:
    """A shape: tokens, in, out, rank; its dtype and dropout; whether gradients are asked for."""

    tokens: int
    fan_in: int
    fan_out: int
    r: int
    dtype: torch.dtype
    dropout: float = 0.0
    trains: bool = True

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        what = "fwd+bwd" if self.trains else "fwd"
        shape = f"T {self.tokens}, {self.fan_in}→{self.fan_out}, r {self.r}"
        return f"{shape}, {dtype}, p {self.dropout:g}, {what}"


CASES = [
    Case(2048, 1024, 1024, 8, torch.float32),
    Case(2048, 1024, 1024, 8, torch.float32, 0.1),
    Case(2048, 1024, 1024, 8, torch.bfloat16),
    Case(2048, 1024, 1024, 8, torch.bfloat16, 0.1),
    Case(512, 1024, 4096, 16, torch.bfloat16),
    Case(1, 1024, 1024, 8, torch.float32),
    Case(1, 1024, 1024, 8, torch.bfloat16),
    Case(1, 1024, 1024, 8, torch.float32, trains=False),
    Case(1, 64, 64, 8, torch.float32, trains=False),
]


@dataclass
class Row:
    """One way to compute one case."""

    case: str
    name: str
    milliseconds: float
    ratio: float
    saved_mib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)


def peft_layer(case: Case, linear: nn.Linear, a: Tensor, b: Tensor) -> PeftLinear:
    """peft's own layer around the same base, with adapters of the dtype and values of a and b."""
    config = LoraConfig(r=case.r, lora_alpha=int(SCALE * case.r), lora_dropout=case.dropout)
    layer = PeftLinear(linear, config=config, adapter_name="default", r=case.r, lora_alpha=int(SCALE * case.r))
    layer.lora_A["default"].weight = nn.Parameter(a.detach().clone())
    layer.lora_B["default"].weight = nn.Parameter(b.detach().clone())
    linear.requires_grad_(False)
    return layer


def errors(outputs: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """Relative root-mean-square errors of y, dX, dA and dB."""
    names = ("y", "dX", "dA", "dB")
    return {
        name: ((out.double() - true).norm() / true.norm()).item()
        for name, out, true in zip(names, outputs, truth, strict=True)
    }


def measure(case: Case, rounds: int) -> list[Row]:
    """Every candidate on one case; ratios are over F.linear, or without gradients over nn.Linear's call."""
    torch.manual_seed(0)
    linear = nn.Linear(case.fan_in, case.fan_out, dtype=case.dtype).requires_grad_(False)
    weight, bias = linear.weight, linear.bias
    x = torch.randn(case.tokens, case.fan_in, dtype=case.dtype, requires_grad=case.trains)
    dy = torch.randn(case.tokens, case.fan_out, dtype=case.dtype)
    a = nn.Parameter(torch.randn(case.r, case.fan_in) / case.fan_in**0.5)
    b = nn.Parameter(torch.randn(case.fan_out, case.r))
    low_a, low_b = (nn.Parameter(t.detach().to(case.dtype)) for t in (a, b))

    default = peft_layer(case, linear, a, b)
    forwards: dict[str, Callable[[], Tensor]] = {
        "F.linear": lambda: F.linear(x, weight, bias),
        "nn.Linear": lambda: linear(x),
        "lora_linear, fp32 adapters": lambda: lora_linear(x, weight, bias, a, b, SCALE, case.dropout),
        "peft, fp32 adapters (its default)": lambda: default(x),
    }
    adapters = {"lora_linear, fp32 adapters": (a, b)}
    adapters["peft, fp32 adapters (its default)"] = trained(default)
    if case.dtype is not torch.float32:
        same = peft_layer(case, linear, low_a, low_b)
        forwards["lora_linear, same dtype"] = lambda: lora_linear(x, weight, bias, low_a, low_b, SCALE, case.dropout)
        forwards["peft, same dtype"] = lambda: same(x)
        adapters["lora_linear, same dtype"] = (low_a, low_b)
        adapters["peft, same dtype"] = trained(same)
    everything = [weight, bias, *(tensor for pair in adapters.values() for tensor in pair)]

    def step(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run():
            if not case.trains:
                forward()
                return
            forward().backward(dy)
            for tensor in (x, *everything):
                tensor.grad = None

        return run

    with torch.set_grad_enabled(case.trains):
        inner = max(1, 200_000 // (case.tokens * case.fan_in)) if case.tokens == 1 else 1
        seconds = interleaved({name: step(f) for name, f in forwards.items()}, rounds, inner=inner)

    rows = []
    base = "F.linear" if case.trains else "nn.Linear"
    for name, forward in forwards.items():
        row = Row(str(case), name, seconds[name] * 1e3, seconds[name] / seconds[base])
        if case.trains:
            row.saved_mib = saved_bytes(forward, everything) / 2**20
        if name in adapters and case.trains and not case.dropout:
            row.errors = errors(*with_truth(forward, x, weight, bias, adapters[name], dy))
        rows.append(row)
    return rows


def trained(layer: PeftLinear) -> tuple[Tensor, Tensor]:
    """A and B of a peft layer."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def with_truth(
    forward: Callable[[], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    adapter: tuple[Tensor, Tensor],
    dy: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """The output and gradients of `forward`, and those of fp64 from the same numbers."""
    y = forward()
    exact = [t.detach().double().requires_grad_() for t in (x, *adapter)]
    true = reference(exact[0], weight.double(), bias.double(), exact[1], exact[2], SCALE)
    return (
        [y, *torch.autograd.grad(y, (x, *adapter), dy)],
        [true, *torch.autograd.grad(true, exact, dy.double())],
    )


def main() -> None:
    """Measures, prints, writes `results/lora_linear-cpu.json`."""
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 21
    rows = [row for case in track(CASES, "measuring") for row in measure(case, rounds)]

    table = Table("", "ms", "over base", "saved MiB", "error y", "dX", "dA", "dB", title="LoRA linear, one thread")
    for row in rows:
        if row.name == "F.linear":
            table.add_section()
            table.add_row(f"[bold]{row.case}")
        saved = "" if row.saved_mib is None else f"{row.saved_mib:.2f}"
        table.add_row(
            f"  {row.name}",
            f"{row.milliseconds:.4g}",
            f"{row.ratio:.2f}",
            saved,
            *(f"{row.errors[name]:.1e}" if row.errors else "" for name in ("y", "dX", "dA", "dB")),
        )
    Console(width=130).print(table)
    write_result("lora_linear-cpu", [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
