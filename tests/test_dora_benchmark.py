"""The benchmark of DoRA's kernels, of its norm and of a whole layer, on a CPU and in sizes of no meaning."""

import functools

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks import siblings
from benchmarks.kernels import layer, measure, norms, report
from benchmarks.kernels.candidates import BASE
from benchmarks.kernels.cases import GPU, SMALL_OTHERS
from benchmarks.kernels.kinds import candidates, draw_sets, truth
from peftkit.kernels import choice

CPU = torch.device("cpu")
PLAIN, DROPPED, LAYER = SMALL_OTHERS


@functools.cache
def measured(case):
    return tuple(measure.measure(case, CPU, 0.1))


@pytest.mark.parametrize("case", [PLAIN, DROPPED], ids=str)
def test_every_candidate_has_a_row_and_computes_the_same(case):
    rows = measured(case)
    expected = [BASE, "dora_linear, torch", "dora_linear, torch, norm kept", "plain torch, dense norm"]
    assert [row.by for row in rows] == [*expected, "peft, fp32 adapters (its default)"]
    for row in rows:
        assert row.failed is None and row.kind == "dora" and row.both_ms > 0
        own_mask = case.dropout and not row.by.startswith("dora_linear")
        assert list(row.errors) == ([] if row.by == BASE or own_mask else list(measure.NAMES))
        assert all(0 < error < 1e-6 for error in row.errors.values()), row


def test_a_norm_at_every_step_may_cost_more_than_one_that_is_kept():
    case = GPU[4]
    assert case.kind == "dora" and case.target == 0.12
    targets = {c.name: c.target for c in candidates(case, CPU)}
    assert targets["dora_linear, torch"] == pytest.approx(0.20) and targets["dora_linear, torch, norm kept"] == 0.12


def test_a_wrong_magnitude_has_an_error():
    o = draw_sets(PLAIN, CPU)[0]
    bound = next(c for c in candidates(PLAIN, CPU) if c.way).bind(o)
    exact = [t.detach().double().requires_grad_() for t in bound.trained]
    y = truth(PLAIN, o, exact)
    gradients = torch.autograd.grad(y, exact, o.dy.double())
    assert gradients[3].norm() > 0
    for found, true in zip(bound.gradients(bound.forward()), gradients, strict=True):
        assert (found - true).norm() <= 1e-5 * true.norm()
    with torch.no_grad():
        o.m.mul_(2)
    assert (bound.forward() - y).norm() > 0.5 * y.norm()


def test_bytes_saved_are_x_and_s_and_z():
    saved = {row.by: row.saved_mib * 2**20 for row in measured(PLAIN) if row.saved_mib is not None}
    x, z, s, n = 64 * 48 * 4, 64 * 40 * 4, 64 * 4 * 4, 40 * 4  # the gain, and the norm that m is divided by
    assert saved["dora_linear, torch"] in (x + z + s + n, x + z + s + 2 * n)
    assert saved["peft, fp32 adapters (its default)"] > x + 2 * z


def test_the_ways_of_dora_are_chosen_apart(monkeypatch):
    rows = [*measured(PLAIN), *measured(DROPPED)]
    assert [(e["gained"], e["dropout"], e["way"]) for e in report.chosen(rows)] == [
        (True, 0.0, "torch"),
        (True, 0.1, "torch"),
    ]
    shape = dict(tokens=64, fan_in=48, fan_out=40, r=4, dropout=0.0)
    both = [{**shape, "gained": True, "way": "epilogue"}, {**shape, "way": "augmented"}]
    for table, expected in (
        (both, ("augmented", "epilogue")),
        (both[1:], ("augmented",) * 2),
        (both[:1], ("epilogue",) * 2),
    ):
        monkeypatch.setattr(choice, "table", lambda table=table: {"chip": table})
        choice._nearest.cache_clear()
        assert tuple(choice._nearest("chip", (64, 48, 40, 4), False, gained) for gained in (False, True)) == expected
    choice._nearest.cache_clear()


def test_a_layer_is_the_same_function_in_every_order():
    o = draw_sets(LAYER, CPU)[0]
    found = {c.name: c.bind(o) for c in candidates(LAYER, CPU)}
    base = found.pop(layer.FROZEN)
    assert len(base.trained) == 1
    assert set(found) >= {"peftkit, LoRA", "peftkit, DoRA", "unsloth's order", "LoRAFusion's split, not fused"}
    y = base.forward()
    for name, bound in found.items():
        count = 21 if name == "peftkit, DoRA" else 14  # a pair, and a magnitude, on each of seven Linears
        assert len(bound.trained) == 1 + count, name
        assert 0 < (bound.forward() - y).norm() < 0.5 * y.norm(), name
        assert all(g.norm() > 0 for g in bound.gradients(bound.forward())), name
        with torch.no_grad():
            for p in bound.trained[1:]:
                if p.dim() == 2:
                    p.zero_()
        if name != "peftkit, DoRA":
            torch.testing.assert_close(bound.forward(), y)


def test_the_frozen_layer_is_what_the_others_are_over():
    rows = measured(LAYER)
    assert rows[0].by == layer.FROZEN and rows[0].overhead == 0
    assert all(row.failed is None and row.overhead > -1 for row in rows)
    assert [row.target for row in rows if row.target] == [10.0] and rows[1].by == "peftkit, LoRA"
    assert report.table(list(rows), "").row_count == len(rows) + 1


def test_norms_are_compared_with_one_read_of_the_weight():
    rows = norms.measure(CPU, 0.2)
    assert [row.by for row in rows] == [norms.READ, "peftkit", "dense W + s·BA", "factored", "peft"]
    assert rows[0].over_read == 1 and rows[0].error is None and rows[-1].under_peft == 1
    for row in rows[1:]:
        assert row.failed is None and row.over_read > 1 and 0 < row.error < 1e-5
    assert report.norm_table(rows).row_count == 5


def test_siblings_that_share_compute_the_same():
    case = siblings.Case(64, 48, (40, 16, 16), 4, torch.float32)
    o = siblings.draw(case, CPU)
    for apart, shared in zip(o.apart(), o.shared(), strict=True):
        torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-4)
    row = siblings.measure(case, CPU, 2)
    assert set(row["over"]) == {"apart", "shared"} and row["case"] == "T 64, 48→(40, 16, 16), r 4, float32"
