"""LISA's state: going on where a run stopped, copies, and its end."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_models import ADAM, OPTIMIZERS, bits, changed, llama, stack, train
from torch import nn

import peftkit
from peftkit import LISA


@pytest.mark.parametrize("kind", ["adamw", "adamw-fused", "sgd-momentum"])
@pytest.mark.parametrize("order", ["schedule first", "optimizer first", "optimizer before the schedule is made"])
@pytest.mark.parametrize("stop", [1, 4, 6, 11])
def test_a_run_goes_on_where_it_stopped_bit_for_bit(kind, order, stop):
    whole = llama()
    optimizer = OPTIMIZERS[kind](whole.parameters())
    lisa = LISA(whole, optimizer, interval=4, seed=2)
    train(whole, optimizer, range(14), lisa)

    first = llama()
    optimizer = OPTIMIZERS[kind](first.parameters())
    lisa = LISA(first, optimizer, interval=4, seed=2)
    train(first, optimizer, range(stop), lisa)
    kept = copy.deepcopy((first.state_dict(), optimizer.state_dict(), json.loads(json.dumps(lisa.state_dict()))))

    again = llama()
    again.load_state_dict(kept[0])
    optimizer = OPTIMIZERS[kind](again.parameters())
    if order == "optimizer before the schedule is made":
        optimizer.load_state_dict(kept[1])
    lisa = LISA(again, optimizer, interval=4, seed=2)
    if order == "schedule first":
        lisa.load_state_dict(kept[2])
    if order != "optimizer before the schedule is made":
        optimizer.load_state_dict(kept[1])
    if order != "schedule first":
        lisa.load_state_dict(kept[2])
    train(again, optimizer, range(stop, 14), lisa)
    assert changed(bits(whole), again) == set()
    assert lisa.state_dict()["switches"] == 4 and lisa.state_dict()["steps"] == 14


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 7),
    share=st.floats(0, 1),
    interval=st.integers(1, 5),
    stop=st.integers(0, 20),
    seed=st.integers(0, 2**40),
)
def test_a_state_gives_back_the_same_draws(layers, share, interval, stop, seed):
    def fresh() -> LISA:
        model = stack(layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return LISA(model, optimizer, round(share * layers), interval, seed)

    one, other = fresh(), fresh()
    for _ in range(stop):
        one.step()
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(12):
        assert one.active == other.active and one.trained == other.trained
        one.step(), other.step()


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    def fresh(model: nn.Module, *args: int, **kwargs: object) -> LISA:
        return LISA(model, ADAM(model.parameters()), *args, **kwargs)  # type: ignore[arg-type]

    lisa = fresh(llama(), interval=2)
    active = lisa.active
    half = peftkit.HalfFineTuning(other := llama(), ADAM(other.parameters()))
    for state, message in [
        (
            fresh(llama(layers=4), interval=2).state_dict(),
            r"another model: 4 blocks \(model.layers.0 … model.layers.3\)",
        ),
        (fresh(llama(hidden_size=32), interval=2).state_dict(), "names or shapes"),
        (fresh(llama(), interval=3).state_dict(), "saved with interval=3, and this one has interval=2"),
        (fresh(llama(), 3, 2).state_dict(), "active_layers=3"),
        (fresh(llama(), 2, 2, 7).state_dict(), "seed=7"),
        (fresh(llama(), interval=2, weights=[1] * 6).state_dict(), "weights="),
        (half.state_dict(), "state of a HalfFineTuning, not of a LISA|lacks 'steps'"),
        ({"steps": 3}, "no state of a LISA"),
        (None, "no state of a LISA"),
    ]:
        with pytest.raises(ValueError, match=message):
            lisa.load_state_dict(state)  # type: ignore[arg-type]
        assert lisa.active == active and lisa.state_dict()["steps"] == 0


def test_closing_gives_the_optimizer_back():
    model = llama()
    optimizer = ADAM(model.parameters())
    lisa = LISA(model, optimizer)
    lisa.close()
    assert not optimizer._optimizer_step_pre_hooks
    train(model, optimizer, range(2))
    assert len(optimizer.state) == len(list(model.parameters()))


def test_after_closing_it_does_nothing_any_more():
    model = llama()
    lisa = LISA(model, ADAM(model.parameters()), interval=1)
    state = lisa.state_dict()
    lisa.close()
    model.lm_head.requires_grad_(False)
    lisa.close()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    for call in (lisa.step, lambda: lisa.load_state_dict(state)):
        with pytest.raises(RuntimeError, match="this LISA was closed"):
            call()


def test_a_second_schedule_waits_until_the_first_is_closed():
    model = llama()
    lisa = LISA(model, ADAM(model.parameters()))
    trained = lisa.trained
    for make in (
        lambda: LISA(model, ADAM(model.parameters())),
        lambda: peftkit.HalfFineTuning(model, ADAM(model.parameters())),
        lambda: peftkit.layerwise_lr(model, 1e-3),
    ):
        with pytest.raises(ValueError, match=r"rests in a LISA that was not closed; close\(\) that one first"):
            make()
        assert lisa.trained == trained
    lisa.close()
    assert len(LISA(model, ADAM(model.parameters()), active_layers=6).trained) == 57


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_model_under_a_schedule_is_known_for_one(how):
    model = llama()
    peftkit.HalfFineTuning(model, ADAM(model.parameters()))
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    with pytest.raises(ValueError, match=r"rests in a HalfFineTuning.*requires_grad_\(True\) where it is gone"):
        LISA(other, ADAM(other.parameters()))
    other.requires_grad_(True)
    other.model.layers[1].requires_grad_(False)  # by the user
    blocks = ["model.layers.0", "model.layers.2"]
    lisa = LISA(other, ADAM(other.parameters()), 2, blocks=blocks)
    assert not any("layers.1." in name for name in lisa.trained)
    lisa.close()
    assert not any("_peftkit_rests" in vars(m) for m in other.modules())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(how):
    model = llama()
    optimizer = OPTIMIZERS["sgd-fused"](model.parameters())
    lisa = LISA(model, optimizer, interval=2)
    train(model, optimizer, range(3), lisa)
    parts = (model, optimizer, lisa)
    other, its, copied = copy.deepcopy(parts) if how == "deepcopy" else pickle.loads(pickle.dumps(parts))
    train(model, optimizer, range(3, 8), lisa)
    assert copied.state_dict()["steps"] == 3
    train(other, its, range(3, 8), copied)
    assert changed(bits(model), other) == set() and lisa.state_dict() == copied.state_dict()
    other.requires_grad_(True)
    with pytest.raises(RuntimeError, match="turned on by something else"):
        its.step()


def test_a_state_is_a_copy_and_one_that_was_meddled_with_is_refused():
    model = llama()
    lisa = LISA(model, ADAM(model.parameters()), interval=2, weights=[1] * 6)
    state = lisa.state_dict()
    state["settings"]["interval"] = 999
    state["settings"]["weights"][0] = 7
    assert lisa.state_dict()["settings"] == {"active_layers": 2, "interval": 2, "seed": 0, "weights": [1.0] * 6}
    good = lisa.state_dict()
    for wrong in (
        {"chosen": [99, 1]}, {"chosen": [1]}, {"chosen": [1, 1]}, {"chosen": "ab"}, {"chosen": None}, {"switches": -1},
        {"steps": 1.5}, {"settings": None},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="no state of a LISA|the state was saved with"):
            lisa.load_state_dict(good | wrong)
        assert lisa.state_dict() == good
