"""The laws of the contract, over one case and one example of a method; `docs/design.md` has all of them.

What needs more than one method and one model to be tested (files from elsewhere, kernels, imports) has tests of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftkit import api
from peftkit.method import Config
from peftkit.storage import StorageError
from peftkit.storage.layout import TENSORS
from peftkit.testing.models import Case, evaluated, output
from peftkit.testing.stands import attached, changed, fitted, made, same_bits, stand

Law = Callable[[Case, Config], None]
LAWS: dict[str, Law] = {}  # by name and dtype


def law(*dtypes: torch.dtype) -> Callable[[Any], Any]:
    """Declare a law, over bases of each of `dtypes`."""

    def declare(function: Any) -> Any:
        for dtype in dtypes:
            LAWS[f"{function.__name__}-{str(dtype).removeprefix('torch.')}"] = functools.partial(function, dtype=dtype)
        return function

    return declare


@law(torch.float32, torch.bfloat16, torch.float64)
def law_1_attaching_changes_no_bit_of_the_output(case: Case, config: Config, dtype: torch.dtype) -> None:
    """In training and in evaluation; but for rounding where `identity` says so."""
    s = stand(case, config, dtype)
    if s.config.identity == "none":
        pytest.skip(f"{type(config).__name__} promises no identity")
    for training in (False, True):
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


@law(torch.float32)
def law_2_names_objects_hooks_and_classes_stay(case: Case, config: Config, dtype: torch.dtype) -> None:
    """Keys of the state, parameter objects, modules and their classes; hooks are called as often as before."""
    model = made(case)
    calls = []
    hooked = next(
        m
        for m in model.modules()
        if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.LayerNorm) or type(m).__name__ == "Conv1D"
    )
    hooked.register_forward_hook(lambda *_: calls.append(1))
    evaluated(model, case.x())
    called = len(calls)
    classes = {name: type(m) for name, m in model.named_modules()}
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    keys = list(model.state_dict())
    attached(case, config, model)
    after = model.state_dict()
    assert all(k in after for k in keys)
    now = dict(model.named_parameters())
    assert all(now[k] is p for k, p in parameters.items())
    for name, module in modules.items():
        assert model.get_submodule(name) is module
        assert isinstance(module, classes[name])
    evaluated(model, case.x())
    assert len(calls) == 2 * called


@law(torch.float32)
def law_4_ejecting_gives_everything_back(case: Case, config: Config, dtype: torch.dtype) -> None:
    """Classes, flags, attributes, the state and the output."""
    model = made(case)
    next(iter(model.parameters())).requires_grad_(False)
    classes = [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    contents = [set(m.__dict__) for m in model.modules()]
    before = copy.deepcopy(model)
    attached(case, config, model)
    output(model, case.x())
    api.eject(model)
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [set(m.__dict__) for m in model.modules()] == contents
    assert list(model.state_dict()) == list(before.state_dict()) and same_bits(before, model)
    assert torch.equal(output(model, case.x()), output(before, case.x()))


@law(torch.float32)
def law_5_only_the_adapter_trains(case: Case, config: Config, dtype: torch.dtype) -> None:
    """After steps over all parameters the base is what it was, and every tensor of the adapter has moved."""
    s = stand(case, config, dtype)
    trained = api.parameters(s.model)
    start = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(s.model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):  # a B that starts at zero keeps A still in the first step
        optimizer.zero_grad()
        output(s.model, s.x).float().square().mean().backward()
        optimizer.step()
    assert same_bits(s.before, s.model)
    moved = [not torch.equal(a, p) for a, p in zip(start, trained, strict=True)]
    assert all(moved), f"{moved.count(False)} of {len(moved)} tensors never moved"


@law(torch.float32, torch.bfloat16)
def law_6_merging_is_forward(case: Case, config: Config, dtype: torch.dtype) -> None:
    """Error against fp64 at most twice that of the unmerged model, and some rounding of the output."""
    s = stand(case, config, dtype)
    s.draw()
    reference = copy.deepcopy(s.model).to(torch.float64)
    x = s.x.double() if s.x.is_floating_point() else s.x
    exact = evaluated(reference, x)
    unmerged = evaluated(s.model, s.x)
    s.merge()
    merged = evaluated(s.model, s.x)
    scale = float(exact.detach().abs().max())
    of_merged = float((merged.double() - exact).abs().max())
    of_unmerged = float((unmerged.double() - exact).abs().max())
    assert of_merged <= 2 * of_unmerged + 4 * torch.finfo(dtype).eps * scale
    assert not torch.allclose(merged.double(), evaluated(s.before.double(), x), rtol=1e-3)
    with pytest.raises(ValueError, match="merged"), api.disabled(s.model):
        pass


@law(torch.bfloat16)
def law_7_unmerging_is_exact_a_hundred_times(case: Case, config: Config, dtype: torch.dtype) -> None:
    """No bit of the base changes."""
    s = stand(case, config, dtype)
    s.draw()
    before = evaluated(s.model, s.x)
    for _ in range(100 if case.name == "linear" else 3):
        s.merge()
        assert not same_bits(s.before, s.model)
        api.unmerge(s.model)
        assert same_bits(s.before, s.model)
    assert torch.equal(evaluated(s.model, s.x), before)


@law(torch.float32, torch.bfloat16)
def law_8_loading_gives_back_what_was_saved(case: Case, config: Config, dtype: torch.dtype) -> None:
    """Outputs are bit-equal, and what is saved again is the same file content."""
    s = stand(case, config, dtype)
    s.draw()
    with tempfile.TemporaryDirectory() as folder:
        api.save(s.model, Path(folder, "adapter"))
        other = copy.deepcopy(s.before)
        api.load(other, Path(folder, "adapter"))
        assert torch.equal(evaluated(other, s.x), evaluated(s.model, s.x))
        api.save(other, Path(folder, "again"))
        first, second = (load_file(Path(folder, name, TENSORS)) for name in ("adapter", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[k]) and t.dtype == second[k].dtype for k, t in first.items())


@law(torch.float32)
def law_8_what_its_json_says_is_enough(case: Case, config: Config, dtype: torch.dtype) -> None:
    """The tensors as another program writes them, without our metadata: the same function, or a refusal."""
    s = stand(case, config, dtype)
    s.draw()
    other = copy.deepcopy(s.before)
    with tempfile.TemporaryDirectory() as folder:
        api.save(s.model, folder)
        save_file(load_file(Path(folder, TENSORS)), Path(folder, TENSORS))
        try:
            api.load(other, folder)
        except (NotImplementedError, StorageError) as refusal:
            pytest.skip(str(refusal))
    assert torch.equal(evaluated(other, s.x), evaluated(s.model, s.x))


@law(torch.float32)
def law_10_a_name_that_matches_nothing_is_an_error(case: Case, config: Config, dtype: torch.dtype) -> None:
    """And the model is left as it was."""
    attached(case, config, made(case))
    model = made(case)
    before = copy.deepcopy(model)
    for wrong in ({"targets": ["no_such_module"]}, {"exclude": ["no_such_module"]}, {"also_train": ["no_such_module"]}):
        broken = dataclasses.replace(fitted(config, case), **wrong)
        with pytest.raises(ValueError, match="no_such_module"):
            api.inject(model, broken)
        assert api.adapters(model) == {}
        assert same_bits(before, model) and [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
        assert all(p.requires_grad for p in model.parameters())


@law(torch.float32)
def law_13_threads_do_not_see_each_other(case: Case, config: Config, dtype: torch.dtype) -> None:
    """A thread in which the adapters are off, and one in which they act."""
    s = stand(case, config, dtype)
    s.draw()
    acting, base = evaluated(s.model, s.x), evaluated(s.before, s.x)
    barrier, found = threading.Barrier(2), {}

    def run(name: str, without: bool) -> None:
        results = []
        barrier.wait()
        for _ in range(20):
            if without:
                with api.disabled(s.model):
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


@law(torch.float64)
def two_adapters_add_up_and_either_can_leave(case: Case, config: Config, dtype: torch.dtype) -> None:
    """In any order of activation."""
    s = stand(case, config, dtype)
    s.draw(seed=5)
    api.inject(s.model, s.config, name="second")
    s.draw("second", seed=6)
    x = s.x
    with api.using(s.model, "default"):
        first = evaluated(s.model, x)
    with api.using(s.model, "second"):
        second = evaluated(s.model, x)
    api.activate(s.model, "default", "second")
    both = evaluated(s.model, x)
    api.activate(s.model, "second", "default")
    assert torch.allclose(evaluated(s.model, x), both, rtol=1e-9)
    api.eject(s.model, "second")
    api.activate(s.model, "default")
    assert torch.equal(evaluated(s.model, x), first)
    assert not torch.allclose(first, both) and not torch.allclose(second, both)
