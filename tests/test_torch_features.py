"""What people do with a model beside calling it: copy, save, generate, checkpoint, autocast, start on the meta device."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapting import CASES, adapted, close, draw, each, gradients, zero
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkit
from peftkit import LoRAConfig
from peftkit.testing import models
from peftkit.testing.models import drawn, evaluated, numbers, output

# -- copies -------------------------------------------------------------------------------------------------------------


def through_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [through_deepcopy, through_torch_save])
@each
def test_a_copy_has_all_verbs_and_shares_nothing(case, through):
    model, x = adapted(case, "one", "two"), case.x()
    want = evaluated(model, x)
    other = through(model)
    zero(model)
    del model
    gc.collect()
    assert torch.equal(evaluated(other, x), want)
    assert peftkit.active(other) == ("two",)
    peftkit.activate(other, "one", "two")
    both = evaluated(other, x)
    if case.name != "embedding":  # which is tied, so not merged
        peftkit.merge(other)
        torch.testing.assert_close(evaluated(other, x), both, rtol=1e-4, atol=1e-5)
        peftkit.unmerge(other)
        assert torch.equal(evaluated(other, x), both)
    peftkit.eject(other)
    fresh = case.make()
    assert [type(m) for m in other.modules()] == [type(m) for m in fresh.modules()]
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in fresh.parameters()]
    assert torch.equal(evaluated(other, x), evaluated(fresh, x))


@pytest.mark.parametrize("through", [through_deepcopy, through_torch_save])
def test_a_merged_model_is_copied_merged(through):
    case = CASES["linear"]
    model, x = adapted(case), case.x()
    apart = evaluated(model, x)
    peftkit.merge(model)
    merged = evaluated(model, x)
    other = through(model)
    zero(model)
    assert torch.equal(evaluated(other, x), merged)
    peftkit.unmerge(other)
    assert torch.equal(evaluated(other, x), apart)


def test_a_part_of_a_model_is_copied_with_its_adapters():
    case = CASES["llama"]
    model = adapted(case)
    layer = model.model.layers[0].mlp
    x = numbers(2, 16)()
    want = evaluated(layer, x)
    other = copy.deepcopy(layer)
    zero(model)
    peftkit.activate(model)
    assert torch.equal(evaluated(other, x), want)


def test_a_model_whose_targets_are_a_lambda_is_copied_and_saved():
    case = CASES["linear"]
    model, x = case.make(), case.x()
    peftkit.inject(model, LoRAConfig(r=2, targets=lambda name, module: isinstance(module, nn.Linear)))
    for through in (through_deepcopy, through_torch_save):
        other = through(model)
        assert torch.equal(evaluated(other, x), evaluated(model, x))
        peftkit.eject(other)


class Stateful(nn.Linear):
    """Leaves out of its state what cannot be pickled."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.file = open(__file__)  # noqa: SIM115

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "file"}


def test_a_class_s_own_idea_of_its_state_is_kept():
    model, x = drawn(nn.Sequential(Stateful(4, 4))), numbers(2, 4)()
    peftkit.inject(model, LoRAConfig(r=2, targets="0"))
    draw(model)
    for through in (through_deepcopy, through_torch_save):
        other = through(model)
        assert torch.equal(evaluated(other, x), evaluated(model, x))
        assert not hasattr(other[0], "file")
    model[0].file.close()


# -- generate -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}, {"do_sample": True}],
    ids=lambda o: next(iter(o), "dynamic cache"),
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate_takes_the_adapter_at_every_step(name, options):
    """Against a model whose weights hold the adapter."""
    if name == "gpt2" and "cache_implementation" in options:
        pytest.skip("one model with a static cache is enough")
    case = CASES[name]
    model, plainly, x = adapted(case), adapted(case), models.ids()
    for m in (model, plainly):
        with torch.no_grad():
            for p in peftkit.parameters(m):
                p.mul_(3)
    peftkit.merge(plainly, keep_base=False)
    found = []
    for m in (model, plainly, case.make()):
        torch.manual_seed(0)
        found.append(m.generate(x, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **options))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# -- checkpointing --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_transformers_checkpointing_gives_the_same_gradients(name, reentrant, dropout):
    case = CASES[name]
    model, x = adapted(case, dropout=dropout).train(), case.x()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    torch.manual_seed(1)
    want = gradients(model, x)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(1)
    close(gradients(model, x), want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv2d", "attention", "encoder"])
def test_torch_checkpointing_gives_the_same_gradients(name, reentrant):
    case = CASES[name]
    model, x = adapted(case), case.x().requires_grad_()
    want = gradients(model, x)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    close([p.grad for p in peftkit.parameters(model) if p.grad is not None], want)


def test_a_checkpoint_that_is_recomputed_after_a_switch_is_an_error_and_never_a_wrong_gradient():
    case = CASES["linear"]
    model, x = adapted(case, "one", "two"), case.x().requires_grad_()
    with peftkit.using(model, "one"):
        y = checkpoint(model, x, use_reentrant=False)
    with peftkit.using(model, "one", "two"), pytest.raises(RuntimeError, match="checkpoint"):
        y.sum().backward()


# -- autocast -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
@each
def test_autocast_computes_in_bf16_what_fp32_does(case, train):
    model, x = adapted(case), case.x()
    want = output(model, x).detach()
    base = case.make()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(train):
        y, plainly = output(model, x), output(base, x)
    assert y.dtype is plainly.dtype
    scale = want.abs().max()
    assert (y.float() - want).abs().max() < 0.05 * scale
    if train:
        y.square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype is p.dtype for p in peftkit.parameters(model))


# -- the meta device --------------------------------------------------------------------------------------------------------

META: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4)),
    "embedding": models.Tied,
    "attention": models.Attend,
    "conv3d": lambda: nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 2)),
}


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return META[name]().eval()


@pytest.mark.parametrize("name", META)
def test_a_model_on_the_meta_device_gets_its_weights_after_the_adapter(name):
    case = CASES[name]
    model, x, real = on_meta(name), case.x(), case.make()
    peftkit.inject(model, LoRAConfig(r=2, targets=case.targets))
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match="on the meta device"):
        peftkit.merge(model)
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict(), strict=False)
    peftkit.reset(model)
    assert torch.equal(evaluated(model, x), evaluated(real, x))
    peftkit.parameters(model)
    for p in peftkit.parameters(model):
        assert torch.isfinite(p).all()
    draw(model)
    gradients(model, x)


@pytest.mark.parametrize("name", ["linear", "embedding", "attention", "conv3d"])
def test_weights_assigned_to_a_meta_model_keep_the_adapter(name):
    """As transformers loads: the parameters are replaced, not written."""
    case = CASES[name]
    model, x, real = on_meta(name), case.x(), case.make()
    peftkit.inject(model, LoRAConfig(r=2, targets=case.targets))
    model.load_state_dict(real.state_dict(), strict=False, assign=True)
    peftkit.reset(model)
    assert torch.equal(evaluated(model, x), evaluated(real.requires_grad_(False), x))
    draw(model)
    gradients(model, x)


@pytest.mark.parametrize("name", ["linear", "embedding", "attention", "conv3d"])
def test_an_adapter_loaded_onto_a_meta_model_acts_when_the_weights_come(name, tmp_path):
    case = CASES[name]
    trained, x = adapted(case), case.x()
    peftkit.save(trained, tmp_path / "a")
    model = on_meta(name)
    peftkit.load(model, tmp_path / "a", check_base=False)
    model.load_state_dict(case.make().state_dict(), strict=False, assign=True)
    torch.testing.assert_close(evaluated(model, x), evaluated(trained, x), rtol=0, atol=0)


def test_a_resting_adapter_wakes_after_its_tensors_were_replaced():
    case = CASES["linear"]
    model, x = on_meta("linear"), case.x()
    for name in ("one", "two"):
        peftkit.inject(model, LoRAConfig(r=2, targets=case.targets), name=name)
    model.to_empty(device="cpu")
    model.load_state_dict(case.make().state_dict(), strict=False)
    peftkit.reset(model)
    peftkit.activate(model, "one")
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"one"}
    draw(model)
    gradients(model, x)
