"""Which modules a config's words mean."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peftkit
from peftkit import LoRAConfig, TargetError
from peftkit.sites import walk
from peftkit.targets import Patterns, PerSite
from peftkit.testing.models import Tied, Twice, bert, drawn, encoder, gpt2, linear, llama


def sites(model: nn.Module, **kwargs) -> list[str]:
    return peftkit.inject(model, LoRAConfig(**{"r": 1, **kwargs})).sites


BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 14), ("attention", 8), ("mlp", 6), (["attention", "mlp"], 14), (None, 14),
        ("q_proj", 2), (["q_proj", "v_proj"], 4), ("self_attn.q_proj", 2), ("layers.*.mlp.up_proj", 2),
        ("**.mlp.*", 6), ("^model.layers.1.mlp.up_proj", 1), (re.compile(r".*layers\.0\..*_proj"), 7),
        (lambda name, module: name.endswith("k_proj"), 2), ("[qk]_proj", 4), ("lm_head", 1), ("embed_tokens", 1),
    ],
)  # fmt: skip
def test_targets(targets, count):
    assert len(sites(llama(), targets=targets)) == count


def test_layers_and_exclude():
    assert {n.split(".")[2] for n in sites(llama(4), layers=[0, -1])} == {"0", "3"}
    assert {n.split(".")[2] for n in sites(llama(4), layers=range(1, 3))} == {"1", "2"}
    assert len(sites(llama(), exclude="mlp")) == 8
    assert len(sites(llama(), exclude=["q_proj", "down_proj"])) == 10


def test_the_output_head_is_not_among_all_linear():
    assert "lm_head" not in sites(gpt2(), targets="all-linear")
    assert sites(drawn(Tied()), targets="all-linear") == ["mid"]
    assert len(sites(linear(), targets="all-linear")) == 2  # nothing there is called a head


def test_presets_on_other_architectures():
    assert {n.rpartition(".")[2] for n in sites(gpt2(), targets="attention")} == {"c_attn", "c_proj"}
    assert len(sites(gpt2(), targets="mlp")) == 4
    assert len(sites(bert(), targets="attention")) == 8
    assert len(sites(bert(), targets="mlp")) == 4
    assert {n.rpartition(".")[2] for n in sites(encoder(), targets="mlp")} == {"linear1", "linear2"}
    assert {n.rpartition(".")[2] for n in sites(encoder(), targets="attention")} == {"in_proj", "out_proj"}
    assert len(sites(encoder(), targets="self_attn")) == 4


def test_a_module_with_two_names_is_one_site_that_both_find():
    assert sites(drawn(Twice()), targets="second") == ["first"]
    assert sites(drawn(Twice()), targets=["first", "second"]) == ["first"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_porj", "did you mean 'q_proj'"), ("proj", "matches no module"), (["q_proj", "w_proj"], "'w_proj'"),
        ("mlp.q_proj", "matches no module"), (re.compile("q_proj"), "matches no module"), ("norm", "LlamaRMSNorm"),
        ("layers.9.mlp.up_proj", "matches no module"), ("", "non-empty"), (lambda n, m: False, "matches no module"),
    ],
)  # fmt: skip
def test_a_target_that_means_nothing(targets, message):
    model = llama()
    with pytest.raises(TargetError, match=message):
        sites(model, targets=targets)
    assert not peftkit.adapters(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("layers", [[2], [-3], 5, [0, 7]])
def test_a_layer_that_does_not_exist(layers):
    with pytest.raises(TargetError, match=r"out of range.*blocks 0 to 1"):
        sites(llama(), layers=layers)


def test_no_block_is_recognised():
    with pytest.raises(TargetError, match="all-linear"):
        sites(linear())


def test_ranks_by_pattern():
    model = llama()
    r = {"*": 2, "q_proj": 3, "mlp.up_proj": 4, "layers.1.**": 1, "^model.layers.0.self_attn.q_proj": 5}
    rows = peftkit.inject(model, LoRAConfig(r=r, alpha={"**": 1.0, "q_proj": 2.0})).rows
    found = {row.site: row.detail for row in rows}
    assert found["model.layers.0.self_attn.q_proj"] == "r=5, alpha=2"
    assert found["model.layers.1.self_attn.q_proj"] == "r=3, alpha=2"
    assert found["model.layers.0.mlp.up_proj"] == "r=4, alpha=1"
    assert found["model.layers.1.mlp.down_proj"] == "r=1, alpha=1"
    assert found["model.layers.0.mlp.down_proj"] == "r=2, alpha=1"


@pytest.mark.parametrize(
    ("r", "message"),
    [
        ({"q_proj": 2}, "no value for"), ({"*": 2, "w_proj": 3}, "'w_proj' matches none"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit(r, message):
    model = llama()
    with pytest.raises(TargetError, match=message):
        sites(model, r=r)


def test_two_globs_that_are_equally_specific_must_agree():
    with pytest.raises(TargetError, match="both match"):
        sites(llama(), r={"**": 1, "?_proj": 2, "q_p?oj": 3, "q_pr?j": 4})
    assert sites(llama(), r={"**": 1, "q_p?oj": 3, "q_pr?j": 3})


component = st.text("abc0_", min_size=1, max_size=3)
names = st.lists(component, min_size=1, max_size=5).map(".".join)


@given(names, st.integers(1, 5))
def test_a_suffix_matches_whole_components(name, count):
    suffix = ".".join(name.split(".")[-count:])
    assert Patterns([suffix]).matching(name) == [suffix]
    assert Patterns(["x" + suffix]).matching(name) == []


@given(st.lists(names, unique=True, min_size=1, max_size=6), names)
def test_patterns_agree_with_a_plain_reading(patterns, name):
    expected = {p for p in patterns if name == p or name.endswith("." + p)}
    assert set(Patterns(patterns).matching(name)) == expected


def test_the_most_specific_pattern_decides_whatever_their_order():
    site = next(s for s in walk(llama()) if s.name == "model.layers.0.self_attn.q_proj")
    values = {"**": 1, "q_proj": 2, "self_attn.q_proj": 3, "^model.layers.0.self_attn.q_proj": 4}
    for drop in (None, "^model.layers.0.self_attn.q_proj", "self_attn.q_proj", "q_proj"):
        values.pop(drop, None)
        for order in (list(values), list(reversed(values))):
            assert PerSite({k: values[k] for k in order}, "r").at(site) == max(values.values())


def test_walking_stops_at_adapters_and_survives_cycles():
    model = llama()
    before = [s.name for s in walk(model)]
    peftkit.inject(model, LoRAConfig(r=1))
    assert [s.name for s in walk(model)] == before
    loop = nn.Module()
    loop.inner = nn.Linear(2, 2)
    loop.inner.parent = loop
    assert {s.name for s in walk(loop)} == {"", "inner"}


def test_a_bare_module_is_a_model():
    lone = nn.Linear(3, 2)
    peftkit.inject(lone, LoRAConfig(r=1, targets=lambda name, module: True))
    assert lone(torch.ones(1, 3)).requires_grad
    peftkit.eject(lone)
    assert type(lone) is nn.Linear
