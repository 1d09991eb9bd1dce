"""Times, memory and errors of all candidates on one case, in one process, taking turns."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.candidates import Bound, Candidate, Operands
from benchmarks.kernels.cases import Case
from benchmarks.kernels.kinds import candidates, draw_sets, truth
from benchmarks.measure import saved_bytes

MAX_ROUNDS = 100
MIN_ROUNDS = 5
NAMES = "y", "dX", "dA", "dB", "dm"

Truths = dict[int, list[Tensor]]


@dataclass
class Row:
    """One candidate on one case.

    Attributes:
        case, by: the case, and the candidate's name.
        way: of `choice.WAYS`, where the chooser may choose it.
        tokens, fan_in, fan_out, r, dtype, dropout: the case in numbers.
        forward_ms, backward_ms, both_ms: medians, of eager calls.
        graph_ms: forward and backward, replayed from a CUDA graph; None where there is none.
        no_graph: why it could not be captured.
        timed_by: what `overhead` comes from.
        rounds: how often each was timed, on every set of operands.
        overhead: of forward and backward, as a share of the base's.
        eager_overhead, forward_overhead, backward_overhead: the same of eager calls.
        target, met: the most that was asked of ours, and whether it was kept.
        kind: of the case.
        errors: of `NAMES`, relative to fp64 in the root mean square; empty where the mask is another's.
        saved_mib: kept for backward, beside weights and adapters; None where counting would compile anew.
        peak_mib: allocated at most in a step, beside what was there before; None on a CPU.
        failed: why there are no figures.
    """

    case: str
    by: str
    way: str | None
    tokens: int
    fan_in: int
    fan_out: int
    r: int
    dtype: str
    dropout: float
    forward_ms: float | None = None
    backward_ms: float | None = None
    both_ms: float | None = None
    graph_ms: float | None = None
    no_graph: str | None = None
    timed_by: str = ""
    rounds: int = 0
    overhead: float | None = None
    eager_overhead: float | None = None
    forward_overhead: float | None = None
    backward_overhead: float | None = None
    target: float | None = None
    met: bool | None = None
    kind: str = "lora"
    errors: dict[str, float] = field(default_factory=dict)
    saved_mib: float | None = None
    peak_mib: float | None = None
    failed: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(case: Case, device: torch.device, seconds: float, compiled: bool = False) -> list[Row]:
    """Every candidate on one case, the base first; `seconds` is for timing alone.

    A candidate that fails has a row that says so, and the others go on.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()  # it keeps few shapes of one function
    sets = draw_sets(case, device)
    rows: dict[str, Row] = {}
    truths: Truths = {}
    bounds: dict[str, list[Bound]] = {}
    for candidate in candidates(case, device, compiled):
        rows[candidate.name] = row = _row(case, candidate)
        try:
            bound = [candidate.bind(operands) for operands in sets]
            _examine(row, candidate, case, sets[0], bound[0], truths)
            for b in bound:
                b.step()
            _settle(device)
            bounds[candidate.name] = bound
        except Exception as error:
            row.failed = _line(error)

    truths.clear()  # fp64 is large
    times, rounds = timed(bounds, device, seconds / 2)
    for name, (forward, backward, both) in times.items():
        row = rows[name]
        row.forward_ms, row.backward_ms, row.both_ms, row.rounds = forward, backward, both, rounds
    if device.type == "cuda":
        replays, refusals = replayed(bounds, device, seconds / 2)
        for name in bounds:
            rows[name].graph_ms, rows[name].no_graph = replays.get(name), refusals.get(name)
    found = list(rows.values())
    compare(found, "CUDA events" if device.type == "cuda" else "clock")
    return found


def compare(rows: list[Row], clock: str) -> None:
    """Overheads over the base, which is the first row, and whether targets were met."""
    base = rows[0]
    for row in rows:
        if row.both_ms is None or base.both_ms is None:
            continue
        assert row.forward_ms and row.backward_ms and base.forward_ms and base.backward_ms
        row.forward_overhead = row.forward_ms / base.forward_ms - 1
        row.backward_overhead = row.backward_ms / base.backward_ms - 1
        row.eager_overhead = row.both_ms / base.both_ms - 1
        row.overhead, row.timed_by = row.eager_overhead, clock
        if row.graph_ms is not None and base.graph_ms is not None:
            row.overhead, row.timed_by = row.graph_ms / base.graph_ms - 1, "CUDA graph"
        row.met = None if row.target is None else row.overhead <= row.target


# -- times ----------------------------------------------------------------------------------------------------------------


def timed(
    bounds: Mapping[str, list[Bound]], device: torch.device, seconds: float
) -> tuple[dict[str, tuple[float, float, float]], int]:
    """Median milliseconds of forward, backward and both, in eager calls; and rounds."""
    mark, between = clock(device)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in bounds}

    def turn(name: str) -> Callable[[], None]:
        marks = []
        for bound in bounds[name]:
            start = mark()
            y = bound.forward()
            middle = mark()
            bound.gradients(y)
            marks.append((start, middle, mark()))

        def read() -> None:
            found[name].extend((between(a, b), between(b, c), between(a, c)) for a, b, c in marks)

        return read

    rounds = take_turns(list(bounds), turn, device, seconds)
    medians = {
        name: (statistics.median(f), statistics.median(b), statistics.median(both))
        for name, (f, b, both) in ((name, zip(*times, strict=True)) for name, times in found.items())
    }
    return medians, rounds


def replayed(
    bounds: Mapping[str, list[Bound]], device: torch.device, seconds: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds of forward and backward from CUDA graphs; and why others cannot be captured."""
    pool = torch.cuda.graph_pool_handle()
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    refusals: dict[str, str] = {}
    for name, bound in bounds.items():
        try:
            graphs[name] = _captured(bound, pool)
        except RuntimeError as error:
            refusals[name] = _line(error)
            _settle(device)
            pool = torch.cuda.graph_pool_handle()  # what is left of the other is not to be trusted
    mark, between = clock(device)
    found: dict[str, list[float]] = {name: [] for name in graphs}

    def turn(name: str) -> Callable[[], None]:
        start = mark()
        graphs[name].replay()
        end = mark()
        return lambda: found[name].append(between(start, end) / len(bounds[name]))

    take_turns(list(graphs), turn, device, seconds)
    return {name: statistics.median(times) for name, times in found.items()}, refusals


def _captured(bounds: list[Bound], pool: Any) -> torch.cuda.CUDAGraph:
    """One step on each set of operands. Nobody reads what graphs make, so that they may share memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for bound in bounds:
            bound.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for bound in bounds:
            bound.step()
    return graph


def take_turns(
    names: list[str], turn: Callable[[str], Callable[[], None]], device: torch.device, seconds: float
) -> int:
    """Gives everyone a turn in each round, in an order drawn anew, until time is up; the first round is not kept.

    `turn` starts the work; what it returns reads the clock once the device is done.
    """
    order = random.Random(0)
    names = list(names)
    was_enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()  # a collection between rounds then looks at what the rounds made, and is short
    try:
        for name in names:
            turn(name)
        end = time.perf_counter() + seconds
        done = 0
        while names and done < MAX_ROUNDS and (done < MIN_ROUNDS or time.perf_counter() < end):
            order.shuffle(names)
            _settle(device)
            if device.type == "cuda":
                torch.cuda._sleep(10_000_000)  # some milliseconds, for launches to run ahead of the device
            reads = [turn(name) for name in names]
            _settle(device)
            for read in reads:
                read()
            done += 1
            if done % 10 == 0:
                gc.collect()
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
    return done


def clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """What marks a moment, and the milliseconds between two."""
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: (end - start) * 1e3

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark, lambda start, end: start.elapsed_time(end)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- errors and memory ----------------------------------------------------------------------------------------------------


def errors(case: Case, operands: Operands, bound: Bound, truths: Truths) -> dict[str, float]:
    """Of `NAMES`, as far as there are such, against fp64 from the same numbers and mask; none where the mask is another's.

    truths: by A, of these operands, for the next candidate.
    """
    if bound.seeded is None:
        return {}
    with torch.enable_grad():
        y = bound.seeded()
        found = [y, *bound.gradients(y)]
    key = id(bound.trained[1])
    if key not in truths:
        truths[key] = _truth(case, operands, bound.trained)
    return {
        name: ((f.double() - t).norm() / t.norm()).item()
        for name, f, t in zip(NAMES, found, truths[key][1:], strict=False)
    }


def _truth(case: Case, operands: Operands, trained: tuple[Tensor, ...]) -> list[Tensor]:
    """A, which lives as long as its id is a key; y and the gradients of `trained` in fp64."""
    exact = [t.detach().double().requires_grad_() for t in trained]
    with torch.enable_grad():
        y = truth(case, operands, exact)
    return [trained[1], y.detach(), *torch.autograd.grad(y, exact, operands.dy.double())]


def _peak_bytes(bound: Bound, device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    bound.step()
    return torch.cuda.max_memory_allocated(device) - before


def _examine(row: Row, candidate: Candidate, case: Case, operands: Operands, bound: Bound, truths: Truths) -> None:
    bound.step()
    if not candidate.compiled:
        row.saved_mib = saved_bytes(bound.forward, bound.kept) / 2**20
    if operands.x.is_cuda:
        row.peak_mib = _peak_bytes(bound, operands.x.device) / 2**20
    row.errors = errors(case, operands, bound, truths)


def _row(case: Case, candidate: Candidate) -> Row:
    return Row(
        str(case), candidate.name, candidate.way, case.tokens, case.fan_in, case.fan_out, case.r,
        str(case.dtype).removeprefix("torch."), case.dropout, target=candidate.target, kind=case.kind,
    )  # fmt: skip


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
