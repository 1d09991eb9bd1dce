"""What `cost` and `compare` say, and that the model is as it was."""

from __future__ import annotations

import copy
import io
import json
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import peftkit
from peftkit import DoRAConfig, IA3Config, LoRAConfig, PrefixTuningConfig
from peftkit.testing import models

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Busy(nn.Module):
    """Changes all it can in a forward: buffers, attributes, an embedding, every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6, max_norm=0.5)
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.register_buffer("replaced", torch.zeros(2))
        self.calls, self.fails_at = 0, -1

    def forward(self, ids: Tensor, scale: float = 1.0) -> dict[str, Any]:
        self.calls += 1
        self.seen = ids
        self.replaced = self.replaced + 1
        random.random(), np.random.rand()  # noqa: NPY002
        if self.calls == self.fails_at:
            raise ArithmeticError("on purpose")
        y = self.last(torch.dropout(self.norm(self.first(self.embed(ids))), 0.5, self.training) * scale)
        return {"loss": y.square().mean(), "logits": y}


def busy() -> Busy:
    model = Busy()
    with torch.no_grad():
        model.embed.weight.mul_(3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
        p.register_post_accumulate_grad_hook(lambda p: pytest.fail("a gradient was accumulated"))
    model.norm.eval()
    return model


def state(model: nn.Module) -> dict[str, Any]:
    """All that can be told of a model and of the generators."""
    return {
        "objects": [(n, id(p), id(p.grad), p.requires_grad) for n, p in model.named_parameters()],
        "values": [p.detach().clone() for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "buffers": [(n, id(b)) for n, b in model.named_buffers()],
        "buffer values": [b.clone() for b in model.buffers()],
        "classes": [type(m) for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "attributes": [{k: id(v) for k, v in vars(m).items()} for m in model.modules()],
        "generators": [random.getstate(), str(np.random.get_state()), torch.get_rng_state()],  # noqa: NPY002
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return isinstance(b, Tensor) and torch.equal(a, b)
        return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b

    assert [k for k in before if not same(before[k], after[k])] == []


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", [None, LoRAConfig(r=1, targets=["first", "last"]), DoRAConfig(r=1, targets="last")])
def test_the_model_is_as_it_was(config, training):
    model = busy().train(training)
    if config is not None:
        peftkit.inject(model, config)
    before, acting = state(model), peftkit.active(model)
    batch = {"ids": torch.arange(8), "scale": 2.0}
    peftkit.cost(model, batch, seconds=0.001)
    assert_same(before, state(model))
    assert peftkit.active(model) == acting and model.calls == 0
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    peftkit.cost(model, batch, seconds=0.001)
    handle = state(model)
    for fails_at in range(1, 1 + (config is not None) * 2 + 3):  # in the counting, the saving, the base, the timing
        model.fails_at = fails_at
        before = {**handle, "attributes": state(model)["attributes"]}
        with pytest.raises(ArithmeticError):
            peftkit.cost(model, batch, seconds=0.001)
        assert_same(before, state(model))


def test_a_failure_while_merged_unmerges():
    model = models.linear()
    peftkit.inject(model, LoRAConfig(r=2, targets="all-linear"))

    def fail(module, args, output):
        if peftkit.describe(model).rows[0].state == "merged":
            raise ArithmeticError

    handle = model.register_forward_hook(fail)
    before = state(model)
    with pytest.raises(ArithmeticError):
        peftkit.cost(model, X, seconds=0.01)
    assert_same(before, state(model))
    handle.remove()
    peftkit.merge(model)  # nothing is left half merged


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("config", [None, LoRAConfig(r=1, targets="all-linear")])
def test_hooks_that_step_in_backward_are_not_called(config, fails):
    """Those of `register_hook` are, by torch.autograd.grad; adapters freeze parameters that have some."""
    model, called = models.linear(), []
    if config is not None:
        peftkit.inject(model, config)
        model[0].weight.requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    handles = [p.register_hook(lambda g, p=p: called.append(p.data.sub_(g))) for p in trained]
    handles += [p.register_post_accumulate_grad_hook(lambda p: called.append(p)) for p in trained]
    before = state(model)
    if fails:
        with pytest.raises(ArithmeticError):
            peftkit.cost(model, X, loss=lambda y: 1 / 0, seconds=0)
    else:
        peftkit.cost(model, X, seconds=0)
    assert_same(before, state(model))
    assert called == []
    model(X).sum().backward()
    assert len(called) == 2 * len(trained)
    called.clear()
    for handle in handles:
        handle.remove()
    model(X).sum().backward()
    assert called == []


def test_the_batch_and_its_gradients_stay():
    model, x = models.linear(), X.clone().requires_grad_()
    x.grad = torch.ones_like(x)
    peftkit.cost(model, x, seconds=0)
    assert torch.equal(x.grad, torch.ones_like(x)) and x._backward_hooks in (None, {})


def test_training_is_measured_in_train_mode_and_time_in_eval_mode():
    model, seen = models.linear(), []
    model.register_forward_hook(lambda m, *_: seen.append((m.training, torch.is_grad_enabled())))
    with torch.no_grad():
        peftkit.cost(model, X, seconds=0.001)
    assert set(seen) == {(True, True), (False, False)} and seen == sorted(seen, reverse=True)
    model.train()
    model[0].eval()  # what a user keeps in eval mode while training
    model[0].register_forward_hook(lambda m, *_: pytest.fail("in train mode") if m.training else None)
    peftkit.cost(model, X, seconds=0)


def test_batches_and_losses():
    llama, ids = models.llama(), models.ids()
    flops = {
        peftkit.cost(llama, batch, seconds=0).backward_flops
        for batch in (ids, (ids,), [ids], {"input_ids": ids}, {"input_ids": ids, "labels": ids})
    }
    assert len(flops) == 1
    with pytest.raises(TypeError, match="a mapping for model.*not a str"):
        peftkit.cost(llama, "text")
    counted = nn.Module()
    counted.forward = lambda x: (x * 2).int()
    with pytest.raises(ValueError, match="neither a loss nor a floating tensor; give loss="):
        peftkit.cost(counted, X)
    two = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 2))
    half = peftkit.cost(two, X, loss=lambda y: y.sum() * 0 + two[0](X).sum(), seconds=0)
    assert half.forward_flops == 2 * 3 * (6 * 2 + 2 * 2 + 6 * 2)


def test_what_cannot_be_measured_is_refused():
    model = models.linear()
    peftkit.inject(model, LoRAConfig(r=1, targets="all-linear"))
    peftkit.merge(model)
    with pytest.raises(ValueError, match=r"'default' is merged.*unmerge\(model\) first"):
        peftkit.cost(model, X)
    with pytest.raises(ValueError, match="0.weight is on the meta device"):
        peftkit.cost(nn.Sequential(nn.Linear(6, 2, device="meta")), X)
    with pytest.raises(ValueError, match="0.weight has no shape yet; run one batch"):
        peftkit.cost(nn.Sequential(nn.LazyLinear(2)), X)


def test_the_base_is_what_full_fine_tuning_costs():
    model, ids = models.llama(), models.ids()
    full = peftkit.cost(model, ids, seconds=0)
    assert full.label == "full fine-tuning" and full.base is None
    assert full.trained == full.total == sum(p.numel() for p in model.parameters())
    assert full.stored_bytes == 4 * full.total and full.forward_flops == full.base_forward_flops
    peftkit.inject(model, LoRAConfig(r=2))
    found = peftkit.cost(model, ids, seconds=0)
    assert found.base == full
    assert found.trained == peftkit.describe(model).trained
    assert found.total == sum(p.numel() for p in model.parameters())
    frozen = models.llama().requires_grad_(False)
    peftkit.inject(frozen, LoRAConfig(r=2))
    found = peftkit.cost(frozen, ids, seconds=0)
    assert found.base is None and "nothing of it was trainable" in found.notes["base"]


def test_a_compiled_model_costs_what_it_computes():
    model = models.linear()
    peftkit.inject(model, LoRAConfig(r=2, targets="all-linear"))
    plain = peftkit.cost(model, X, seconds=0)
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    found = peftkit.cost(compiled, X, seconds=0.01)
    assert (found.forward_flops, found.backward_flops) == (plain.forward_flops, plain.backward_flops)
    assert found.forward_seconds is not None and found.merged_seconds is not None


# -- compare ---------------------------------------------------------------------------------------------------------------


def test_compare_is_cost_of_each_and_leaves_the_model():
    configs = {"full": None, "LoRA": LoRAConfig(r=2), "(IA)³": IA3Config(), "prefix": PrefixTuningConfig(length=2)}
    model, ids = models.llama(), models.ids()
    before = state(model)
    found = peftkit.compare(model, configs, ids, seconds=0)
    assert_same(before, state(model))
    assert list(found) == list(configs) and len(found) == 4
    for name, config in configs.items():
        other = models.llama()
        if config is not None:
            peftkit.inject(other, config)
        alone = peftkit.cost(other, ids, seconds=0).to_dict()
        assert found[name].to_dict() == {**alone, "base": None}
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_compare_undoes_what_fails():
    model = busy()
    before, ids = state(model), torch.arange(8)
    with pytest.raises(ValueError, match="matches no module"):
        peftkit.compare(
            model, {"a": LoRAConfig(r=1, targets="first"), "b": LoRAConfig(targets="nowhere")}, ids, seconds=0
        )
    assert_same(before, state(model))
    model.fails_at = 2
    before = state(model)
    with pytest.raises(ArithmeticError):
        peftkit.compare(model, {"a": LoRAConfig(r=1, targets="first")}, ids, seconds=0)
    assert_same(before, state(model))
    with pytest.raises(TypeError, match=r"configs\['a'\]"):
        peftkit.compare(model, {"a": "lora"}, ids)  # type: ignore[dict-item]
    peftkit.inject(model, LoRAConfig(r=1, targets="first"), name="mine")
    with pytest.raises(ValueError, match=r"'mine' is attached to this Busy; eject\(model\) first"):
        peftkit.compare(model, {"a": None}, ids)


# -- how it is shown -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown() -> tuple[peftkit.Cost, peftkit.Comparison]:
    model = models.llama()
    both = peftkit.compare(model, {"full": None, "prefix": PrefixTuningConfig(length=2)}, models.ids(), seconds=0.01)
    peftkit.inject(model, LoRAConfig(r=2))
    return peftkit.cost(model, models.ids(), seconds=0.01), both


def test_tables(shown):
    one, both = shown
    text = str(one)
    assert f"{one.trained:,}" in text and f"{one.base.trained:,}" in text and "full fine-tuning" in text
    assert all(title in text for title in ("on disk", "optimizer state", "backward FLOPs", "added when merged"))
    assert f"{100 * one.trained / one.base.trained:.3g} %" in text
    text = " ".join(str(both).split())
    assert "prefix: added when merged: not mergeable: Prefix at" in text and "full: added" not in text
    for what in (one, both):
        for width in (60, 120):
            out = io.StringIO()
            Console(file=out, width=width).print(what)
            assert max(map(len, out.getvalue().splitlines())) <= width


def test_numbers_are_written_with_units():
    from peftkit.costs.figures import si, signed, size

    assert [si(v) for v in (0, 999, 1234, 5e9, 2.5e12)] == ["0", "999", "1.23 k", "5.00 G", "2.50 T"]
    assert [si(v, "s") for v in (0.0123, 1.5e-5, 2)] == ["12.3 ms", "15.0 µs", "2.00 s"]
    assert [size(v) for v in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1,023 B", "1.5 KiB", "3.0 GiB"]
    assert [signed(v) for v in (0.123, -0.05)] == ["+12.3 %", "-5.0 %"]


def test_plots(shown, tmp_path):
    from matplotlib.figure import Figure

    one, both = shown
    for what, names in ((one, ["full fine-tuning", "lora"]), (both, ["full", "prefix"])):
        figure = what.plot(tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == names
        panels = {ax.get_title(loc="left"): ax for ax in figure.axes}
        costs = [one.base, one] if what is one else list(both.values())
        widths = [bar.get_width() for bar in panels["backward FLOPs"].patches]
        assert widths == [c.backward_flops for c in costs]
    given = Figure()
    assert both.plot(given) is given and given.axes


def test_without_matplotlib(shown, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'peftkit\[plots\]'"):
        shown[0].plot()


def test_figures_are_copied_as_they_are(shown):
    assert copy.copy(shown[0]) == shown[0]
