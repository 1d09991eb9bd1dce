"""What a case compares, by its kind: operands, candidates, and the truth in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import candidates as lora
from benchmarks.kernels import dora, layer
from benchmarks.kernels.candidates import Candidate
from benchmarks.kernels.cases import SCALE, Case
from peftkit.kernels.lora_linear import reference

_DRAW: dict[str, Any] = {"lora": lora.draw, "dora": dora.draw, "layer": layer.draw}


def draw_sets(case: Case, device: torch.device) -> list[Any]:
    """As many sets of operands as exceed twice the L2 cache, so that taking turns finds it cold; two at least."""
    draw = _DRAW[case.kind]
    first = draw(case, device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return [first, *(draw(case, device) for _ in range(max(1, math.ceil(2 * cache / first.bytes) - 1)))]


def candidates(case: Case, device: torch.device, compiled: bool = False) -> list[Candidate]:
    """The base first; `compiled` adds the one that torch.compile makes, where there is one."""
    if case.kind == "lora":
        return lora.candidates(case, device, compiled)
    return dora.candidates(case, device) if case.kind == "dora" else layer.candidates(case)


def truth(case: Case, o: Any, exact: Sequence[Tensor]) -> Tensor:
    """y of what is trained, in fp64."""
    x, a, b, *m = exact
    weight, bias = o.weight.double(), None if o.bias is None else o.bias.double()
    if m:
        return dora.truth(x, weight, bias, a, b, m[0], case.dropout, o.seed)
    return reference(x, weight, bias, a, b, SCALE, case.dropout, o.seed)
