"""The linears of LoRA and DoRA under pytest-benchmark: `pytest benchmarks --benchmark-only`.

Forward and backward, in a group for each case: the frozen base, ours by every way that can run here, and peft's
layer where peft is installed. On a GPU each call waits for the device, and so its launches count too;
`python -m benchmarks.kernels` leaves them out.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.kernels.candidates import BASE, Candidate
from benchmarks.kernels.cases import GPU, MEDIUM, SMALL, SMALL_OTHERS, Case
from benchmarks.kernels.kinds import candidates, draw_sets

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = GPU[:5] if DEVICE.type == "cuda" else (*SMALL, *MEDIUM, *SMALL_OTHERS[:2])
COMPARED = [
    pytest.param(case, candidate, id=f"{case} | {candidate.name}".encode("ascii", "replace").decode())
    for case in CASES
    for candidate in candidates(case, DEVICE)
    if candidate.name == BASE or candidate.name.startswith(("lora_linear", "dora_linear", "peft"))
]


@pytest.mark.parametrize(("case", "candidate"), COMPARED)
def test_step(benchmark: Any, case: Case, candidate: Candidate) -> None:
    """Forward and backward; dX, and dA and dB where there are any."""
    torch.manual_seed(0)
    turns = itertools.cycle([candidate.bind(operands) for operands in draw_sets(case, DEVICE)])

    def step() -> None:
        next(turns).step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    step()  # whatever compiles, compiles now
    benchmark.group = str(case)
    benchmark.name = candidate.name
    benchmark(step)
