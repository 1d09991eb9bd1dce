"""Hosts that compute otherwise, modules that cannot be grafted, and classes that change later."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch
from adapting import CONFIG, added, draw, pairs
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig
from peftkit.testing import models
from peftkit.testing.models import drawn, evaluated, numbers

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


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_quantised_linear_in_an_encoder_layer_is_called_and_not_read(when):
    """Its fast path would read the packed weight."""
    layer, x = drawn(nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)), numbers(2, 5, 32)()
    if when == "before":
        quantize(layer.linear1, AO)
    peftkit.inject(layer, LoRAConfig(r=2, alpha=4, targets=["linear1", "linear2"]))
    if when == "after":
        quantize(layer.linear1, AO)
    draw(layer)
    called = layer.train()(x).detach()  # in training its Linears are called
    torch.testing.assert_close(evaluated(layer.eval(), x), called, rtol=1e-4, atol=1e-5)
    with peftkit.disabled(layer):
        assert not torch.allclose(evaluated(layer, x), called)


def test_starting_from_the_values_of_a_quantised_weight_is_refused():
    with pytest.raises(ValueError, match="init='pissa' cannot start from the weight at '0': its weight is"):
        peftkit.inject(torchao(AO), LoRAConfig(r=2, targets="0", init="pissa"))


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
        with pytest.raises((RuntimeError, ValueError), match="made its class FSDPLinear out of GraftedLinear"):
            end(model)
        assert type(model[2]) is cls
        assert torch.equal(evaluated(model, x), want)
    model[2].__class__ = cls.__mro__[2]
    peftkit.eject(model)
    assert type(model[2]) is nn.Linear


@pytest.mark.parametrize("after", [False, True])
def test_fsdp2_shards_an_adapted_model_and_an_adapter_hangs_on_a_sharded_one(after, tmp_path):
    from torch.distributed import destroy_process_group, device_mesh, fsdp, init_process_group

    init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = device_mesh.init_device_mesh("cpu", (1,))
        model, plainly, x = models.llama(), models.llama(), models.ids()
        for m, shards in ((plainly, False), (model, True)):
            if after:
                peftkit.inject(m, LoRAConfig(r=2))
                draw(m)
            for part in [*m.model.layers, m] if shards else []:
                fsdp.fully_shard(part, mesh=mesh)
            if not after:
                peftkit.inject(m, LoRAConfig(r=2))
                draw(m)
            m(x).logits.square().mean().backward()
        found = zip(peftkit.parameters(model), peftkit.parameters(plainly), strict=True)
        for p, want in found:
            grad = getattr(p.grad, "full_tensor", lambda grad=p.grad: grad)()
            torch.testing.assert_close(grad, want.grad, rtol=1e-4, atol=1e-6)
        with pytest.raises(ValueError, match="its weight is a DTensor"):
            peftkit.merge(model)
        peftkit.eject(model)
    finally:
        destroy_process_group()


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
