"""Sums of stored LoRAs against sums of the changes that in-memory adapters make, in fp64."""

from __future__ import annotations

import copy
import math
from itertools import permutations
from pathlib import Path

import pytest
import torch
from arithmetic_helpers import EPS, changes, far, saved, summed
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_helpers import config_of, folder_bytes, llama, moved, peft_model, set_config, small, tensors_of
from storage_models import Attending, bert, call, close, conv, gpt2
from torch import nn

import peftkit
from peftkit import DoRAConfig, IA3Config, LoRAConfig, StorageError

MODELS = {
    "llama": (llama, "q_proj", "all-linear"),
    "gpt2": (gpt2, ["c_attn", "wte"], ["mlp.c_proj", "c_attn"]),
    "bert": (bert, "attention", "mlp"),
    "convolutions": (conv, ["0", "2"], "2"),
    "MultiheadAttention": (Attending, ["attn", "table"], ["attn.in_proj", "out"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_concatenation_is_the_sum(kind, tmp_path):
    """Ranks, scales and sites mixed; peftkit loads it and it is Σ wΔW, peft loads it and computes the same."""
    make, one, other = MODELS[kind]
    model = make()
    a = saved(model, tmp_path / "a", LoRAConfig(r=2, alpha=7, targets=one))
    b = saved(model, tmp_path / "b", LoRAConfig(r=4, alpha=3, rank_stabilized=True, targets=other), seed=2)
    report = peftkit.combine({str(a): 0.7, str(b): -1.3}, tmp_path / "out")
    expected = summed([(changes(model, a), 0.7), (changes(model, b), -1.3)])
    found = changes(model, tmp_path / "out")
    assert far(found, expected) < 4 * EPS
    for site in report.sites:
        size = expected[next(n for n in expected if n.startswith(f"{site.site}") and n.endswith("weight"))].norm()
        assert math.isclose(site.whole, float(size) ** 2, rel_tol=1e-6) and site.kept == 1
    assert config_of(tmp_path / "out")["fan_in_fan_out"] == (kind == "gpt2")
    plain = call(model)
    adapted = copy.deepcopy(model)
    peftkit.load(adapted, tmp_path / "out")
    assert (call(adapted) - plain).abs().max() > 1e-3
    assert close(call(peft_model(model, tmp_path / "out")), call(adapted), 4)


WEIGHTS = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-30, -3e20]), st.floats(-4, 4))
CONFIGS = st.builds(
    LoRAConfig,
    r=st.integers(1, 5),
    alpha=st.one_of(st.none(), st.floats(0.01, 64), st.floats(-9, -0.1)),
    rank_stabilized=st.booleans(),
    dropout=st.sampled_from([0.0, 0.5]),
    targets=st.sampled_from(["0", "2", "all-linear"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)


@settings(max_examples=15, deadline=None)
@given(parts=st.lists(st.tuples(CONFIGS, WEIGHTS), min_size=1, max_size=4))
def test_a_concatenation_is_the_sum_whatever_its_parts(parts, tmp_path_factory):
    """Every product is B times one rounding of fp32; where weights are as good as zero, the error is absolute."""
    folder, model = tmp_path_factory.mktemp("sum"), small()
    named = [(saved(model, folder / str(i), config, seed=i), w) for i, (config, w) in enumerate(parts)]
    if not any(w for _, w in named):
        with pytest.raises(ValueError, match="other than 0"):
            peftkit.combine(named, folder / "out")
        return
    peftkit.combine(named, folder / "out")
    each = [(changes(model, path), w) for path, w in named]
    expected, found = summed(each), changes(model, folder / "out")
    for name, total in expected.items():
        # of the products of magnitudes, before anything cancels
        bound = torch.zeros_like(total)
        for (config, w), (path, _) in zip(parts, named, strict=True):
            prefix = f"base_model.model.{name.partition('.')[0]}.lora_"
            stored = {k.removeprefix(prefix): t.double() for k, t in tensors_of(path).items() if k.startswith(prefix)}
            if stored:
                scale = (config.alpha or config.r) / (config.r**0.5 if config.rank_stabilized else config.r)
                bound += abs(w * scale) * (stored["B.weight"].abs() @ stored["A.weight"].abs())
        assert ((found.get(name, torch.zeros_like(total)) - total).abs() <= 1.01 * EPS * bound + 1e-37).all()


@pytest.mark.parametrize(
    ("configs", "weights"),
    [
        ([LoRAConfig(r=3, alpha=0.7, targets="all-linear")], [-1.7]),
        ([LoRAConfig(r=2, alpha=8, targets="0"), LoRAConfig(r=4, alpha=2, targets="all-linear")], [0.25, -2.0]),
        ([LoRAConfig(r=3, rank_stabilized=True, targets="0")] * 2, [0.3, -0.3]),
    ],
    ids=["one alone", "powers of two", "alike"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_where_nothing_is_rounded(configs, weights, dtype, tmp_path):
    """The stored numbers are those of the parts, but for powers of two; in their dtype."""
    model, named = small(), []
    for i, config in enumerate(configs):
        path = saved(model, tmp_path / str(i), LoRAConfig(**{**vars(config), "dtype": dtype}), seed=i)
        named.append((path, weights[i]))
    peftkit.combine(named, tmp_path / "out")
    out = tensors_of(tmp_path / "out")
    assert {t.dtype for t in out.values()} == {dtype}
    expected, found = summed([(changes(model, p), w) for p, w in named]), changes(model, tmp_path / "out")
    assert far(found, expected) < 1e-14  # of fp64


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.9)])
def test_one_scale_for_all_sites(weights, tmp_path):
    """A reader that knows no patterns of ranks and alphas scales rightly all the same."""
    model = small()
    a = saved(model, tmp_path / "a", LoRAConfig(r=2, alpha=6, targets="all-linear"))
    b = saved(model, tmp_path / "b", LoRAConfig(r=4, alpha=4, targets="2"))
    peftkit.combine([(a, weights[0]), (b, weights[1])], tmp_path / "out")
    config, tensors = config_of(tmp_path / "out"), tensors_of(tmp_path / "out")
    assert config["rank_pattern"] and config["alpha_pattern"]
    expected = summed([(changes(model, a), weights[0]), (changes(model, b), weights[1])])
    for name, d in expected.items():
        x, y = (tensors[f"base_model.model.{name.removesuffix('weight')}lora_{k}.weight"].double() for k in "AB")
        assert torch.allclose(config["lora_alpha"] / config["r"] * (y @ x), d, rtol=1e-6, atol=1e-6)


def test_a_dtype_that_would_round_is_not_kept(tmp_path):
    model = small()
    path = saved(model, tmp_path / "a", LoRAConfig(r=2, alpha=6, dtype=torch.bfloat16, targets="0"))
    other = saved(model, tmp_path / "b", LoRAConfig(r=2, alpha=2, dtype=torch.bfloat16, targets="0"), seed=2)
    peftkit.combine([(path, 0.3), (other, 1.0)], tmp_path / "out")
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.float32}
    peftkit.combine([(path, 0.3), (other, 1.0)], tmp_path / "out", dtype=torch.float16)
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.float16}


def test_fused_rows_and_pairs_taken_from_the_base(tmp_path):
    """What amounts to a plain pair is one: row blocks, and PiSSA as peftkit saves it."""
    model = small()
    a = saved(model, tmp_path / "a", LoRAConfig(r=2, targets="0", rows={"0": ((0, 3), (5, 8))}))
    b = saved(model, tmp_path / "b", LoRAConfig(r=2, init="pissa", targets="0"))
    peftkit.combine([(a, 2.0), (b, 0.3)], tmp_path / "out")
    with_base = copy.deepcopy(model)
    peftkit.load(with_base, b)
    peftkit.merge(with_base, keep_base=False)
    pissa = {"0.weight": (with_base[0].weight - model[0].weight).double()}
    expected = summed([(changes(model, a), 2.0), (pissa, 0.3)])
    assert far(changes(model, tmp_path / "out"), expected) < 1e-6


def test_groups_that_peft_has_crossed(tmp_path):
    """peft's A of a grouped convolution reads all groups; such pairs, and ours, are added as what they compute."""
    from peft import LoraConfig, get_peft_model

    model, x = conv(), []
    for i in range(2):
        made = get_peft_model(copy.deepcopy(model), LoraConfig(r=2 * i + 2, lora_alpha=5, target_modules=["2"]))
        moved(made, [p for n, p in made.named_parameters() if "lora_" in n], i)
        made.save_pretrained(tmp_path / str(i))
        x.append(call(made.eval()) - call(model))
    own = saved(model, tmp_path / "own", LoRAConfig(r=2, alpha=3, targets="2"))
    loaded = copy.deepcopy(model)
    peftkit.load(loaded, own)
    expected = call(model) + 0.5 * x[0] - 1.5 * x[1] + 2 * (call(loaded) - call(model))
    for kwargs in ({}, {"how": "svd", "r": "full"}):
        peftkit.combine([(tmp_path / "0", 0.5), (own, 2.0), (tmp_path / "1", -1.5)], tmp_path / "out", **kwargs)
        loaded = copy.deepcopy(model)
        peftkit.load(loaded, tmp_path / "out")
        assert close(call(loaded), expected, 8)


class Apart(nn.Module):
    """Whose keys are of another size, so that the projections have weights of their own."""

    def __init__(self, size: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 2, kdim=size, vdim=size)


@pytest.fixture(scope="module")
def of_parts(tmp_path_factory) -> tuple[nn.Module, list[Path]]:
    folder, model = tmp_path_factory.mktemp("parts"), Apart()
    targets = ["attn"], ["q_proj"], ["out_proj"], ["k_proj", "out_proj"], ["v_proj"]
    return model, [
        saved(model, folder / t[0] / t[-1], LoRAConfig(r=2, targets=t), seed=i) for i, t in enumerate(targets)
    ]


def test_an_attention_of_separate_projections(of_parts, tmp_path):
    """One file has a projection, which the next shows to be an attention's; in any order."""
    model, paths = of_parts
    each = {path: changes(model, path) for path in paths}
    for some in (*permutations(paths, 2), paths[1:], paths[::-1]):
        peftkit.combine([(path, i + 1.0) for i, path in enumerate(some)], tmp_path / "out")
        expected = summed([(each[path], i + 1.0) for i, path in enumerate(some)])
        assert far(changes(model, tmp_path / "out"), expected) < 4 * EPS, some


def test_attentions_that_are_no_one_models(of_parts, tmp_path):
    whole = Apart(size=8)
    a = saved(whole, tmp_path / "a", LoRAConfig(r=2, targets=["in_proj"]))
    with pytest.raises(StorageError, match=r"has attn\.k_proj_weight, .* separate, the other attn\.in_proj_weight"):
        peftkit.combine([(a, 1.0), (of_parts[1][3], 1.0)], tmp_path / "out")


def test_the_base_is_remembered(tmp_path):
    """It loads on the base that both are of, and on no other."""
    model = small()
    a = saved(model, tmp_path / "a", LoRAConfig(r=1, targets="0"))
    b = saved(model, tmp_path / "b", LoRAConfig(r=1, targets="2"))
    peftkit.combine([(a, 1.0), (b, 1.0)], tmp_path / "out")
    peftkit.load(copy.deepcopy(model), tmp_path / "out")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight.add_(1)
    with pytest.raises(StorageError, match="another base: the weight of '2'"):
        peftkit.load(other, tmp_path / "out")


def test_over_one_of_the_parts(tmp_path):
    model = small()
    a = saved(model, tmp_path / "a", LoRAConfig(r=1, targets="0"))
    before = changes(model, a)
    peftkit.combine([(a, 2.0), (a, 0.5)], a)
    assert far(changes(model, a), summed([(before, 2.5)])) < 4 * EPS


# -- what is stored whole ------------------------------------------------------------------------------------------------


def with_head(tmp_path: Path, targets: str = "query") -> tuple[nn.Module, Path, Path]:
    model = bert()
    a = saved(model, tmp_path / "a", LoRAConfig(r=2, targets=targets, also_train=["classifier"]))
    b = saved(model, tmp_path / "b", LoRAConfig(r=2, targets="value"), seed=2)
    return model, a, b


def test_a_head_is_taken_over(tmp_path):
    model, a, b = with_head(tmp_path)
    peftkit.combine([(b, -0.5), (a, 1.0)], tmp_path / "out")
    out, before = tensors_of(tmp_path / "out"), tensors_of(a)
    heads = [k for k in before if "classifier" in k]
    assert len(heads) == 2 and all(torch.equal(out[k], before[k]) for k in heads)
    loaded = copy.deepcopy(model)
    peftkit.load(loaded, tmp_path / "out")
    assert close(call(peft_model(model, tmp_path / "out")), call(loaded))


def test_rows_of_tokens_are_taken_over(tmp_path):
    model = llama()
    a = saved(model, tmp_path / "a", LoRAConfig(r=2, targets="q_proj", also_train={"embed_tokens": [3, 30]}))
    peftkit.combine([(a, 1.0)], tmp_path / "out")
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    peftkit.load(one, a)
    peftkit.load(two, tmp_path / "out")
    assert torch.equal(call(one), call(two)) and not torch.equal(call(one), call(model))
    assert close(call(peft_model(model, tmp_path / "out")), call(two))


def test_what_cannot_be_added_is_refused(tmp_path):
    _, a, b = with_head(tmp_path)
    for parts, words in [
        ([(a, 0.5), (b, 1.0)], "stores 'classifier' whole, which cannot be taken times 0.5"),
        ([(a, 1.0), (a, 1.0)], "one would take the place of the other"),
    ]:
        with pytest.raises(StorageError, match=words):
            peftkit.combine(parts, tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_of_weight_zero(tmp_path):
    """As if it were not there, whatever it is; but the draws of those after it stay."""
    _, a, b = with_head(tmp_path)
    others = [
        a,  # with its head
        saved(small(), tmp_path / "c", DoRAConfig(r=2, targets="0")),
        saved(bert(seed=1), tmp_path / "d", LoRAConfig(r=2, targets="value")),
        tmp_path / "nowhere",
    ]
    peftkit.combine(b, tmp_path / "alone")
    peftkit.combine([*((path, 0.0) for path in others), (b, 1.0)], tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "alone")
    dare = {"how": "dare", "r": "full", "density": 0.5}
    for name, first in (("zero", 0.0), ("tiny", 1e-30)):
        peftkit.combine([(b, first), (b, 1.0)], tmp_path / name, **dare)
    model = bert()
    assert far(changes(model, tmp_path / "zero"), changes(model, tmp_path / "tiny")) < 2e-6


def test_a_pair_inside_of_what_is_whole(tmp_path):
    model = bert()
    a = saved(model, tmp_path / "a", LoRAConfig(r=2, targets="query", also_train=["classifier"]))
    b = saved(model, tmp_path / "b", LoRAConfig(r=2, targets=["classifier", "value"]))
    with pytest.raises(StorageError, match="'classifier' whole, and 'classifier' has a pair"):
        peftkit.combine([(a, 1.0), (b, 1.0)], tmp_path / "out")


@pytest.mark.parametrize("config", [DoRAConfig(r=2, targets="0"), IA3Config(targets="0")])
def test_other_methods_are_refused(config, tmp_path):
    model = small()
    path = saved(model, tmp_path / "a", config)
    with pytest.raises(StorageError, match=rf"a is {config.method}, not lora.*merge_checkpoint.*extract"):
        peftkit.combine([(path, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_or_size_is_refused(tmp_path):
    a = saved(small(0), tmp_path / "a", LoRAConfig(r=1, targets="0"))
    b = saved(small(1), tmp_path / "b", LoRAConfig(r=1, targets="all-linear"))
    with pytest.raises(StorageError, match="different bases: the weight of '0' differs"):
        peftkit.combine([(a, 1.0), (b, 1.0)], tmp_path / "out")
    c = saved(nn.Sequential(nn.Linear(6, 9)), tmp_path / "c", LoRAConfig(r=1, targets="0"))
    set_config(c, base_model_name_or_path="other")
    before = folder_bytes(a)
    with pytest.raises(StorageError, match=r"(another size|different bases)"):
        peftkit.combine([(a, 1.0), (c, 1.0)], a)
    assert folder_bytes(a) == before and config_of(a)["r"] == 1


@pytest.mark.parametrize(
    ("error", "words", "adapters", "kwargs"),
    [
        (ValueError, "finite", [("a", math.nan)], {}),
        (ValueError, "finite", [("a", True)], {}),
        (ValueError, "other than 0", [("a", 0.0)], {}),
        (ValueError, "none is given", [], {}),
        (TypeError, "directories, or pairs", [3], {}),
        (TypeError, "directories, or pairs", [("a", 1.0, 2.0)], {}),
        (ValueError, r"how: expected one of .*, not 'tie'; did you mean 'ties'\?", [("a", 1.0)], {"how": "tie"}),
        (ValueError, r"not 'SVD'; did you mean 'svd'\?", [("a", 1.0)], {"how": "SVD"}),
        (ValueError, "'dare_ties', not 'x'$", [("a", 1.0)], {"how": "x"}),
        (TypeError, "seed: an integer", [("a", 1.0)], {"how": "dare", "r": 4, "density": 0.5, "seed": None}),
        (ValueError, "needs a rank", [("a", 1.0)], {"how": "svd"}),
        (ValueError, "at least 1", [("a", 1.0)], {"how": "svd", "r": 0}),
        (ValueError, "ranks of all together", [("a", 1.0)], {"r": 4}),
        (ValueError, "leaves nothing out", [("a", 1.0)], {"density": 0.5}),
        (ValueError, "needs density", [("a", 1.0)], {"how": "ties", "r": 4}),
        (ValueError, "needs density", [("a", 1.0)], {"how": "dare", "r": 4, "density": 0.0}),
        (ValueError, "matches none", [("a", 1.0)], {"how": "svd", "r": {"*": 2, "nothing": 1}}),
        (ValueError, "no safetensors|missing", [("nowhere", 1.0)], {}),
    ],
)
def test_mistakes_are_named(error, words, adapters, kwargs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(small(), Path("a"), LoRAConfig(r=1, targets="0"))
    with pytest.raises(error, match=words):
        peftkit.combine(adapters, "out", **kwargs)
    assert not Path("out").exists()
