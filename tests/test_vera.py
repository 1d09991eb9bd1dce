"""VeRA: one frozen pair for all sites."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from small_helpers import grafted
from storage_helpers import tensors_of
from torch import nn

import peftkit
from peftkit import TargetError, VeRAConfig
from peftkit.testing import models
from peftkit.testing.models import evaluated, numbers, output


def shared(model: nn.Module, name: str = "default") -> tuple[nn.Parameter, nn.Parameter]:
    """The one pair, which all adapters must hold."""
    held = {(id(a.shared.A), id(a.shared.B)): a.shared for a in grafted(model, name).values()}
    assert len(held) == 1
    (found,) = held.values()
    return found.A, found.B


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def emptied(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    peftkit.reset(model)
    return model


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_save, nn.Module.double, emptied])
def test_the_pair_stays_one_and_frozen(way):
    model = models.llama()
    report = peftkit.inject(model, VeRAConfig(r=5))
    first = [t.detach().clone() for t in shared(model)]
    model = way(model)
    a, b = shared(model)
    assert a.shape == (5, 24) and b.shape == (24, 5) and not a.requires_grad and not b.requires_grad
    assert all(torch.equal(x.to(y.dtype), y) for x, y in zip(first, (a, b), strict=True))
    assert sum(p is a or p is b for p in model.parameters()) == 2
    sizes = [5 + m.out_features for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    assert report.trained == sum(sizes) and report.parameters == sum(sizes) + 2 * 5 * 24


def test_nothing_wakes_the_pair(tmp_path):
    model = models.llama()
    peftkit.inject(model, VeRAConfig(r=3))
    peftkit.save(model, tmp_path / "a")
    peftkit.load(model, tmp_path / "a", name="again", trainable=True)
    for names in ((), ("default",), ("again",), ("default", "again")):
        peftkit.activate(model, *names)
        assert not any(p.requires_grad for n in ("default", "again") for p in shared(model, n))
    assert all(p.requires_grad for p in peftkit.parameters(model, "again"))


def test_the_seed_alone_says_what_the_pair_is():
    pairs = []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        model = models.llama()
        torch.manual_seed(noise)
        peftkit.inject(model, VeRAConfig(r=3, seed=seed))
        pairs.append(shared(model))
    assert torch.equal(pairs[0][0], pairs[1][0]) and torch.equal(pairs[0][1], pairs[1][1])
    assert not torch.equal(pairs[0][0], pairs[2][0])
    a, b = pairs[0]  # Kaiming's bounds, which both nearly reach
    assert 0.9 < a.abs().max() / (6 / 24) ** 0.5 <= 1 and 0.9 < b.abs().max() / (6 / 3) ** 0.5 <= 1


def test_resetting_keeps_a_pair_that_came_from_a_file(tmp_path):
    model = models.llama()
    peftkit.inject(model, VeRAConfig(r=3))
    with torch.no_grad():
        shared(model)[0].fill_(0.5)
    peftkit.save(model, tmp_path / "a")
    other = models.llama()
    peftkit.load(other, tmp_path / "a")
    peftkit.reset(copy.deepcopy(other))
    other = copy.deepcopy(other)
    peftkit.reset(other)
    assert bool((shared(other)[0] == 0.5).all())


@pytest.mark.parametrize("stored", [True, False])
def test_a_base_without_values_yet_gets_what_the_file_says(stored, tmp_path):
    model = models.llama()
    peftkit.inject(model, VeRAConfig(r=3, save_projection=stored))
    peftkit.save(model, tmp_path / "a")
    other = models.llama().to("meta")
    peftkit.load(other, tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(shared(model), shared(other), strict=True))
    peftkit.save(other, tmp_path / "b")
    first, second = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_pair_changed_while_merged_is_noticed():
    model = models.linear()
    peftkit.inject(model, VeRAConfig(r=3, targets="all-linear"))
    peftkit.merge(model)
    with torch.no_grad():
        shared(model)[1].mul_(2)
    with pytest.raises(RuntimeError, match="changed while merged"):
        evaluated(model, numbers(3, 6)())


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"r": 0}, "r: a rank"), ({"dropout": 1.0}, "dropout"), ({"d_initial": 0.0}, "d_initial: a finite number"),
     ({"d_initial": float("nan")}, "d_initial")],
)  # fmt: skip
def test_settings_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        VeRAConfig(**fields)


def test_ranks_of_sites_and_unseen_inputs_are_refused():
    with pytest.raises(ValueError, match="so there is one rank"):
        peftkit.inject(models.linear(), VeRAConfig(r={"*": 2}, targets="all-linear"))  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="no input to drop"):
        peftkit.inject(models.Attend(), VeRAConfig(r=2, dropout=0.1, targets="all-linear"))


def test_dropout_drops_entries_of_the_input():
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).train()
    peftkit.inject(model, VeRAConfig(r=4, dropout=0.5, targets="0"))
    with torch.no_grad():
        model[0].weight.zero_()
        grafted(model)["0"].vera_lambda_b.fill_(1)
    x = torch.eye(4)
    torch.manual_seed(0)
    kept = output(model, x).abs().sum(1) > 0
    assert kept.any() and not kept.all()
    model.eval()
    assert (output(model, x).abs().sum(1) > 0).all()
