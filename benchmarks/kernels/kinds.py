"""What a case compares, by its kind: a module with `draw`, `candidates` and, where there is one, `truth`."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch

from benchmarks.kernels import candidates as lora
from benchmarks.kernels import dora, layer
from benchmarks.kernels.candidates import Candidate
from benchmarks.kernels.cases import Case

KINDS: dict[str, ModuleType] = {"lora": lora, "dora": dora, "layer": layer}


def draw_sets(case: Case, device: torch.device) -> list[Any]:
    """As many sets of operands as exceed twice the L2 cache, so that taking turns finds it cold; two at least."""
    draw = KINDS[case.kind].draw
    first = draw(case, device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return [first, *(draw(case, device) for _ in range(max(1, math.ceil(2 * cache / first.bytes) - 1)))]


def candidates(case: Case, device: torch.device, compiled: bool = False) -> list[Candidate]:
    """The base first; `compiled` adds the one that torch.compile makes, where there is one."""
    return KINDS[case.kind].candidates(case, device, compiled)


def truth(case: Case, o: Any, exact: list[torch.Tensor]) -> torch.Tensor:
    """y of what is trained, in fp64."""
    return KINDS[case.kind].truth(case, o, exact)
