"""`restore` reads a stored adapter into the attached one: its values, in place, and nothing that differs otherwise."""

from __future__ import annotations

import dataclasses

import foreign_methods  # noqa: F401 - registers its methods
import pytest
import torch
from adapting import draw
from test_all_or_nothing import picture, same
from torch import nn

import peftkit
from peftkit import LoRAConfig, PrefixTuningConfig, StorageError
from peftkit.method import registered
from peftkit.testing import examples
from peftkit.testing.models import bert, drawn, evaluated, ids, llama


def adapters_of(model):
    return {k: t.clone() for k, t in model.state_dict().items() if ".peftkit." in k}


@pytest.mark.parametrize("config", [pytest.param(c, id=n) for n, c in examples(*registered().values())])
def test_every_method_is_restored_bit_for_bit(config, tmp_path):
    model = llama()
    peftkit.inject(model, config, name="mine")
    draw(model, 1)
    try:
        peftkit.save(model, tmp_path / "a", name="mine")
    except NotImplementedError:
        pytest.skip("a method that cannot be saved")
    before, objects = adapters_of(model), [id(p) for p in model.parameters()]
    expected = evaluated(model, ids())
    draw(model, 2)
    if getattr(config, "reparametrize", None):
        with pytest.raises(StorageError, match="parameters that are not kept"):
            peftkit.restore(model, tmp_path / "a", name="mine")
        return
    peftkit.restore(model, tmp_path / "a", name="mine")
    after = adapters_of(model)
    assert before.keys() == after.keys() and all(torch.equal(t, after[k]) for k, t in before.items())
    assert [id(p) for p in model.parameters()] == objects
    assert torch.equal(evaluated(model, ids()), expected)


def test_what_is_trained_beside_is_restored_too(tmp_path):
    model = llama(tie_word_embeddings=False)
    also = {"lm_head": None, "embed_tokens": [3, 5], "*.input_layernorm": None}
    peftkit.inject(model, LoRAConfig(r=2, init="pissa", also_train=also))
    peftkit.inject(model, LoRAConfig(r=1), name="other")
    peftkit.activate(model, "default", "other")
    draw(model, 1)
    peftkit.save(model, tmp_path / "a")
    before, expected = adapters_of(model), evaluated(model, ids())
    draw(model, 2)
    drawn_again = adapters_of(model)
    peftkit.restore(model, tmp_path / "a")
    after = adapters_of(model)
    for key in before:
        assert torch.equal(after[key], (drawn_again if ".other." in key else before)[key]), key
    assert not torch.equal(evaluated(model, ids()), expected)  # `other` is as it was drawn


def test_running_statistics_of_a_norm_come_back(tmp_path):
    model = drawn(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)))
    peftkit.inject(model, LoRAConfig(r=1, targets=["0", "2"], also_train=["1"]))
    model.train()(torch.randn(8, 4))
    peftkit.save(model, tmp_path / "a")
    before = adapters_of(model)
    model(torch.randn(8, 4))
    peftkit.restore(model, tmp_path / "a")
    assert all(torch.equal(t, before[k]) for k, t in adapters_of(model).items())


CONFIG = LoRAConfig(r=2, alpha=4, also_train={"embed_tokens": [3, 5]})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (LoRAConfig(r=3, alpha=4, also_train={"embed_tokens": [3, 5]}), "r=2.*r=3"),
        (dataclasses.replace(CONFIG, alpha=2), "alpha=4.*alpha=2"),
        (dataclasses.replace(CONFIG, dropout=0.5), "dropout=0.0.*dropout=0.5"),
        (dataclasses.replace(CONFIG, layers=0), "stored adapter has 'model.layers.1"),
        (dataclasses.replace(CONFIG, also_train=()), "stored adapter has 'model.embed_tokens'"),
        (dataclasses.replace(CONFIG, also_train={"embed_tokens": [3, 6]}), r"rows \[3, 5\].*rows \[3, 6\]"),
        (
            dataclasses.replace(CONFIG, also_train=["lm_head", "embed_tokens"]),
            "'lm_head', the stored adapter is not|rows",
        ),
        (dataclasses.replace(CONFIG, dtype=torch.float64), "dtype"),
        (PrefixTuningConfig(length=2), "method='lora'.*method='prefix"),
    ],
    ids=str,
)
def test_what_differs_is_named_and_nothing_is_changed(other, message, tmp_path):
    model = llama(tie_word_embeddings=False)
    peftkit.inject(model, CONFIG)
    draw(model, 1)
    peftkit.save(model, tmp_path / "a")
    peftkit.eject(model)
    peftkit.inject(model, other)
    draw(model, 2)
    before = picture(model)
    with pytest.raises(StorageError, match=message):
        peftkit.restore(model, tmp_path / "a")
    same(before, picture(model))


def test_a_pattern_may_be_said_otherwise(tmp_path):
    model = bert()
    peftkit.inject(model, LoRAConfig(r=2, targets=["query", "value"]))
    draw(model, 1)
    expected = {k: t.clone() for k, t in model.state_dict().items()}
    peftkit.save(model, tmp_path / "a")
    peftkit.eject(model)
    peftkit.inject(model, LoRAConfig(r=2, targets=lambda name, module: name.endswith(("query", "value"))))
    peftkit.restore(model, tmp_path / "a")
    found = model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(t, found[k]) for k, t in expected.items())


def test_not_into_a_merged_one_nor_another_base(tmp_path):
    model = llama()
    peftkit.inject(model, LoRAConfig(r=2))
    peftkit.save(model, tmp_path / "a")
    peftkit.merge(model)
    with pytest.raises(ValueError, match="merged"):
        peftkit.restore(model, tmp_path / "a")
    peftkit.unmerge(model)
    with pytest.raises(KeyError, match="no adapter 'b'"):
        peftkit.restore(model, tmp_path / "a", name="b")
    other = llama(hidden_act="gelu")
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(1)
    peftkit.inject(other, LoRAConfig(r=2))
    with pytest.raises(StorageError, match="another base"):
        peftkit.restore(other, tmp_path / "a")
    peftkit.restore(other, tmp_path / "a", check_base=False)


def test_ties_that_came_apart_are_refused(tmp_path):
    tied = llama(tie_word_embeddings=True)
    peftkit.inject(tied, LoRAConfig(r=1, also_train=["lm_head", "embed_tokens"]))
    loose = llama(tie_word_embeddings=False)
    loose.load_state_dict({k: v for k, v in tied.state_dict().items() if "peftkit" not in k})
    peftkit.inject(loose, LoRAConfig(r=1, also_train=["lm_head", "embed_tokens"]))
    draw(loose, 3)
    peftkit.save(loose, tmp_path / "a")
    before = picture(tied)
    with pytest.raises(StorageError, match="tied"):
        peftkit.restore(tied, tmp_path / "a")
    same(before, picture(tied))
