"""LISA: what it draws, what trains, what the optimizer keeps, and going on where a run stopped."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_models import backward, batch, bits, changed, llama, of_block, train
from torch import nn

import peftkit
from peftkit import LISA, LoRAConfig
from peftkit.targets import TargetError

OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw-amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-1),
    "sgd-momentum": lambda ps: torch.optim.SGD(ps, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "sgd-foreach": lambda ps: torch.optim.SGD(ps, lr=1e-1, momentum=0.9, foreach=True),
    "sgd-fused": lambda ps: torch.optim.SGD(ps, lr=1e-1, momentum=0.9, fused=True),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
}
ADAM = OPTIMIZERS["adamw"]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_rests_keeps_its_bits_and_nothing_else(kind):
    """Over every interval: blocks at rest are bit-equal, all else moves, and only that has gradients and state."""
    model = llama()
    optimizer = OPTIMIZERS[kind](model.parameters())
    lisa = LISA(model, optimizer, active_layers=2, interval=3, seed=1)
    drawn = set()
    for interval in range(6):
        active = {int(name.rpartition(".")[2]) for name in lisa.active}
        assert len(active) == 2
        drawn |= active
        on = {name for name, _ in model.named_parameters() if of_block(name) in active | {None}}
        assert set(lisa.trained) == on
        before = bits(model)
        for step in range(3):
            backward(model, 3 * interval + step)
            assert {name for name, p in model.named_parameters() if p.grad is not None} == on
            optimizer.step()
            if kind != "sgd":
                assert len(optimizer.state) == len(on)
            held = {name for name, p in model.named_parameters() if optimizer.state.get(p)}
            assert held == (set() if kind == "sgd" else on)
            lisa.step()
            optimizer.zero_grad()
        assert changed(before, model) == on
        left = {name for name, p in model.named_parameters() if optimizer.state.get(p)}
        assert left == (set() if kind == "sgd" else on & set(lisa.trained))  # gone with the switch, not a step later
    assert len(drawn) > 2


def test_what_stays_on_keeps_its_moments_and_what_comes_on_starts_with_none():
    model = llama(layers=3)
    optimizer = ADAM(model.parameters())
    lisa = LISA(model, optimizer, active_layers=2, interval=2)
    blocks = {name: p for name, p in model.named_parameters() if name.endswith("q_proj.weight")}
    counts = dict.fromkeys(blocks, 0)
    for step in range(12):
        backward(model, step)
        optimizer.step()
        for name, p in blocks.items():
            on = any(name.startswith(f"{block}.") for block in lisa.active)
            counts[name] = counts[name] + 1 if on else 0
            assert int(optimizer.state[p]["step"]) == counts[name] if on else p not in optimizer.state
        assert int(optimizer.state[model.lm_head.weight]["step"]) == step + 1
        lisa.step()
        optimizer.zero_grad()


def test_it_is_the_algorithm_written_out():
    """Against full fine-tuning of a model in which the blocks at rest were frozen by hand, a new AdamW for what comes on."""
    model, plain = llama(), llama()
    optimizer = ADAM(model.parameters())
    lisa = LISA(model, optimizer, active_layers=2, interval=4, seed=3)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for step in range(16):
        on = set(lisa.trained)
        for name, p in plain.named_parameters():
            p.requires_grad_(name in on)
            p.grad = None
            if name not in on:
                optimizers.pop(name, None)
            elif name not in optimizers:
                optimizers[name] = ADAM([p])
        backward(plain, step)
        for one in optimizers.values():
            one.step()
        train(model, optimizer, [step], lisa)
        assert changed(bits(plain), model) == set()


# -- what is drawn ------------------------------------------------------------------------------------------------------


def stack(layers: int) -> nn.Module:
    """Blocks and nothing else, and nothing drawn for them."""
    linears = [nn.utils.skip_init(nn.Linear, 2, 2) for _ in range(2 * layers)]
    blocks = (nn.Sequential(*pair) for pair in zip(linears[::2], linears[1::2], strict=True))
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


def draws(count: int, layers: int = 6, **settings: object) -> list[tuple[str, ...]]:
    model = stack(layers)
    lisa = LISA(model, torch.optim.SGD(model.parameters(), lr=0.1), interval=1, **settings)  # type: ignore[arg-type]
    found = [lisa.active]
    for _ in range(count - 1):
        lisa.step()
        found.append(lisa.active)
    return found


def test_blocks_are_drawn_uniformly():
    found = Counter(draws(3000, active_layers=2))
    pairs = list(itertools.combinations([f"layers.{i}" for i in range(6)], 2))
    assert set(found) == set(pairs)
    expected = 3000 / len(pairs)
    chi2 = sum((found[pair] - expected) ** 2 / expected for pair in pairs)
    assert chi2 < 36  # 14 degrees of freedom: above this with probability 0.001


def test_draws_follow_the_weights():
    found = Counter(itertools.chain(*draws(3000, layers=4, active_layers=1, weights=[1, 2, 0, 5])))
    assert "layers.2" not in found
    for i, share in ((0, 1 / 8), (1, 2 / 8), (3, 5 / 8)):
        assert abs(found[f"layers.{i}"] / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5


def test_of_weighted_draws_the_second_is_made_of_what_is_left():
    found = Counter(draws(4000, layers=3, active_layers=2, weights=[1, 2, 5]))
    share = 1 / 8 * 2 / 7 + 2 / 8 * 1 / 6  # 0 then 1, or 1 then 0
    assert abs(found["layers.0", "layers.1"] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_a_seed_is_a_sequence_of_its_own_and_nobody_else_s():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    following = [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]  # noqa: NPY002
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    first = draws(30, active_layers=3, seed=5)
    assert [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()] == following  # noqa: NPY002
    assert draws(30, active_layers=3, seed=5) == first != draws(30, active_layers=3, seed=6)


def test_none_and_all_of_the_blocks():
    model = llama(layers=3)
    lisa = LISA(model, ADAM(model.parameters()), active_layers=0)
    assert lisa.active == () and set(lisa.trained) == {n for n, _ in model.named_parameters() if of_block(n) is None}
    lisa.close()
    assert all(p.requires_grad for p in model.parameters())
    assert len(LISA(model, ADAM(model.parameters()), active_layers=3).trained) == len(list(model.parameters()))


# -- going on -----------------------------------------------------------------------------------------------------------


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


# -- with adapters ------------------------------------------------------------------------------------------------------


def test_adapters_train_on_beside_it_and_come_off_again():
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)  # by the user, so it stays
    peftkit.inject(model, LoRAConfig(r=2))
    adapter = {name for name, _ in model.named_parameters() if ".peftkit." in name}
    optimizer = ADAM(model.parameters())
    lisa = LISA(model, optimizer, active_layers=1, interval=2)
    for step in range(0, 8, 2):
        before, active = bits(model), lisa.active
        train(model, optimizer, [step, step + 1], lisa)
        moved = changed(before, model)
        assert {n for n in moved if ".peftkit." in n} == adapter
        expected = {n for n in before if of_block(n) is None or f"model.layers.{of_block(n)}" in active}
        assert moved - adapter == {n for n in expected if ".peftkit." not in n} - {"model.embed_tokens.weight"}
    lisa.close()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, _ in model.named_parameters() if n in adapter
    ]
    peftkit.eject(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]


def test_a_merged_adapter_is_refused():
    model = llama()
    peftkit.inject(model, LoRAConfig(r=2))
    optimizer = ADAM(model.parameters())
    lisa = LISA(model, optimizer)
    peftkit.merge(model)
    with pytest.raises(RuntimeError, match=r"'default' is merged.*unmerge\(model\)"):
        lisa.step()
    lisa.close()
    with pytest.raises(RuntimeError, match="'default' is merged"):
        LISA(model, optimizer)


# -- accumulation, scaling ----------------------------------------------------------------------------------------------


def test_accumulated_gradients_are_those_of_the_whole_batch():
    models = []
    for parts in (1, 3):
        model = llama().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        lisa = LISA(model, optimizer, interval=2)
        for step in range(8):
            ids = batch(step)
            for rows in ids.chunk(parts):
                (model(rows, labels=rows).loss / parts).backward()
            optimizer.step()
            lisa.step()
            optimizer.zero_grad()
        models.append(model)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-11), name


def test_gradients_that_were_not_set_to_none_do_not_move_what_rests():
    model = llama()
    optimizer = ADAM(model.parameters())
    backward(model, 0)  # of a run before
    lisa = LISA(model, optimizer, interval=1)
    for step in range(5):
        before, on = bits(model), set(lisa.trained)
        optimizer.zero_grad(set_to_none=False)
        backward(model, step)
        optimizer.step()
        assert changed(before, model) == on
        lisa.step()


def test_with_a_gradient_scaler_and_a_step_that_overflows():
    model = llama()
    optimizer = ADAM(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    lisa = LISA(model, optimizer, interval=2)
    for step in range(10):
        before, on = bits(model), set(lisa.trained)
        ids = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        scaler.scale(loss * (float("inf") if step == 5 else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=False)
        scaler.step(optimizer)
        scaler.update()
        assert changed(before, model) == (set() if step == 5 else on)
        lisa.step()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**7


# -- what is refused ----------------------------------------------------------------------------------------------------


def test_bad_settings():
    model = llama()
    optimizer = ADAM(model.parameters())
    for settings_, error, message in [
        ({"active_layers": 7}, ValueError, r"active_layers=7, and the model has 6 blocks \(model.layers.0 first\)"),
        ({"active_layers": -1}, ValueError, "active_layers is a whole number of at least 0, not -1"),
        ({"active_layers": 1.5}, ValueError, "active_layers is a whole number"),
        ({"active_layers": True}, ValueError, "active_layers is a whole number"),
        ({"interval": 0}, ValueError, "interval is a whole number of at least 1, not 0"),
        ({"seed": -3}, ValueError, "seed is a whole number of at least 0"),
        ({"weights": [1, 2]}, ValueError, "one for each of the 6 blocks, not 2"),
        ({"weights": [1, 2, 3, 4, 5, -1]}, ValueError, "not negative"),
        ({"weights": [1, 2, 3, 4, 5, float("nan")]}, ValueError, "not negative"),
        ({"weights": [1, 0, 0, 0, 0, 0]}, ValueError, "1 are above 0, and active_layers=2"),
        ({"weights": 5}, ValueError, "weights: a number for each block, not 5"),
        (
            {"weights": [1, 0], "blocks": ["layers.3", "layers.1"], "active_layers": 1},
            ValueError,
            r"the model's order of blocks, \['model.layers.1', 'model.layers.3'\]",
        ),
        ({"blocks": "layer.*"}, TargetError, r"'layer.\*' matches no module"),
        ({"blocks": [nn.Linear(2, 2)]}, TargetError, "no module of the model"),
        (
            {"blocks": ["model.layers.0", "model.layers.0.mlp"]},
            TargetError,
            "'model.layers.0.mlp' lies in 'model.layers.0'",
        ),
        ({"blocks": []}, TargetError, "nothing was given"),
    ]:
        with pytest.raises(error, match=message):
            LISA(model, optimizer, **settings_)  # type: ignore[arg-type]
        assert all(p.requires_grad for p in model.parameters()) and not optimizer._optimizer_step_pre_hooks


def test_an_optimizer_that_lacks_parameters_is_refused():
    model = llama()
    some = [p for n, p in model.named_parameters() if "layers.3" not in n]
    with pytest.raises(
        ValueError, match=r"lacks 9 of them, such as 'model.layers.3.self_attn.q_proj.weight'.*AdamW\(model.para"
    ):
        LISA(model, ADAM(some))
    peftkit.inject(model, LoRAConfig(r=2))
    with pytest.raises(ValueError, match="lacks 57 of them"):
        LISA(model, ADAM(peftkit.parameters(model)))
    with pytest.raises(TypeError, match="a torch.optim.Optimizer, not Linear"):
        LISA(model, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="LBFGS keeps one state"):
        LISA(model, torch.optim.LBFGS(model.parameters()))


def test_what_cannot_train_is_refused():
    model = llama()
    model.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"no base parameter of this LlamaForCausalLM is trainable.*requires_grad_\(True\)"
    ):
        LISA(model, ADAM(model.parameters()))
    model.requires_grad_(True).model.layers[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter of 'model.layers.2' is trainable"):
        LISA(model, ADAM(model.parameters()))
    model.requires_grad_(True)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj is quantised"):
        LISA(model, ADAM(model.parameters()))


def test_what_somebody_else_changes_is_noticed():
    model = llama()
    optimizer = ADAM(model.parameters())
    lisa = LISA(model, optimizer, interval=2)
    train(model, optimizer, range(1), lisa)
    model.requires_grad_(True)
    backward(model, 0)
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"'model.layers.0.* was turned on by something else since LISA switched"):
        optimizer.step()
    assert changed(before, model) == set()  # noticed before anything was trained
    with pytest.raises(RuntimeError, match="turned on by something else"):
        lisa.step()
    lisa.close()
    lisa = LISA(model, optimizer, interval=2)
    peftkit.inject(model, LoRAConfig(r=2))
    with pytest.raises(RuntimeError, match="turned off by something else"):
        lisa.step()
    peftkit.eject(model)
    lisa.close()
    lisa = LISA(model, optimizer, interval=2)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(RuntimeError, match="'lm_head.weight' is another parameter"):
        lisa.step()


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


def test_what_is_injected_under_an_open_schedule_stays_alone_after_closing_it():
    model = llama()
    model.lm_head.requires_grad_(False)
    lisa = LISA(model, ADAM(model.parameters()))
    peftkit.inject(model, LoRAConfig(r=2))
    lisa.close()
    assert all((".peftkit." in name) == p.requires_grad for name, p in model.named_parameters())
    peftkit.eject(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_closing_after_the_adapters_came_off_leaves_what_they_gave_back():
    model = llama()
    model.lm_head.requires_grad_(False)
    peftkit.inject(model, LoRAConfig(r=2))
    lisa = LISA(model, ADAM(model.parameters()))
    peftkit.eject(model)
    lisa.close()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


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


# -- other loops --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "sgd-fused"])
def test_with_a_closure(kind):
    found = []
    for closed in (False, True):
        model = llama()
        optimizer = OPTIMIZERS[kind](model.parameters())
        lisa = LISA(model, optimizer, interval=2)
        for step in range(8):

            def closure(step: int = step, model: nn.Module = model) -> torch.Tensor:
                ids = batch(step)
                loss = model(ids, labels=ids).loss
                loss.backward()
                return loss

            if not closed:
                closure()
            optimizer.step(closure if closed else None)
            lisa.step()
            optimizer.zero_grad()
        found.append(model)
    assert changed(bits(found[0]), found[1]) == set()


@pytest.mark.parametrize("made", ["of what was prepared", "before"])
def test_within_accelerate_s_accumulation_only_real_steps_count(made):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = llama().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lisa = LISA(model, optimizer, interval=2) if made == "before" else None
    model, optimizer = accelerator.prepare(model, optimizer)
    lisa = lisa or LISA(model, optimizer, interval=2)
    plain = llama().double()
    own = torch.optim.SGD(plain.parameters(), lr=0.1)
    beside = LISA(plain, own, interval=2)
    for step in range(8):
        for rows in batch(step).chunk(3):
            with accelerator.accumulate(model):
                accelerator.backward(model(rows, labels=rows).loss)
                optimizer.step()
                lisa.step()
                optimizer.zero_grad()
        train(plain, own, [step], beside)
        assert lisa.active == beside.active and lisa.state_dict()["steps"] == step + 1
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-11)


def test_several_optimizers_that_hold_all_together():
    model = llama()
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    own = {id(p) for p in matrices}
    muon = torch.optim.Muon(matrices, lr=1e-2)
    adam = ADAM([p for p in model.parameters() if id(p) not in own])
    with pytest.raises(ValueError, match=r"\[Muon\(…\), AdamW\(…\)\]"):
        LISA(model, muon)
    lisa = LISA(model, [muon, adam], interval=2)
    for interval in range(5):
        before, on = bits(model), set(lisa.trained)
        for step in range(2):
            backward(model, 2 * interval + step)
            muon.step(), adam.step()
            held = {n for n, p in model.named_parameters() if muon.state.get(p) or adam.state.get(p)}
            assert held == on
            lisa.step()
            model.zero_grad()
        assert changed(before, model) == on


def test_numbers_of_numpy_and_weights_of_any_size():
    model = llama()
    lisa = LISA(model, ADAM(model.parameters()), np.int64(1), np.int32(2), np.uint8(3), weights=np.full(6, 1e308))
    assert json.loads(json.dumps(lisa.state_dict()))["settings"]["seed"] == 3
    lisa.step(), lisa.step()


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


def test_weights_that_are_quantised_in_other_ways_are_refused():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = llama()
    quantize_(model.model.layers, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj is quantised"):
        LISA(model, ADAM(model.parameters()))

    class Packed(nn.Module):  # as GPTQ and AWQ do it
        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 16
            self.register_buffer("qweight", torch.zeros(16, 2, dtype=torch.int32))

    model = llama()
    model.model.layers[1].self_attn.q_proj = Packed()
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj is quantised"):
        LISA(model, ADAM(model.parameters()))
    with pytest.raises(ValueError, match="q_proj' is quantised"):
        peftkit.MeanWeightNorms(model).update()
    model = llama()
    model.model.layers[1].self_attn.q_proj.requires_grad_(False)  # frozen by the user, and left so
    assert "model.layers.1.self_attn.q_proj.weight" not in LISA(model, ADAM(model.parameters()), 6).trained


def test_it_says_what_it_is():
    model = llama()
    found = repr(LISA(model, ADAM(model.parameters())))
    assert found == (
        "LISA(active_layers=2, interval=20, seed=0; 6 blocks (model.layers.0 … model.layers.5); 21 of 57 parameters on)"
    )
