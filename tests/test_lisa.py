"""LISA: what it draws, what trains, and what the optimizer keeps."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from schedule_models import ADAM, OPTIMIZERS, backward, bits, changed, llama, of_block, stack, train

from peftkit import LISA


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


def test_numbers_of_numpy_and_weights_of_any_size():
    model = llama()
    lisa = LISA(model, ADAM(model.parameters()), np.int64(1), np.int32(2), np.uint8(3), weights=np.full(6, 1e308))
    assert json.loads(json.dumps(lisa.state_dict()))["settings"]["seed"] == 3
    lisa.step(), lisa.step()


def test_it_says_what_it_is():
    model = llama()
    found = repr(LISA(model, ADAM(model.parameters())))
    assert found == (
        "LISA(active_layers=2, interval=20, seed=0; 6 blocks (model.layers.0 … model.layers.5); 21 of 57 parameters on)"
    )
