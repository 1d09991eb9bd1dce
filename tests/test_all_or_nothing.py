"""Law 3: a verb that raises leaves the model bit for bit as it was, wherever it was when it did."""

from __future__ import annotations

import pytest
import torch

import peftkit
from peftkit import LoRAConfig
from peftkit.methods.lora import LoRAAdapter
from peftkit.testing.models import drawn, evaluated, ids, llama


class Failure(Exception):
    """Ours."""


def picture(model):
    """Everything about a model that a verb could leave changed."""
    return {
        "modules": [(n, id(m), type(m), sorted(m.__dict__), sorted(m._modules)) for n, m in model.named_modules()],
        "tensors": {k: (id(t), t.clone()) for k, t in model.state_dict(keep_vars=True).items()},
        "flags": {k: p.requires_grad for k, p in model.named_parameters()},
        "adapters": peftkit.adapters(model),
        "active": peftkit.active(model),
    }


def same(a, b):
    tensors_a, tensors_b = a["tensors"], b["tensors"]
    assert {**a, "tensors": None} == {**b, "tensors": None}
    assert {k: v[0] for k, v in tensors_a.items()} == {k: v[0] for k, v in tensors_b.items()}
    assert all(torch.equal(t, tensors_b[k][1]) for k, (_, t) in tensors_a.items())


def failing_at(count, original):
    """`original`, until it has been called so often."""
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) > count:
            raise Failure
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("count", [0, 3, 13])
@pytest.mark.parametrize("where", ["build", "reset", "setup", "graft"])
@pytest.mark.parametrize("first", [True, False])
def test_inject(monkeypatch, count, where, first):
    model = llama()
    if not first:
        peftkit.inject(model, LoRAConfig(r=1), name="first")
    before = picture(model)
    if where == "build":
        monkeypatch.setattr(LoRAConfig, "build", failing_at(count, LoRAConfig.build))
    elif where == "reset":
        monkeypatch.setattr(LoRAAdapter, "reset_parameters", failing_at(count, LoRAAdapter.reset_parameters))
    elif where == "setup":
        monkeypatch.setattr(LoRAConfig, "setup", failing_at(0, LoRAConfig.setup))
    else:
        from peftkit import ledger

        monkeypatch.setattr(ledger, "graft", failing_at(count, ledger.graft))
    with pytest.raises(Failure):
        peftkit.inject(model, LoRAConfig(r=2, also_train=["lm_head"]))
    same(before, picture(model))
    monkeypatch.undo()
    peftkit.inject(model, LoRAConfig(r=2))
    evaluated(model, ids())


@pytest.mark.parametrize("count", [0, 5, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(monkeypatch, count, dtype):
    model = llama().to(dtype)
    peftkit.inject(model, LoRAConfig(r=2))
    with torch.no_grad():
        [p.normal_() for p in peftkit.parameters(model)]
    before = picture(model)
    monkeypatch.setattr(LoRAAdapter, "merge_", failing_at(count, LoRAAdapter.merge_))
    with pytest.raises(Failure):
        peftkit.merge(model)
    same(before, picture(model))
    monkeypatch.undo()
    peftkit.merge(model)
    peftkit.unmerge(model)
    same(before, picture(model))


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("where", ["build", "load_tensors"])
def test_load(monkeypatch, tmp_path, count, where):
    model = llama()
    peftkit.inject(model, LoRAConfig(r=2))
    peftkit.save(model, tmp_path / "a")
    peftkit.eject(model)
    before = picture(model)
    target = LoRAConfig if where == "build" else LoRAAdapter
    monkeypatch.setattr(target, where, failing_at(count, getattr(target, where)))
    with pytest.raises(Failure):
        peftkit.load(model, tmp_path / "a")
    same(before, picture(model))


def test_a_verb_that_refuses_changes_nothing(tmp_path):
    model = llama()
    peftkit.inject(model, LoRAConfig(r=2), name="a")
    peftkit.inject(model, LoRAConfig(r=1, targets="q_proj"), name="b")
    before = picture(model)
    for verb in (
        lambda: peftkit.inject(model, LoRAConfig(r=2), name="a"),
        lambda: peftkit.inject(model, LoRAConfig(r=2), name="../x"),
        lambda: peftkit.inject(model, LoRAConfig(r=999), name="c"),
        lambda: peftkit.inject(model, {"r": 2}, name="c"),
        lambda: peftkit.activate(model, "a", "c"),
        lambda: peftkit.eject(model, "a", "c"),
        lambda: peftkit.merge(model, "a"),
        lambda: peftkit.unmerge(model),
        lambda: peftkit.save(model, tmp_path / "c", name="c"),
        lambda: peftkit.load(model, tmp_path / "c", name="c"),
        lambda: peftkit.load(model, tmp_path, name="a"),
        lambda: peftkit.reset(model, "c"),
        lambda: peftkit.parameters(model, "a"),
        lambda: peftkit.param_groups(model, lr=-1.0),
    ):
        with pytest.raises((ValueError, KeyError, TypeError)):
            verb()
        same(before, picture(model))
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_raise_give_back_what_acted():
    model = drawn(llama())
    peftkit.inject(model, LoRAConfig(r=2), name="a")
    peftkit.inject(model, LoRAConfig(r=2), name="b")
    with pytest.raises(Failure), peftkit.using(model, "a"):
        with pytest.raises(Failure), peftkit.disabled(model):
            assert peftkit.active(model) == ()
            raise Failure
        assert peftkit.active(model) == ("a",)
        raise Failure
    assert peftkit.active(model) == ("b",)
