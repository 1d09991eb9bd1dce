"""Merging: what is refused, what is kept, and what a merged adapter notices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peftkit
from peftkit import LoRAConfig, NotMergeable
from peftkit.testing.models import Tied, drawn, evaluated, ids, llama


def adapted(**kwargs):
    model = llama(**kwargs)
    peftkit.inject(model, LoRAConfig(r=2))
    draw(model)
    return model


def draw(model, *names):
    with torch.no_grad():
        for p in peftkit.parameters(model, *names):
            p.normal_(std=0.3)


@pytest.mark.parametrize("target", ["embed", "lm_head", ["embed", "lm_head"]])
def test_a_tied_weight_is_refused_and_named(target):
    model = drawn(Tied())
    peftkit.inject(model, LoRAConfig(r=2, targets=target))
    draw(model)
    before = evaluated(model, ids(11))
    with pytest.raises(NotMergeable, match=r"'embed.weight' and 'lm_head.weight' share one weight"):
        peftkit.merge(model)
    assert torch.equal(evaluated(model, ids(11)), before)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    peftkit.merge(model)
    assert torch.allclose(evaluated(model, ids(11)), before, atol=1e-5)


def test_weights_that_are_views_of_one_tensor_are_refused():
    both = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(both[:4])
    model[1].weight = nn.Parameter(both[2:6])
    peftkit.inject(model, LoRAConfig(r=1, targets="0"))
    with pytest.raises(NotMergeable, match="share one weight"):
        peftkit.merge(model)


def test_merging_some_leaves_the_others_acting():
    model = llama()
    peftkit.inject(model, LoRAConfig(r=2), name="a")
    draw(model, "a")
    peftkit.inject(model, LoRAConfig(r=1, targets="q_proj"), name="b")
    draw(model, "b")
    peftkit.activate(model, "a", "b")
    before = evaluated(model, ids())
    peftkit.merge(model, "a")
    assert torch.allclose(evaluated(model, ids()), before, atol=1e-5)
    with pytest.raises(ValueError, match="cannot stop to act"):
        peftkit.activate(model, "b")
    peftkit.activate(model, "a")
    peftkit.activate(model, "a", "b")
    peftkit.merge(model, "b")
    assert torch.allclose(evaluated(model, ids()), before, atol=1e-5)
    peftkit.unmerge(model)
    assert torch.equal(evaluated(model, ids()), before)


def test_merging_an_adapter_that_does_not_act_is_refused():
    model = adapted()
    peftkit.inject(model, LoRAConfig(r=1), name="b")
    with pytest.raises(ValueError, match="'default' is not active"):
        peftkit.merge(model, "default")


def test_without_its_base_a_merge_is_final():
    model = adapted()
    classes = [type(m) for m in llama().modules()]
    before = evaluated(model, ids())
    peftkit.merge(model, keep_base=False)
    assert torch.allclose(evaluated(model, ids()), before, atol=1e-5)
    assert peftkit.adapters(model) == {}
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())


def test_a_final_merge_leaves_other_adapters_on_the_new_base():
    model = adapted()
    peftkit.inject(model, LoRAConfig(r=1, targets="q_proj"), name="user")
    draw(model, "user")
    peftkit.activate(model, "default", "user")
    before = evaluated(model, ids())
    peftkit.merge(model, "default", keep_base=False)
    assert list(peftkit.adapters(model)) == ["user"] and peftkit.active(model) == ("user",)
    assert torch.allclose(evaluated(model, ids()), before, atol=1e-5)


def test_a_merged_adapter_notices_that_it_was_changed():
    model = adapted()
    peftkit.merge(model)
    adapter = model.model.layers[0].mlp.up_proj.peftkit.default
    with torch.no_grad():
        adapter.lora_B.mul_(2)
    with pytest.raises(RuntimeError, match="changed while merged"):
        evaluated(model, ids())
    peftkit.unmerge(model)
    evaluated(model, ids())


def test_a_merged_adapter_notices_that_its_scale_was_changed():
    model = adapted()
    peftkit.merge(model)
    model.model.layers[0].mlp.up_proj.peftkit.default.scale = 7.0
    with pytest.raises(RuntimeError, match="changed while merged"):
        evaluated(model, ids())


def test_an_optimizer_does_not_move_a_merged_adapter():
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(ids()).logits.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    peftkit.merge(model)
    before = evaluated(model, ids())
    assert not any(p.requires_grad for p in model.parameters())
    optimizer.step()
    assert torch.equal(evaluated(model, ids()), before)


def test_loading_weights_into_a_merged_host_is_refused():
    model = adapted()
    base = llama().state_dict()
    peftkit.merge(model)
    with pytest.raises(RuntimeError, match="hold a merged adapter"):
        model.load_state_dict(base, strict=False)
    peftkit.unmerge(model)
    model.load_state_dict(base, strict=False)


@pytest.mark.parametrize("verb", ["inject", "load", "eject", "reset", "disabled", "merge"])
def test_verbs_that_would_change_a_merged_model_are_refused(verb, tmp_path):
    model = adapted()
    peftkit.save(model, tmp_path / "a")
    peftkit.merge(model)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="merged"):
        {
            "inject": lambda: peftkit.inject(model, LoRAConfig(r=1), name="b"),
            "load": lambda: peftkit.load(model, tmp_path / "a", name="b"),
            "eject": lambda: peftkit.eject(model),
            "reset": lambda: peftkit.reset(model),
            "disabled": lambda: peftkit.disabled(model).__enter__(),
            "merge": lambda: peftkit.merge(model),
        }[verb]()
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in state.items())


def test_a_value_that_is_not_finite_is_not_merged():
    model = adapted()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.peftkit.default.lora_B[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.*lora_B.*not finite"):
        peftkit.merge(model)
    assert peftkit.describe(model).rows[0].state == "active"


def test_weight_norm_put_on_an_adapted_module_is_not_merged():
    model = nn.Sequential(nn.Linear(4, 4))
    peftkit.inject(model, LoRAConfig(r=1, targets="0"))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(NotMergeable, match="ParametrizedLinear"):
        peftkit.merge(model)


def test_casting_a_merged_model_and_unmerging_is_casting_the_base():
    model = adapted()
    peftkit.merge(model)
    model.to(torch.bfloat16)
    peftkit.unmerge(model)
    peftkit.eject(model)
    assert all(torch.equal(t, llama().to(torch.bfloat16).state_dict()[k]) for k, t in model.state_dict().items())


def test_merging_in_half_precision_rounds_once():
    """Against rounding ΔW first and the sum again, as adding two bf16 tensors does."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 256).to(torch.bfloat16)
    model = nn.Sequential(linear)
    peftkit.inject(model, LoRAConfig(r=8, targets="0"))
    draw(model)
    adapter = model[0].peftkit.default
    delta = adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()
    exact = linear.weight.double() + delta
    peftkit.merge(model)
    assert torch.equal(linear.weight, exact.float().to(torch.bfloat16)) or (
        (linear.weight != exact.to(torch.bfloat16)).float().mean() < 1e-3
    )
