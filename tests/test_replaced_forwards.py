"""A forward that somebody replaced, by hand or through accelerate, is kept and gets the adapter."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from adapting import CONFIG, added, draw, pairs
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig
from peftkit.testing import models
from peftkit.testing.models import drawn, evaluated, numbers

# -- a forward that was replaced ------------------------------------------------------------------------------------------


def doubled(module: nn.Module) -> None:
    """A monkey-patch that calls what it replaces."""
    before = module.forward
    module.forward = lambda x: 2 * before(x)


def own_kernel(module: nn.Module) -> None:
    """A monkey-patch that does not."""
    module.forward = types.MethodType(lambda self, x: 2 * (x @ self.weight.t() + self.bias), module)


def checkpointed(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda x: 2 * torch.utils.checkpoint.checkpoint(before, x, use_reentrant=False)


PATCHES = (doubled, own_kernel, checkpointed)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("patch", PATCHES)
def test_a_replaced_forward_is_kept_and_gets_the_adapter(patch, after):
    model, x = drawn(nn.Sequential(nn.Linear(6, 4))), numbers(3, 6)()
    base = evaluated(model, x)
    if not after:
        patch(model[0])
        mine = model[0].__dict__["forward"]
    peftkit.inject(model, CONFIG)
    if after:
        patch(model[0])
    assert torch.equal(evaluated(model, x), 2 * base)
    draw(model)
    want = 2 * base.double() + added(model, "0", x)
    torch.testing.assert_close(evaluated(model, x).double(), want, rtol=1e-5, atol=1e-5)
    model(x).sum().backward()
    assert all(p.grad is not None for p in peftkit.parameters(model))
    with pytest.raises(ValueError, match="does not compute with `weight` and `bias` alone"):
        peftkit.merge(model)
    peftkit.eject(model)
    assert torch.equal(evaluated(model, x), 2 * base)
    if not after:
        assert model[0].__dict__["forward"] is mine


def test_replacements_may_be_replaced_and_put_back():
    model, x = drawn(nn.Sequential(nn.Linear(6, 4))), numbers(3, 6)()
    base = evaluated(model, x)
    keys = set(model[0].__dict__)
    peftkit.inject(model, CONFIG)
    draw(model)
    delta = added(model, "0", x)
    before = model[0].forward
    doubled(model[0])
    once = model[0].forward
    doubled(model[0])
    for factor, forward in ((4, None), (2, once), (1, before)):
        if forward is not None:
            model[0].forward = forward
        torch.testing.assert_close(evaluated(model, x).double(), factor * base.double() + delta, rtol=1e-5, atol=1e-5)
    with mock.patch.object(model[0], "forward", lambda x: 0 * x[:, :4]):
        torch.testing.assert_close(evaluated(model, x).double(), delta, rtol=1e-5, atol=1e-5)
    peftkit.eject(model)
    assert set(model[0].__dict__) == keys
    assert torch.equal(evaluated(model, x), base)
    assert torch.equal(before(x), model(x)), "a bound method that somebody kept computes the base"


def test_a_replaced_forward_is_seen_through_its_signature_and_copied():
    import inspect

    model, x = drawn(nn.Sequential(nn.Linear(6, 4))), numbers(3, 6)()
    peftkit.inject(model, CONFIG)
    draw(model)
    assert list(inspect.signature(model[0].forward).parameters) == ["input"]
    model[0].forward = functools.partial(patched, model[0])
    other = copy.deepcopy(model)
    want = evaluated(model, x)
    with torch.no_grad():
        model[0].weight.zero_()
        [p.zero_() for p in peftkit.parameters(model)]
    assert torch.equal(evaluated(other, x), want)


def patched(module: nn.Module, x: Tensor) -> Tensor:
    return torch.relu(nn.functional.linear(x, module.weight, module.bias))


def test_a_class_s_forward_patched_later_is_called():
    class Mine(nn.Linear):
        pass

    model, x = drawn(nn.Sequential(Mine(6, 4))), numbers(3, 6)()
    peftkit.inject(model, CONFIG)
    with mock.patch.object(Mine, "forward", lambda self, x: 3 * nn.Linear.forward(self, x)), peftkit.disabled(model):
        assert torch.equal(evaluated(model, x), 3 * nn.Linear.forward(model[0], x))


def attention() -> nn.Module:
    return drawn(models.Attend())


@pytest.mark.parametrize("target", ["in_proj", "out_proj"])
def test_attention_with_a_replaced_forward_is_read_through_it_or_refused(target):
    model, x = attention(), numbers(2, 5, 8)()
    peftkit.inject(model, LoRAConfig(r=2, targets=target))
    draw(model)
    want = evaluated(model, x)
    before = model.attn.forward
    model.attn.forward = lambda *args: (2 * before(*args)[0], None)
    torch.testing.assert_close(evaluated(model, x), 2 * want)
    model.attn.forward = lambda q, k, v: (q @ model.attn.out_proj.weight.t(), None)
    with pytest.raises(RuntimeError, match="MultiheadAttention's own does not call it, so nothing reads"):
        model(x)
    with peftkit.disabled(model):
        model(x)

    patched_before = attention()
    patched_before.attn.forward = lambda q, k, v: (q, None)
    with pytest.raises(ValueError, match="its forward was replaced by one that reads the weights past the adapter"):
        peftkit.inject(patched_before, LoRAConfig(r=2, targets=target))
    assert type(patched_before.attn) is nn.MultiheadAttention


def test_an_encoder_layer_whose_forward_was_replaced_before_is_refused():
    layer = drawn(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True))
    doubled(layer)
    with pytest.raises(ValueError, match="TransformerEncoderLayer reads the weights of its children"):
        peftkit.inject(nn.Sequential(layer), LoRAConfig(r=2, targets="linear1"))
    assert type(layer.linear1) is nn.Linear
    assert layer.linear1.weight.requires_grad


# -- accelerate -----------------------------------------------------------------------------------------------------------


def offloaded(model: nn.Module, **kwargs: Any) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"), **kwargs)


OFFLOAD: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Any]] = {
    "linear": (models.linear, numbers(3, 6), "all-linear"),
    "llama": (models.llama, models.ids, ["self_attn.q_proj", "down_proj", "embed_tokens"]),
    "conv": (models.convolutions, numbers(2, 2, 9, 9), ["0", "2"]),
    "tied": (lambda: drawn(models.Tied()), lambda: models.ids(11), ["mid"]),
}


@pytest.mark.parametrize(("make", "x", "targets"), OFFLOAD.values(), ids=OFFLOAD.keys())
@pytest.mark.parametrize("after", [False, True])
def test_offloading_before_and_after_attaching(make, x, targets, after, tmp_path):
    config = LoRAConfig(r=2, targets=targets)
    model, x = make(), x()
    peftkit.inject(model, config)
    draw(model)
    want, values = evaluated(model, x), pairs(model)
    peftkit.save(model, tmp_path / "a")

    other = make()
    if after:
        peftkit.load(other, tmp_path / "a")
        offloaded(other)
        assert all(p.is_meta for p in other.parameters())
    else:
        offloaded(other)
        peftkit.inject(other, config)
        other.load_state_dict(values, strict=False)
        found = pairs(other)
        assert all(torch.equal(found[n], values[n]) for n in values)
    torch.testing.assert_close(evaluated(other, x), want, rtol=0, atol=0)
    torch.testing.assert_close(evaluated(other, x), want, rtol=0, atol=0)
    with pytest.raises(ValueError, match="cannot be merged: accelerate has offloaded its weight"):
        peftkit.merge(other)
    if not after:
        peftkit.eject(other)
        base = evaluated(make(), x)
        assert torch.equal(evaluated(other, x), base)


def test_offloaded_attention_is_read_when_its_weights_are_there():
    model, x = attention(), numbers(2, 5, 8)()
    peftkit.inject(model, LoRAConfig(r=2, targets="attn"))
    draw(model)
    want = evaluated(model, x)
    offloaded(model, preload_module_classes=["MultiheadAttention"])
    assert torch.equal(evaluated(model, x), want)


def test_a_block_that_is_offloaded_in_one_piece_is_refused():
    model = offloaded(models.llama(), preload_module_classes=["LlamaMLP"])
    message = r"'model\.layers\.0\.mlp\.gate_proj' lies in 'model\.layers\.0\.mlp', which accelerate"
    with pytest.raises(ValueError, match=message):
        peftkit.inject(model, LoRAConfig(r=2, targets="mlp"))
    assert not pairs(model)
    peftkit.inject(model, LoRAConfig(r=2, targets="attention"))
    evaluated(model, models.ids())


def hooked(module: nn.Module, hook: Any = None) -> Any:
    hooks = pytest.importorskip("accelerate.hooks")

    class Count(hooks.ModelHook):
        seen = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.seen += 1
            return args, kwargs

    made = Count()
    hooks.add_hook_to_module(module, made)
    return made


@pytest.mark.parametrize("make", [models.linear, attention])
@pytest.mark.parametrize("order", ["hook, inject", "inject, hook", "inject, hook, hook"])
@pytest.mark.parametrize("end", ["eject, unhook", "unhook, eject"])
def test_hooks_come_and_go_in_any_order(make, order, end):
    from accelerate.hooks import remove_hook_from_module

    fresh = make()
    x = numbers(3, 6)() if isinstance(fresh, nn.Sequential) else numbers(2, 5, 8)()
    target = "0" if isinstance(fresh, nn.Sequential) else "attn"
    model = make()
    host = model.get_submodule(target)
    base, bare = evaluated(model, x), set(host.__dict__)
    config = LoRAConfig(r=2, targets=target)
    plainly = make()
    peftkit.inject(plainly, config)
    draw(plainly)
    want = evaluated(plainly, x)
    for step in order.split(", "):
        if step == "inject":
            peftkit.inject(model, config)
        else:
            hook = hooked(host)
    model.load_state_dict(plainly.state_dict())
    assert torch.equal(evaluated(model, x), want)
    assert hook.seen == 1
    for step in end.split(", "):
        if step == "eject":
            peftkit.eject(model)
            seen = hook.seen
            assert torch.equal(evaluated(model, x), base)
            assert hook.seen == seen + (end == "eject, unhook")
        else:
            remove_hook_from_module(host)
            if end == "unhook, eject":
                assert torch.equal(evaluated(model, x), want)
    assert torch.equal(evaluated(model, x), base)
    assert set(host.__dict__) - {"forward"} == bare
    assert type(host) is type(fresh.get_submodule(target))


def test_a_dispatched_model_is_merged_since_its_weights_are_there():
    accelerate = pytest.importorskip("accelerate")
    model, x = models.llama(), models.ids()
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert "forward" in model.model.layers[0].self_attn.q_proj.__dict__
    peftkit.inject(model, LoRAConfig(r=2))
    draw(model)
    apart = evaluated(model, x)
    peftkit.merge(model)
    torch.testing.assert_close(evaluated(model, x), apart, rtol=1e-4, atol=1e-5)
    peftkit.unmerge(model)
    assert torch.equal(evaluated(model, x), apart)
