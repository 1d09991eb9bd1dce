"""Hosts that compute otherwise, forwards that somebody replaced, and modules that cannot be grafted."""

from __future__ import annotations

import copy
import functools
import gc
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import models
import pytest
import torch
from models import drawn, evaluated, numbers
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig


def draw(model: nn.Module, *names: str) -> None:
    with torch.no_grad():
        for p in peftkit.parameters(model, *names):
            p.normal_(std=0.3)


def added(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """What the adapter at `path` adds, in fp64."""
    adapter = model.get_submodule(f"{path}.peftkit.default")
    a, b = adapter.lora_A.detach().double(), adapter.lora_B.detach().double()
    return 2.0 * x.double() @ a.t() @ b.t()


CONFIG = LoRAConfig(r=2, alpha=4, targets="0")

# -- quantised ----------------------------------------------------------------------------------------------------------


def bnb_8bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    layer.load_state_dict(drawn(nn.Linear(64, 32)).state_dict())
    return nn.Sequential(layer.to("cpu"))


def bnb_4bit(quant_type: str = "nf4") -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type=quant_type)
    layer.load_state_dict(drawn(nn.Linear(64, 32)).state_dict())
    return nn.Sequential(layer.to("cpu"))


def torchao(config: str) -> nn.Module:
    model = drawn(nn.Sequential(nn.Linear(64, 32)))
    quantize(model, config)
    return model


def quantize(model: nn.Module, config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, getattr(quantization, config)())


AO = "Int8WeightOnlyConfig"
QUANTISED = {
    "bitsandbytes-8bit": bnb_8bit,
    "bitsandbytes-nf4": bnb_4bit,
    "bitsandbytes-fp4": functools.partial(bnb_4bit, "fp4"),
    "torchao-int8": functools.partial(torchao, AO),
    "torchao-int8-dynamic": functools.partial(torchao, "Int8DynamicActivationInt8WeightConfig"),
}


@pytest.mark.parametrize("make", QUANTISED.values(), ids=QUANTISED.keys())
def test_the_delta_is_added_to_what_a_quantised_host_computes(make, tmp_path):
    model, x = make(), numbers(3, 64)()
    base = evaluated(model, x)
    peftkit.inject(model, CONFIG)
    assert torch.equal(evaluated(model, x), base)
    draw(model)
    torch.testing.assert_close(evaluated(model, x).double(), base.double() + added(model, "0", x), rtol=1e-5, atol=1e-5)

    with pytest.raises(ValueError, match="'0' cannot be merged: its weight is"):
        peftkit.merge(model)

    x.requires_grad_()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in peftkit.parameters(model))
    assert x.grad is not None

    peftkit.save(model, tmp_path / "a")
    other = make()
    peftkit.load(other, tmp_path / "a")
    assert torch.equal(evaluated(other, x.detach()), evaluated(model, x.detach()))
    peftkit.eject(model)
    assert torch.equal(evaluated(model, x.detach()), base)


def test_quantising_after_attaching():
    model, x = drawn(nn.Sequential(nn.Linear(64, 32))), numbers(3, 64)()
    peftkit.inject(model, CONFIG)
    draw(model)
    quantize(model, AO)
    want = torchao(AO)(x).double() + added(model, "0", x)
    torch.testing.assert_close(evaluated(model, x).double(), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="'0' cannot be merged: its weight is a Int8Tensor"):
        peftkit.merge(model)


@pytest.mark.parametrize("make", [bnb_8bit, bnb_4bit, functools.partial(torchao, AO)])
def test_training_a_quantised_host_whole_is_refused(make):
    model = nn.ModuleDict({"quantised": make()[0], "plain": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="'quantised' cannot be trained whole"):
        peftkit.inject(model, LoRAConfig(r=2, targets="plain", also_train="quantised"))


def test_starting_from_the_values_of_a_quantised_weight_is_refused():
    with pytest.raises(ValueError, match="init='pissa' cannot start from the weight at '0': its weight is"):
        peftkit.inject(torchao(AO), LoRAConfig(r=2, targets="0", init="pissa"))


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


def pairs(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".peftkit." in n}


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
    with pytest.raises(ValueError, match="'model.layers.0.mlp.gate_proj' lies in 'model.layers.0.mlp', which accelerate"):
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


# -- what cannot be grafted -------------------------------------------------------------------------------------------------


def with_attribute() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.peftkit = "mine"
    return layer


class Slotted(nn.Linear):
    __slots__ = ("more",)


class Final(nn.Linear):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError("nobody inherits from this")


def uninitialised() -> nn.Module:
    return nn.LazyLinear(4)


REFUSED = {
    "scripted": (lambda: torch.jit.script(nn.Linear(4, 4)), "it is a RecursiveScriptModule"),
    "old weight_norm": (lambda: torch.nn.utils.weight_norm(nn.Linear(4, 4)), "its weight is not a parameter but computed"),
    "new weight_norm": (
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "its weight is not a parameter but computed",
    ),
    "old spectral_norm": (
        lambda: torch.nn.utils.spectral_norm(nn.Linear(4, 4)), "its weight is not a parameter but computed",
    ),
    "orthogonal": (
        lambda: torch.nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), "its weight is not a parameter but computed",
    ),
    "bias parametrized": (
        lambda: nn.utils.parametrize.register_parametrization(nn.Linear(4, 4), "bias", nn.Identity()), "is parametrized",
    ),
    "attribute": (with_attribute, "it has an attribute 'peftkit' of its own"),
    "slots": (lambda: Slotted(4, 4), "Slotted has __slots__"),
    "no subclass": (lambda: Final(4, 4), "Final cannot be subclassed: nobody inherits from this"),
    "lazy": (uninitialised, "this LazyLinear has no shape yet"),
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), "an Embedding with max_norm rewrites its own weight"),
    "bilinear": (lambda: nn.Bilinear(4, 4, 4), "it is a Bilinear"),
    "transposed convolution": (lambda: nn.ConvTranspose1d(4, 4, 2), "it is a ConvTranspose1d"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_grafted_is_refused_by_name_and_nothing_changes(make, reason):
    model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": make()})
    kinds = {n: type(m) for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="'bad'") as caught:
        peftkit.inject(model, LoRAConfig(r=2, targets=["good", "bad"]))
    assert reason in str(caught.value)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    peftkit.inject(model, LoRAConfig(r=2, targets="good"))  # it is in nobody's way
    peftkit.eject(model)
    assert {n: type(m) for n, m in model.named_modules()} == kinds


def test_a_user_s_child_named_peftkit_is_walked_like_any_other():
    model = nn.ModuleDict({"peftkit": nn.Sequential(nn.Linear(4, 4)), "other": nn.Linear(4, 4)})
    report = peftkit.inject(model, LoRAConfig(r=2, targets="all-linear"))
    assert set(pairs(model)) == {
        f"{path}.peftkit.default.lora_{ab}" for path in ("peftkit.0", "other") for ab in "AB"
    }, report
    peftkit.eject(model)
    assert not pairs(model)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
def test_a_forward_that_does_more_than_its_kind_keeps_it_and_is_not_merged(kind):
    class More(kind):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    model = drawn(nn.Sequential(More(4, 4, *([1] if kind is nn.Conv1d else []))))
    x = numbers(2, 4, 4)()
    peftkit.inject(model, CONFIG)
    base = evaluated(model, x)
    draw(model)
    assert not torch.equal(evaluated(model, x), base)
    with pytest.raises(ValueError, match="the forward of this More does not compute with `weight` and `bias` alone"):
        peftkit.merge(model)


# -- classes that change later ----------------------------------------------------------------------------------------------


class Sharded:
    """What FSDP2 mixes into a module's class."""


def sharded(module: nn.Module) -> None:
    cls = type(module)
    module.__class__ = type(f"FSDP{cls.__name__}", (Sharded, cls), {})


def test_a_class_swapped_after_attaching_computes_and_is_not_lost_in_ejecting(tmp_path):
    model, x = models.linear(), numbers(3, 6)()
    peftkit.inject(model, LoRAConfig(r=2, targets="all-linear"))
    draw(model)
    want = evaluated(model, x)
    sharded(model[2])
    cls = type(model[2])
    assert torch.equal(evaluated(model, x), want)
    for end in (peftkit.eject, functools.partial(peftkit.merge, keep_base=False)):
        with pytest.raises(
            RuntimeError, match="something made its class FSDPLinear out of GraftedLinear after attaching"
        ):
            end(model)
        assert type(model[2]) is cls
        assert torch.equal(evaluated(model, x), want)
    model[2].__class__ = cls.__mro__[2]
    peftkit.eject(model)
    assert type(model[2]) is nn.Linear


def test_a_class_swapped_before_attaching_stays():
    model, x = models.linear(), numbers(3, 6)()
    sharded(model[0])
    cls = type(model[0])
    base = evaluated(model, x)
    peftkit.inject(model, CONFIG)
    assert isinstance(model[0], Sharded)
    assert torch.equal(evaluated(model, x), base)
    peftkit.eject(model)
    assert type(model[0]) is cls


def test_parametrizing_after_attaching_computes_with_the_new_weight():
    model, x = models.linear(), numbers(3, 6)()
    peftkit.inject(model, CONFIG)
    draw(model)
    want = evaluated(model[0], x)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    torch.testing.assert_close(evaluated(model[0], x), want)
    with pytest.raises(ValueError, match="cannot be merged"):
        peftkit.merge(model)
    with pytest.raises(RuntimeError, match="ParametrizedLinear"):
        peftkit.eject(model)
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    peftkit.eject(model)
    assert type(model[0]) is nn.Linear


def test_one_module_drops_out_and_nothing_keeps_it_alive():
    import weakref

    model = models.linear()
    peftkit.inject(model, LoRAConfig(r=2, targets="all-linear"))
    refs = [weakref.ref(m) for m in model.modules()]
    del model
    gc.collect()
    assert not [r for r in refs if r() is not None]
