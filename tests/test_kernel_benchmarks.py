"""The benchmark of the LoRA kernels, on a CPU and in a size of no meaning: what it compares, and what it counts."""

import contextlib
import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("peft")

from kernel_rows import measured, row_of

from benchmarks.kernels import baselines, measure, report
from benchmarks.kernels.candidates import BASE, Candidate, Operands, candidates, draw
from benchmarks.kernels.cases import SCALE, SMALL, Case
from benchmarks.kernels.kinds import draw_sets
from peftkit.kernels import choice
from peftkit.kernels.lora_linear import reference

CPU = torch.device("cpu")
T, K, N, R = 24, 20, 28, 3


def operands(bias=True) -> Operands:
    return draw(Case(T, K, N, R, torch.float64, bias=bias), CPU)


def wide(o: Operands) -> Operands:
    """The pair in fp64 too, so that nothing is rounded."""
    a, b = (torch.nn.Parameter(t.detach().double()) for t in (o.a, o.b))
    return dataclasses.replace(o, a=a, b=b)


def peft_function(x, weight, bias, a, b, scale, dropout=0.0):
    return baselines.peft_layer(weight, bias, a, b, scale, dropout)(x)


FUNCTIONS = {
    "peft": peft_function,
    "unsloth": baselines.unsloth_order,
    "split": baselines.split_at_s,
}


def results(function, o, *rest):
    y = function(o.x, o.weight, o.bias, o.a, o.b, SCALE, *rest)
    return y, *torch.autograd.grad(y, (o.x, o.a, o.b), o.dy)


# -- baselines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_baseline_is_the_reference(name, bias):
    o = wide(operands(bias))
    for found, true in zip(results(FUNCTIONS[name], o), results(reference, o), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_narrow_base_gives_gradients_in_the_dtype_of_the_pair(name):
    o = draw(Case(T, K, N, R, torch.bfloat16), CPU)
    y, dx, da, db = results(FUNCTIONS[name], o)
    assert (y.dtype, dx.dtype, da.dtype, db.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)


def test_the_base_is_the_frozen_linear():
    o = wide(operands())
    y = baselines.base(o.x, o.weight, o.bias, o.a, o.b, SCALE, 0.1)
    torch.testing.assert_close(y, F.linear(o.x, o.weight, o.bias))
    torch.testing.assert_close(torch.autograd.grad(y, o.x, o.dy)[0], o.dy @ o.weight)


def test_the_split_drops_what_torch_drops():
    o = wide(operands())

    def composed(x, weight, bias, a, b, scale, p):
        dropped, _ = torch.native_dropout(x, p, True)
        return F.linear(x, weight, bias) + scale * dropped @ a.t() @ b.t()

    def seeded(function):
        torch.manual_seed(1)
        return results(function, o, 0.3)

    for found, true in zip(seeded(baselines.split_at_s), seeded(composed), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)


def test_unsloths_order_has_no_dropout():
    with pytest.raises(ValueError, match="dropout"):
        results(baselines.unsloth_order, operands(), 0.1)


class Products(TorchDispatchMode):
    """Counts what products cost; torch's own counter leaves those in place out."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.flops += 2 * out.numel() * args[-1].shape[0]
        return out


@pytest.mark.parametrize(
    ("function", "products"),
    [(baselines.unsloth_order, 8), (baselines.split_at_s, 6), (peft_function, 6), (reference, 6)],
)
def test_products_are_as_many_as_the_order_says(function, products):
    o = wide(operands())
    with Products() as counted:
        results(function, o)
    assert counted.flops == 4 * T * N * K + products * T * R * (N + K)


# -- rows -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows():
    return list(measured())


def test_every_candidate_has_a_whole_row(rows):
    expected = [(str(case), c.name) for case in SMALL for c in candidates(case, CPU)]
    assert [(row.case, row.by) for row in rows] == expected
    assert {row.by for row in rows} >= {BASE, "lora_linear, torch", "unsloth's order", "LoRAFusion's split, not fused"}
    for row in rows:
        assert row.failed is None, row
        assert row.rounds >= measure.MIN_ROUNDS
        assert min(row.forward_ms, row.backward_ms) > 0
        assert row.both_ms >= max(row.forward_ms, row.backward_ms)
        assert row.overhead > -1 and row.timed_by == "clock"
        assert (row.target is None) is (row.way is None or row.dropout > 0)
        assert row.met is (None if row.target is None else row.overhead <= row.target)


def test_the_base_is_what_the_others_are_over(rows):
    for row in rows:
        base = next(r for r in rows if r.case == row.case and r.by == BASE)
        assert row.overhead == pytest.approx(row.both_ms / base.both_ms - 1)
        assert row.forward_overhead == pytest.approx(row.forward_ms / base.forward_ms - 1)
        assert row.backward_overhead == pytest.approx(row.backward_ms / base.backward_ms - 1)
        assert (row.overhead == 0) is (row.by == BASE)


def test_errors_are_those_of_rounding(rows):
    for row in rows:
        own_mask = row.dropout > 0 and row.way is None
        assert list(row.errors) == ([] if row.by == BASE or own_mask else ["y", "dX", "dA", "dB"]), row
        assert all(0 < error < 1e-6 for error in row.errors.values()), row


@pytest.mark.parametrize("which", range(4))
def test_a_wrong_result_has_an_error(which):
    case = SMALL[1]
    o = draw(case, CPU)
    bound = next(c for c in candidates(case, CPU) if c.way).bind(o)

    class Off(type(bound)):
        def gradients(self, y):
            return tuple(2 * g if i == which - 1 else g for i, g in enumerate(super().gradients(y)))

    y = (lambda: bound.seeded() * 2) if which == 0 else bound.seeded
    found = measure.errors(case, o, Off(bound.forward, bound.trained, bound.kept, bound.dy, y), {})
    assert found[("y", "dX", "dA", "dB")[which]] > 0.5


def test_saved_bytes_are_counted_once_and_without_the_model(rows):
    def saved(case, by):
        return next(r.saved_mib for r in rows if r.case == str(case) and r.by.startswith(by)) * 2**20

    plain, dropped = SMALL
    x, s, mask = 64 * 48 * 4, 64 * 4 * 4, 64 * 48
    assert saved(plain, "F.linear") == 0
    assert saved(plain, "unsloth") == x  # S is made again
    assert saved(plain, "lora_linear") == saved(plain, "LoRAFusion") == x + s
    assert saved(dropped, "lora_linear") == saved(dropped, "LoRAFusion") == x + s + mask
    assert saved(dropped, "peft") > x + s + mask


def test_graphs_count_where_the_base_and_the_candidate_have_one():
    found = [row_of(BASE, 2.0, 1.0), row_of("a", 3.0, 1.1, target=0.2), row_of("b", 3.0, target=0.2)]
    measure.compare(found, "CUDA events")
    assert [row.timed_by for row in found] == ["CUDA graph", "CUDA graph", "CUDA events"]
    assert [row.overhead for row in found] == pytest.approx([0, 0.1, 0.5])
    assert [row.eager_overhead for row in found] == pytest.approx([0, 0.5, 0.5])
    assert [row.met for row in found] == [None, True, False]

    found = [row_of(BASE, 2.0), row_of("a", 3.0, 1.1)]
    measure.compare(found, "CUDA events")
    assert found[1].timed_by == "CUDA events" and found[1].overhead == pytest.approx(0.5)


def test_the_clock_tells_forward_from_backward():
    class Sleeps:
        def forward(self):
            time.sleep(0.001)

        def gradients(self, y):
            time.sleep(0.004)

    times, rounds = measure.timed({"sleeps": [Sleeps(), Sleeps()]}, CPU, 0.1)
    forward, backward, both = times["sleeps"]
    assert rounds >= measure.MIN_ROUNDS
    assert 1 <= forward < 4 <= backward < both
    assert measure.timed({"sleeps": [Sleeps()]}, CPU, 0.0)[1] == measure.MIN_ROUNDS


class Device:
    """What the benchmark asks of torch.cuda, on a CPU; a step may refuse while it is captured."""

    def __init__(self, monkeypatch):
        self.now = 0.0  # milliseconds
        self.capturing = False
        self.pools = 0
        stream = SimpleNamespace(wait_stream=lambda _: None)
        fakes = dict(
            graph_pool_handle=self.pool, Stream=lambda: stream, current_stream=lambda: stream, graph=self.graph,
            stream=lambda _: contextlib.nullcontext(), synchronize=lambda *_: None, _sleep=lambda _: None,
            CUDAGraph=self.Graph, Event=self.event,
        )  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    class Graph:
        steps = ()

        def replay(self):
            for step in self.steps:
                step()

    def pool(self):
        self.pools += 1
        return self.pools

    @contextlib.contextmanager
    def graph(self, graph, pool):
        self.capturing, self.captured = True, []
        try:
            yield
        finally:
            self.capturing = False
        graph.steps = self.captured

    def event(self, enable_timing):
        event = SimpleNamespace(at=None, elapsed_time=lambda end: end.at - event.at)
        event.record = lambda: setattr(event, "at", self.now)
        return event

    def bound(self, milliseconds, refuses=False):
        def work():
            self.now += milliseconds

        def step():
            if self.capturing and refuses:
                raise RuntimeError("operation not permitted\nwhen stream is capturing")
            self.captured.append(work) if self.capturing else work()

        return SimpleNamespace(step=step)


def test_graphs_are_timed_by_the_step_and_refusals_are_told(monkeypatch):
    device = Device(monkeypatch)
    bounds = {
        "two": [device.bound(2.0), device.bound(4.0)],
        "no": [device.bound(1.0), device.bound(1.0, refuses=True)],
        "one": [device.bound(5.0)],
    }
    times, refusals = measure.replayed(bounds, torch.device("cuda"), 0.01)
    assert times == {"two": pytest.approx(3.0), "one": pytest.approx(5.0)}
    assert refusals == {"no": "RuntimeError: operation not permitted"}
    assert device.pools == 2


def test_a_candidate_that_fails_does_not_stop_the_others(monkeypatch):
    def fails(_):
        raise RuntimeError("no such kernel\nand more")

    found = [*candidates(SMALL[0], CPU)[:2], Candidate("lora_linear, broken", fails, way="epilogue", target=0.1)]
    monkeypatch.setattr(measure, "candidates", lambda *_: found)
    base, ours, broken = measure.measure(SMALL[0], CPU, 0.05)
    assert broken.failed == "RuntimeError: no such kernel"
    assert broken.overhead is None and broken.met is None
    assert ours.overhead is not None
    assert [e["way"] for e in report.chosen([base, ours, broken])] == ["torch"]
    assert report.table([base, ours, broken], "").row_count == 4


def test_every_way_that_can_run_is_compared_and_a_base_with_room_is_not_chosen(monkeypatch):
    monkeypatch.setattr(choice, "why_not_triton", lambda *_: None)
    found = [c for c in candidates(SMALL[0], CPU) if c.target]
    assert [c.way for c in found] == [*choice.WAYS, None]
    assert found[-1].name == "lora_linear, augmented, base with room"


def test_two_sets_take_turns_and_are_not_alike():
    first, second = draw_sets(SMALL[0], CPU)
    assert not torch.equal(first.x, second.x) and not torch.equal(first.weight, second.weight)
    assert all(t.count_nonzero() for t in (first.x, first.dy, first.weight, first.a, first.b))
