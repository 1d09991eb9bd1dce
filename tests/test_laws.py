"""The laws, over every registered method, host and dtype they make sense for."""

from __future__ import annotations

import copy
import dataclasses
import threading
from itertools import product

import foreign_methods  # noqa: F401 - registers its methods, as any package may
import pytest
import torch
from models import CASES, Case, evaluated, output
from torch import nn

import peftkit
from peftkit.method import Config, registered

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
HALF = {torch.bfloat16, torch.float16}


def examples() -> list[tuple[str, Config]]:
    return [(f"{name}-{i}", c) for name, cls in registered().items() for i, c in enumerate(cls.examples())]


@dataclasses.dataclass
class Stand:
    """A model with one example of a method attached, and the model as it was."""

    model: nn.Module
    before: nn.Module
    x: torch.Tensor
    config: Config

    def draw(self, name: str = "default", scale: float = 0.3, seed: int = 5) -> None:
        """Values as after training: nothing is zero any more."""
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in peftkit.parameters(self.model, name):
                p.add_(scale * torch.randn(p.shape, generator=g).to(p))


def fitted(config: Config, case: Case) -> Config:
    targets = case.targets if config.targets == "all-linear" else config.targets
    r = {"*": config.r} if isinstance(getattr(config, "r", None), int) else None
    if case.name == "conv2d" and r is not None:
        return dataclasses.replace(config, targets=targets, r={**r, "2": 2 * config.r})  # its groups are two
    return dataclasses.replace(config, targets=targets)


def stand(case: Case, config: Config, dtype: torch.dtype = torch.float32) -> Stand:
    torch.manual_seed(0)
    before = case.make().to(dtype)
    model, x = copy.deepcopy(before), case.x()
    config = fitted(config, case)
    try:
        peftkit.inject(model, config)
    except peftkit.TargetError as refusal:
        if not any(word in str(refusal) for word in ("reads the weight", "no Linear", "matches no module", "but it ")):
            raise
        pytest.skip(f"{type(config).__name__} says: {refusal}")
    except ValueError as refusal:
        if "largest rank" not in str(refusal):
            raise
        pytest.skip(f"{type(config).__name__} says: {refusal}")
    # torch folds a product with a non-contiguous input differently where the weight is trained, which moves last bits
    before.requires_grad_(False)
    return Stand(model, before, x.to(dtype) if x.is_floating_point() else x, config)


def changed(model: nn.Module) -> set[str]:
    """Names of the parameters that adapters change where they are read."""
    grafts = [(path, m.peftkit) for path, m in model.named_modules() if hasattr(type(m), "__grafted__")]
    return {f"{path}.{name}" for path, graft in grafts for adapter in graft.children() for name in adapter.merges}


every = pytest.mark.parametrize(
    ("case", "config"),
    [pytest.param(c, e, id=f"{c}-{n}") for c, (n, e) in product(CASES, examples())],
)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    """Whether `b` holds every tensor of `a`, bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(t, right[k]) for k, t in left.items())


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_law_1_attaching_changes_no_bit_of_the_output(case, config, dtype):
    s = stand(case, config, dtype)
    if s.config.identity == "none":
        pytest.skip(f"{type(config).__name__} promises no identity")
    for training in (False, True):
        if training and (case.name in ("llama", "gpt2", "bert") or getattr(config, "dropout", 0)):
            continue  # dropout of their own
        compute = output if training else evaluated
        for name, p in s.before.named_parameters():  # what is read there is a sum that carries gradients
            p.requires_grad_(training and case.read and name in changed(s.model))
        found = compute(s.model.train(training), s.x)
        expected = compute(s.before.train(training), s.x)
        if s.config.identity == "bits":
            assert torch.equal(found, expected)
        else:
            wider = {torch.float64: 1e-5}.get(dtype, 64 * torch.finfo(dtype).eps)
            assert torch.allclose(found, expected, rtol=wider, atol=wider * float(expected.detach().abs().max()))


@every
def test_law_2_names_objects_hooks_and_classes_stay(case, config):
    torch.manual_seed(0)
    model = case.make()
    calls = []
    hooked = next(
        m
        for m in model.modules()
        if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.LayerNorm) or type(m).__name__ == "Conv1D"
    )
    hooked.register_forward_hook(lambda *_: calls.append(1))
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    keys = list(model.state_dict())
    try:
        peftkit.inject(model, fitted(config, case))
    except ValueError as refusal:
        pytest.skip(str(refusal))
    after = model.state_dict()
    assert all(k in after for k in keys)
    now = dict(model.named_parameters())
    assert all(now[k] is p for k, p in parameters.items())
    for name, module in modules.items():
        assert model.get_submodule(name) is module
        assert isinstance(module, type(module).__mro__[1] if hasattr(type(module), "__grafted__") else type(module))
    assert hooked._forward_hooks


@every
def test_law_4_ejecting_gives_everything_back(case, config):
    torch.manual_seed(0)
    model = case.make()
    next(iter(model.parameters())).requires_grad_(False)
    classes = [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    contents = [set(m.__dict__) for m in model.modules()]
    before = copy.deepcopy(model)
    try:
        peftkit.inject(model, fitted(config, case))
    except ValueError as refusal:
        pytest.skip(str(refusal))
    output(model, case.x())
    peftkit.eject(model)
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [set(m.__dict__) for m in model.modules()] == contents
    assert list(model.state_dict()) == list(before.state_dict()) and same_bits(before, model)
    assert torch.equal(output(model, case.x()), output(before, case.x()))


@every
def test_law_5_only_the_adapter_trains(case, config):
    s = stand(case, config)
    trained = peftkit.parameters(s.model)
    start = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(s.model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):  # a B that starts at zero keeps A still in the first step
        optimizer.zero_grad()
        output(s.model, s.x).float().square().mean().backward()
        optimizer.step()
    assert same_bits(s.before, s.model)
    moved = [not torch.equal(a, p) for a, p in zip(start, trained, strict=True)]
    assert all(moved), f"{moved.count(False)} of {len(moved)} tensors never moved"


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_law_6_merging_is_forward(case, config, dtype):
    s = stand(case, config, dtype)
    s.draw()
    reference = copy.deepcopy(s.model).to(torch.float64)
    x = s.x.double() if s.x.is_floating_point() else s.x
    exact = evaluated(reference, x)
    unmerged = evaluated(s.model, s.x)
    try:
        peftkit.merge(s.model)
    except peftkit.NotMergeable as refusal:
        if "share one weight" not in str(refusal) and s.config.method == "lora":
            raise
        pytest.skip(str(refusal))
    merged = evaluated(s.model, s.x)
    scale = float(exact.detach().abs().max())
    of_merged = float((merged.double() - exact).abs().max())
    of_unmerged = float((unmerged.double() - exact).abs().max())
    assert of_merged <= 2 * of_unmerged + 4 * torch.finfo(dtype).eps * scale
    assert not torch.allclose(merged.double(), evaluated(s.before.double(), x), rtol=1e-3)
    with pytest.raises(ValueError, match="merged"), peftkit.disabled(s.model):
        pass


@every
def test_law_7_unmerging_is_exact_a_hundred_times(case, config):
    s = stand(case, config, torch.bfloat16)
    s.draw()
    before = evaluated(s.model, s.x)
    for _ in range(100 if case.name == "linear" else 3):
        try:
            peftkit.merge(s.model)
        except peftkit.NotMergeable as refusal:
            pytest.skip(str(refusal))
        assert not same_bits(s.before, s.model)
        peftkit.unmerge(s.model)
        assert same_bits(s.before, s.model)
    assert torch.equal(evaluated(s.model, s.x), before)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_law_8_loading_gives_back_what_was_saved(case, config, dtype, tmp_path):
    s = stand(case, config, dtype)
    s.draw()
    peftkit.save(s.model, tmp_path / "adapter")
    other = copy.deepcopy(s.before)
    peftkit.load(other, tmp_path / "adapter")
    assert torch.equal(evaluated(other, s.x), evaluated(s.model, s.x))
    peftkit.save(other, tmp_path / "again")
    name = "adapter_model.safetensors"
    from safetensors.torch import load_file

    first, second = load_file(tmp_path / "adapter" / name), load_file(tmp_path / "again" / name)
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[k]) and t.dtype == second[k].dtype for k, t in first.items())


@every
def test_law_10_a_name_that_matches_nothing_is_an_error(case, config):
    model = case.make()
    before = copy.deepcopy(model)
    for wrong in ({"targets": ["no_such_module"]}, {"exclude": ["no_such_module"]}, {"also_train": ["no_such_module"]}):
        broken = dataclasses.replace(fitted(config, case), **wrong)
        with pytest.raises(ValueError):
            peftkit.inject(model, broken)
        assert peftkit.adapters(model) == {}
        assert same_bits(before, model) and [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
        assert all(p.requires_grad for p in model.parameters())


@every
def test_law_13_threads_do_not_see_each_other(case, config):
    s = stand(case, config)
    s.draw()
    acting, base = evaluated(s.model, s.x), evaluated(s.before, s.x)
    barrier, found = threading.Barrier(2), {}

    def run(name: str, without: bool) -> None:
        results = []
        barrier.wait()
        for _ in range(20):
            if without:
                with peftkit.disabled(s.model):
                    results.append(evaluated(s.model, s.x))
            else:
                results.append(evaluated(s.model, s.x))
        found[name] = results

    threads = [threading.Thread(target=run, args=a) for a in (("without", True), ("with", False))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(y, base) for y in found["without"])
    assert all(torch.equal(y, acting) for y in found["with"])
    assert not torch.equal(acting, base)


@every
def test_two_adapters_add_up_and_either_can_leave(case, config):
    s = stand(case, config, torch.float64)
    s.draw(seed=5)
    peftkit.inject(s.model, s.config, name="second")
    s.draw("second", seed=6)
    x = s.x
    with peftkit.using(s.model, "default"):
        first = evaluated(s.model, x)
    peftkit.activate(s.model, "default", "second")
    both = evaluated(s.model, x)
    peftkit.activate(s.model, "second", "default")
    assert torch.allclose(evaluated(s.model, x), both, rtol=1e-9)
    peftkit.eject(s.model, "second")
    peftkit.activate(s.model, "default")
    assert torch.equal(evaluated(s.model, x), first)
    assert not torch.allclose(first, both)
