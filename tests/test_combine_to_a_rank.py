"""Sums cut to a rank, TIES and DARE, against formulas of their own on dense matrices in fp64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from arithmetic_helpers import changes, far, saved, summed
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_helpers import folder_bytes, peft_model, small
from storage_models import Attending, call, close, conv
from torch import nn

import peftkit
from peftkit import LoRAConfig
from peftkit.checkpoints import lowrank, task_vectors


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 12)).eval()


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> tuple[nn.Module, list[tuple[Path, float]]]:
    folder, model = tmp_path_factory.mktemp("three"), wide()
    configs = [
        LoRAConfig(r=3, alpha=6, targets="all-linear"),
        LoRAConfig(r=4, rank_stabilized=True, targets="0"),
        LoRAConfig(r=2, targets="all-linear"),
    ]
    paths = [saved(model, folder / str(i), config, seed=i) for i, config in enumerate(configs)]
    return model, [(paths[0], 0.8), (paths[1], -1.5), (paths[2], 0.6)]


# -- the nearest matrix of a rank ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 12), n=st.integers(1, 12), inner=st.integers(1, 16), r=st.integers(1, 16), seed=st.integers(0, 99)
)
def test_eckart_young(m, n, inner, r, seed):
    """What is lost is the norm of the other singular values, by numpy; from factors and from the matrix."""
    g = np.random.default_rng(seed)
    b, a = g.normal(size=(m, inner)), g.normal(size=(inner, n))
    d = b @ a
    sigma = np.linalg.svd(d, compute_uv=False)
    for cut in (lowrank.of_product(torch.tensor(b), torch.tensor(a), r), lowrank.of_matrix(torch.tensor(d), r)):
        assert len(cut.a) == cut.b.shape[1] <= r
        left = np.linalg.norm(d - (cut.b @ cut.a).numpy()) ** 2
        assert np.isclose(left, (sigma[r:] ** 2).sum(), atol=1e-10 * (1 + cut.whole))
        assert np.isclose(cut.lost, left, atol=1e-10 * (1 + cut.whole)) and np.isclose(cut.whole, (sigma**2).sum())


@pytest.mark.parametrize("iterations", [0, 4])
def test_the_randomised_decomposition_says_what_it_loses(iterations):
    torch.manual_seed(0)
    d = torch.randn(60, 50, dtype=torch.float64) @ torch.diag(0.8 ** torch.arange(50.0, dtype=torch.float64))
    best = lowrank.of_matrix(d.clone(), 6).lost
    state = torch.get_rng_state()
    near = lowrank.of_matrix(d.clone(), 6, iterations=iterations)
    assert torch.equal(state, torch.get_rng_state())
    again = lowrank.of_matrix(d.clone(), 6, iterations=iterations)
    assert torch.equal(near.a, again.a) and torch.equal(near.b, again.b)
    assert np.isclose(near.lost, float((d - near.b @ near.a).square().sum()), rtol=1e-9)
    assert best * (1 - 1e-9) <= near.lost <= best * (1.5 if iterations == 0 else 1.001)


@pytest.mark.parametrize("r", [1, 4, 7, "full", {"*": 2, "2": 3}])
def test_svd_is_the_nearest_of_its_rank(r, three, tmp_path):
    model, parts = three
    report = peftkit.combine(parts, tmp_path / "out", how="svd", r=r)
    expected = summed([(changes(model, path), w) for path, w in parts])
    found = changes(model, tmp_path / "out")
    for site in report.sites:
        d = expected[f"{site.site}.weight"]
        rank = r if isinstance(r, int) else 99 if r == "full" else r.get(site.site, r["*"])
        sigma = torch.linalg.svdvals(d)
        assert site.r == min(rank, 9 if site.site == "0" else 5)
        lost = float((d - found[f"{site.site}.weight"]).norm())
        assert lost == pytest.approx(float(sigma[rank:].norm()), rel=1e-5, abs=1e-5 * float(d.norm()))
        assert site.lost == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-6, abs=1e-9)
        assert site.kept == pytest.approx(1 - site.lost / float(d.square().sum()))


@pytest.mark.parametrize("make", [conv, Attending])
def test_svd_of_other_hosts(make, tmp_path):
    """A grouped convolution's groups are cut each by itself; peft reads what comes out."""
    model, targets = make(), ["2"] if make is conv else ["attn", "table"]
    a = saved(model, tmp_path / "a", LoRAConfig(r=2, targets=targets))
    b = saved(model, tmp_path / "b", LoRAConfig(r=4, alpha=3, targets=targets), seed=2)
    peftkit.combine([(a, 0.5), (b, 1.0)], tmp_path / "out", how="svd", r=2)
    expected = summed([(changes(model, a), 0.5), (changes(model, b), 1.0)])
    found = changes(model, tmp_path / "out")
    for name, d in expected.items():
        groups = d.chunk(2) if make is conv else [d]
        left = sum(float(torch.linalg.svdvals(g.flatten(1))[2 // len(groups) :].square().sum()) for g in groups)
        assert float((d - found[name]).square().sum()) == pytest.approx(left, rel=1e-5)
    loaded = copy.deepcopy(model)
    peftkit.load(loaded, tmp_path / "out")
    assert close(call(peft_model(model, tmp_path / "out")), call(loaded), 4)
    if make is conv:
        with pytest.raises(ValueError, match="no multiple of its 2 groups"):
            peftkit.combine([(a, 0.5)], tmp_path / "out", how="svd", r=3)


# -- TIES and DARE -------------------------------------------------------------------------------------------------------


def ties(deltas: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    """Algorithm 1 of the paper, a number at a time."""
    kept = []
    for d in deltas:
        order = sorted(d.reshape(-1), key=abs, reverse=True)
        least = abs(order[max(1, round(density * d.size)) - 1])
        kept.append(np.where(abs(d) >= least, d, 0.0))
    out = np.zeros_like(deltas[0])
    for at in np.ndindex(out.shape):
        values = [w * k[at] for w, k in zip(weights, kept, strict=True)]
        sign = np.sign(sum(values))
        agreeing = [v for v in values if np.sign(v) == sign and sign != 0]
        out[at] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


@pytest.mark.parametrize("density", [0.2, 0.61, 1.0])
def test_ties_is_the_papers(density, three, tmp_path):
    model, parts = three
    report = peftkit.combine(parts, tmp_path / "out", how="ties", r="full", density=density)
    each, found = [changes(model, path) for path, _ in parts], changes(model, tmp_path / "out")
    for name in ("0.weight", "2.weight"):
        there = [(d[name].numpy(), w) for d, (_, w) in zip(each, parts, strict=True) if name in d]
        expected = torch.tensor(ties([d for d, _ in there], [w for _, w in there], density))
        assert far({name: found[name]}, {name: expected}) < 2e-6
        site = next(s for s in report.sites if s.site == name[0])
        assert site.whole == pytest.approx(float(expected.square().sum())) and site.kept == 1
    cut = peftkit.combine(parts, tmp_path / "cut", how="ties", r=4, density=density)
    sigma = torch.linalg.svdvals(found["0.weight"])
    assert cut.sites[0].lost == pytest.approx(float(sigma[4:].square().sum()), rel=1e-4)


def weighted_last(deltas: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    """As peft orders the steps: the sign is that of the sum without weights."""
    kept = [ties([d], [1.0], density) for d in deltas]
    sign = np.where(sum(kept) >= 0, 1, -1)
    agree = [np.sign(k) == sign for k in kept]
    total = sum(w * k * a for w, k, a in zip(weights, kept, agree, strict=True))
    return total / np.maximum(sum(agree), 1)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.5), (0.7, 0.3), (1.0, -1.0)])
def test_ties_beside_pefts(weights, tmp_path):
    """Equal weights: the same. Others: peft elects signs before it weights, peftkit after."""
    model, names = small(), ("a", "b")
    paths = [saved(model, tmp_path / n, LoRAConfig(r=3, alpha=5, targets="0"), seed=i) for i, n in enumerate(names)]
    theirs: Any = peft_model(copy.deepcopy(model), paths[0], adapter_name="a")
    theirs.load_adapter(paths[1], adapter_name="b")
    theirs.add_weighted_adapter(
        list(names), list(weights), "both", combination_type="ties_svd", density=0.5, svd_rank=6
    )
    of_peft = theirs.base_model.model[0].get_delta_weight("both").detach().double()
    peftkit.combine(list(zip(paths, weights, strict=True)), tmp_path / "out", how="ties", density=0.5, r="full")
    of_peftkit = changes(model, tmp_path / "out")["0.weight"]
    deltas = [changes(model, path)["0.weight"].numpy() for path in paths]
    for found, formula in ((of_peftkit, ties), (of_peft, weighted_last)):
        assert far({"": found}, {"": torch.tensor(formula(deltas, list(weights), 0.5))}) < 2e-6
    apart = float((of_peftkit - of_peft).norm() / of_peft.norm())
    assert apart < 2e-6 if weights[0] == weights[1] else apart > 0.1


@pytest.mark.parametrize("make", [conv, Attending])
@pytest.mark.parametrize("how", ["ties", "dare"])
def test_nothing_left_out_is_the_sum_on_other_hosts(how, make, tmp_path):
    model, targets = make(), ["2"] if make is conv else ["attn", "table"]
    a = saved(model, tmp_path / "a", LoRAConfig(r=2, alpha=3, targets=targets))
    peftkit.combine([(a, -2.0)], tmp_path / "out", how=how, r="full", density=1.0)
    assert far(changes(model, tmp_path / "out"), summed([(changes(model, a), -2.0)])) < 2e-6


def test_ties_keeps_no_sign_where_the_sum_is_zero():
    d = torch.tensor([[1.0, -2.0, 3.0, 0.0]])
    found = task_vectors.elected([d.clone, lambda: torch.tensor([[-1.0, -4.0, 1.0, 0.0]])])
    assert found.tolist() == [[0.0, -3.0, 2.0, 0.0]]


def test_trimming_does_not_ask_for_the_order():
    assert task_vectors.trimmed(torch.tensor([1.0, -3.0, 2.0, 3.0]), 0.25).tolist() == [0, -3, 0, 3]
    assert task_vectors.trimmed(torch.tensor([1.0, -3.0, 2.0, 0.5]), 0.5).tolist() == [0, -3, 2, 0]
    assert task_vectors.trimmed(torch.zeros(3), 0.5).tolist() == [0, 0, 0]


@pytest.mark.parametrize("density", [0.3, 0.9])
def test_dare_drops_and_rescales(density, three, tmp_path):
    """Each number is w·Δ/density or nothing, about `density` of them stay, and the mean over seeds is the sum."""
    model, parts = three
    path, weight = parts[0]
    d = weight * changes(model, path)["0.weight"]
    total, n = torch.zeros_like(d), 12
    for seed in range(n):
        peftkit.combine(parts[:1], tmp_path / "out", how="dare", r="full", density=density, seed=seed)
        found = changes(model, tmp_path / "out")["0.weight"]
        stays = found.abs() > 0.5 * d.abs()
        assert torch.allclose(found, torch.where(stays, d / density, 0.0), atol=3e-6)
        total += found / n
        if seed == 0:
            share, width = float(stays.double().mean()), (density * (1 - density) / d.numel()) ** 0.5
            assert share == pytest.approx(density, abs=4 * width)
    spread = d.abs() * ((1 - density) / density / n) ** 0.5
    assert ((total - d).abs() < 6 * spread).all()


def test_dare_draws_by_seed_site_and_number(three, tmp_path):
    _, parts = three

    def drawn(name: str, parts: list[tuple[Path, float]], seed: int) -> dict[str, bytes]:
        peftkit.combine(parts, tmp_path / name, how="dare", r="full", density=0.5, seed=seed)
        return folder_bytes(tmp_path / name)

    assert drawn("a", parts, 3) == drawn("b", parts, 3) != drawn("c", parts, 4)
    ones = torch.ones(8, 8, dtype=torch.float64)
    draws = [
        task_vectors.dropped(ones.clone(), 0.5, *key) for key in ((0, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 0, "a"))
    ]
    assert all(not torch.equal(x, y) for i, x in enumerate(draws) for y in draws[:i])
    assert torch.equal(draws[0], task_vectors.dropped(ones.clone(), 0.5, 0, 0, "a"))


def test_a_sites_draw_is_its_own(tmp_path):
    """What else an adapter has does not count."""
    model = small()
    a = saved(model, tmp_path / "a", LoRAConfig(r=2, targets="all-linear"))
    peftkit.load(model, a)
    peftkit.inject(model, LoRAConfig(r=2, targets="2"), name="one")
    source, target = (getattr(model[2].peftkit, name) for name in ("default", "one"))
    target.load_state_dict(source.state_dict())
    peftkit.save(model, tmp_path / "b", name="one")
    peftkit.eject(model)
    for name in "ab":
        peftkit.combine([(tmp_path / name, 1.0)], tmp_path / f"out-{name}", how="dare", r="full", density=0.5)
    assert torch.equal(changes(model, tmp_path / "out-a")["2.weight"], changes(model, tmp_path / "out-b")["2.weight"])


def test_dare_with_ties_signs(three, tmp_path):
    """Both steps, from what DARE alone draws."""
    model, parts = three
    path, _ = parts[0]
    same = [(path, 1.0), (path, -0.4), (path, 0.7)]
    d = changes(model, path)["0.weight"]
    stays = [task_vectors.dropped(torch.ones_like(d), 0.5, 7, i, "0") / 2 for i in range(3)]
    values = torch.stack([w * 2 * d * s for (_, w), s in zip(same, stays, strict=True)])
    sign = values.sum(0).sign()
    agree = (values.sign() == sign) & (sign != 0)
    expected = (values * agree).sum(0) / agree.sum(0).clamp(min=1)
    peftkit.combine(same, tmp_path / "out", how="dare_ties", r="full", density=0.5, seed=7)
    assert far({"0.weight": changes(model, tmp_path / "out")["0.weight"]}, {"0.weight": expected}) < 2e-6
