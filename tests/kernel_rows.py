"""Rows of the benchmark of the LoRA kernels: measured on a CPU, and made up."""

import functools

import torch

from benchmarks.kernels import measure
from benchmarks.kernels.cases import SMALL


@functools.cache
def measured() -> tuple[measure.Row, ...]:
    """Of every small case; not to be changed."""
    return tuple(row for case in SMALL for row in measure.measure(case, torch.device("cpu"), 0.1))


def row_of(by, both, graph=None, way=None, target=None, errors=1e-3, **more) -> measure.Row:
    row = measure.Row("one", by, way, 8, 4, 4, 2, "bfloat16", 0.0, target=target, graph_ms=graph, **more)
    row.forward_ms, row.backward_ms, row.both_ms = both / 4, both / 2, both
    row.errors = dict.fromkeys(("y", "dX", "dA", "dB"), errors)
    return row
