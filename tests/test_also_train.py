"""Modules that are trained whole beside the adapters, and single rows of an embedding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig
from peftkit.testing import models
from peftkit.testing.models import drawn, evaluated, ids, numbers


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.body = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.body(self.embed(x))).mean(1)))


class Biased(models.Tied):
    """BERT's decoder is tied to the embedding and has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(6, 11)
        self.lm_head.weight = self.embed.weight


def classifier() -> nn.Module:
    return drawn(Classifier())


def tied() -> nn.Module:
    return drawn(Biased())


def tokens() -> Tensor:
    return torch.tensor([[1, 4, 2], [10, 4, 0]])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if ".peftkit." not in n}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def train(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(peftkit.parameters(model), lr=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def config(also: Any, targets: Any = "body") -> LoRAConfig:
    return LoRAConfig(r=2, targets=targets, also_train=also)


CASES: dict[str, tuple[Any, Any, Any]] = {
    "head": (classifier, "head", "body"),
    "several": (classifier, ["head", "norm", "embed"], "body"),
    "one Linear": (classifier, "head.2", "body"),
    "rows": (classifier, {"embed": [4, 10]}, "body"),
    "rows and head": (classifier, {"embed": [4, 10, 1], "head": None}, "body"),
    "tied whole": (tied, ["embed", "lm_head"], "mid"),
    "tied rows": (tied, {"embed": [4, 10]}, "mid"),
}
each = pytest.mark.parametrize(("make", "also", "targets"), CASES.values(), ids=CASES.keys())


@each
def test_it_keeps_the_laws(make, also, targets, tmp_path):
    model, x = make(), tokens()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    classes = {n: type(m) for n, m in model.named_modules()}
    base, bits = evaluated(model, x), snapshot(model)
    peftkit.inject(model, config(also, targets))
    assert torch.equal(evaluated(model, x), base)
    train(model, x)
    assert same(snapshot(model), bits), "the base was trained"
    for p in peftkit.parameters(model):
        assert p.grad is not None and p.grad.abs().sum() > 0
    apart = evaluated(model, x)
    assert not torch.allclose(apart, base)
    with peftkit.disabled(model):
        assert torch.equal(evaluated(model, x), base)

    peftkit.save(model, tmp_path / "a")
    other = make()
    peftkit.load(other, tmp_path / "a")
    assert torch.equal(evaluated(other, x), apart)
    assert same(snapshot(other), bits)

    for _ in range(3):
        peftkit.merge(model)
        torch.testing.assert_close(evaluated(model, x), apart, rtol=1e-5, atol=1e-6)
        assert not same(snapshot(model), bits)
        peftkit.unmerge(model)
        assert same(snapshot(model), bits)
    assert torch.equal(evaluated(model, x), apart)
    peftkit.eject(model)
    assert same(snapshot(model), bits)
    assert torch.equal(evaluated(model, x), base)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: type(m) for n, m in model.named_modules()} == classes

    peftkit.merge(other, keep_base=False)
    torch.testing.assert_close(evaluated(other, x), apart, rtol=1e-5, atol=1e-6)
    assert not peftkit.adapters(other)


@pytest.mark.parametrize("scale", [None, 3.0])
def test_rows_are_those_of_a_model_whose_rows_were_trained(scale):
    """Against plain torch: the gradient of the whole weight, masked to the rows."""
    model, plainly, x = tied(), tied(), tokens()
    rows = [10, 4]
    for m in (model, plainly):
        if scale:
            m.embed.embed_scale = scale
            m.embed.__class__ = Scaled
    peftkit.inject(model, config({"embed": rows}, "mid"))
    for p in plainly.parameters():
        p.requires_grad_(p is plainly.embed.weight)
    mask = torch.zeros(11, 1).index_fill(0, torch.tensor(rows), 1)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n.endswith("rows")], lr=0.3)
    for _ in range(4):
        for m in (model, plainly):
            m.zero_grad()
            m(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            plainly.embed.weight -= 0.3 * mask * plainly.embed.weight.grad
    torch.testing.assert_close(evaluated(model, x), evaluated(plainly, x))
    peftkit.merge(model)
    torch.testing.assert_close(model.embed.weight, plainly.embed.weight)
    torch.testing.assert_close(evaluated(model, x), evaluated(plainly, x))


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


def test_tied_weights_stay_tied_in_training():
    model, x = tied(), tokens()
    peftkit.inject(model, config(["embed", "lm_head"], "mid"))
    copies = [model.embed.peftkit.default.copy, model.lm_head.peftkit.default.copy]
    assert copies[0].weight is copies[1].weight
    assert model.embed.weight is model.lm_head.weight is not copies[0].weight
    train(model, x)
    assert copies[0].weight is copies[1].weight
    assert sum(p is copies[0].weight for p in peftkit.parameters(model)) == 1


def test_two_embeddings_and_a_head_on_one_weight_follow_the_rows_of_the_one_named():
    class Seq2Seq(models.Tied):
        def __init__(self) -> None:
            super().__init__()
            self.decoder_embed = nn.Embedding(11, 6)
            self.decoder_embed.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(torch.tanh(self.mid(self.embed(x))) + self.decoder_embed(x))

    model, x = drawn(Seq2Seq()), tokens()
    peftkit.inject(model, config({"^embed": [4, 10]}, "mid"))
    train(model, x)
    apart = evaluated(model, x)
    peftkit.merge(model)
    torch.testing.assert_close(evaluated(model, x), apart, rtol=1e-5, atol=1e-6)


def test_statistics_of_a_batch_norm_are_the_copy_s_own():
    model, x = classifier(), tokens()
    peftkit.inject(model, config(["norm"]))
    bits = snapshot(model)
    model.norm.train()
    train(model, x)
    model.norm.eval()
    copied = model.norm.peftkit.default.copy
    assert copied.num_batches_tracked == 3
    assert not torch.equal(copied.running_mean, model.norm.running_mean)
    assert same(snapshot(model), bits)
    peftkit.merge(model)
    assert torch.equal(copied.running_mean, model.norm.running_mean)
    assert model.norm.num_batches_tracked == 3
    peftkit.unmerge(model)
    assert same(snapshot(model), bits)


def test_modes_inside_a_module_are_kept():
    model = classifier().train()
    model.head[1].eval()
    peftkit.inject(model, config("head"))
    copied = model.head.peftkit.default.copy
    assert [m.training for m in copied] == [True, False, True]
    model.eval()
    assert not any(m.training for m in model.modules())


def test_hooks_of_the_module_run_once_and_those_inside_it_too():
    model, x, seen = classifier(), tokens(), []
    model.head.register_forward_hook(lambda *_: seen.append("head"))
    model.head.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.head[0].register_forward_hook(lambda *_: seen.append("inside"))
    peftkit.inject(model, config("head"))
    model(x)
    assert seen == ["before", "inside", "head"]


def test_a_grafted_sequential_is_still_a_list_of_its_children():
    model, x = classifier(), tokens()
    children = list(model.head)
    base = evaluated(model, x)
    peftkit.inject(model, config("head"))
    assert len(model.head) == 3
    assert list(model.head) == children
    assert model.head[-1] is children[-1]
    assert list(model.head[:2]) == children[:2]
    assert type(model.head[:2]) is nn.Sequential
    with torch.no_grad(), peftkit.disabled(model):
        assert torch.equal(model(x), base)


def test_a_block_that_calls_its_children_in_turn_does_not_notice():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            for child in self.children():
                x = child(x)
            return x

    model, x = drawn(nn.ModuleDict({"block": Block(), "body": nn.Linear(6, 6)})), numbers(2, 6)()
    base = evaluated(model["block"], x)
    peftkit.inject(model, config("block"))
    with peftkit.disabled(model):
        assert torch.equal(evaluated(model["block"], x), base)


@pytest.mark.parametrize("also", [["linear1"], ["norm1"], ["self_attn"], ["out_proj"], ["layers.0"]])
def test_inside_an_encoder_layer_on_its_fast_path(also):
    model, x = models.encoder(), numbers(2, 5, 8)()
    base = evaluated(model, x)
    peftkit.inject(model, LoRAConfig(r=2, targets="layers.1.linear2", also_train=also))
    assert torch.equal(evaluated(model, x), base)
    with torch.no_grad():
        for p in peftkit.parameters(model):
            p.add_(0.3 * torch.randn_like(p))
    slow = model(x).detach()
    apart = evaluated(model, x)
    assert not torch.allclose(apart, base)
    torch.testing.assert_close(apart, slow, rtol=1e-4, atol=1e-5)
    peftkit.merge(model)
    torch.testing.assert_close(evaluated(model, x), apart, rtol=1e-4, atol=1e-5)


def test_each_name_has_its_own_and_adapters_beneath_are_left_out():
    model, x = classifier(), tokens()
    peftkit.inject(model, LoRAConfig(r=2, targets="head.0"), name="inner")
    with torch.no_grad():
        for p in peftkit.parameters(model):
            p.normal_()
    inner = evaluated(model, x)
    peftkit.inject(model, config("head"), name="outer")
    assert not [n for n, _ in model.head.peftkit.outer.named_modules() if "peftkit" in n]
    train(model, x)
    outer = evaluated(model, x)
    peftkit.activate(model, "inner")
    assert torch.equal(evaluated(model, x), inner)
    peftkit.activate(model, "outer")
    assert torch.equal(evaluated(model, x), outer)
    for names in (("inner", "outer"), ("outer", "inner")):
        with pytest.raises(
            ValueError, match=r"'outer' takes the place of 'head', so what 'inner' has at 'head.0' cannot"
        ):
            peftkit.activate(model, *names)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in peftkit.parameters(model):
            p.zero_()
    assert torch.equal(evaluated(other, x), outer)


def test_two_that_train_one_module_cannot_act_together():
    model = classifier()
    peftkit.inject(model, config("head"), name="one")
    peftkit.inject(model, config({"embed": [1]}), name="rows")
    peftkit.inject(model, LoRAConfig(r=2, targets="embed"), name="lora")
    peftkit.inject(model, config("head"), name="two")
    peftkit.activate(model, "one", "rows")
    for names in (("one", "two"), ("rows", "lora"), ("lora", "rows")):
        with pytest.raises(ValueError, match="takes the place of"):
            peftkit.activate(model, *names)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float64])
def test_a_head_saved_over_one_dtype_acts_over_another(base, tmp_path):
    model, x = classifier(), tokens()
    peftkit.inject(model, config({"head": None, "embed": [4]}))
    train(model, x)
    peftkit.save(model, tmp_path / "a")
    other = classifier().to(base)
    peftkit.load(other, tmp_path / "a", check_base=False)
    y = evaluated(other, x)
    assert y.dtype is base
    torch.testing.assert_close(y.float(), evaluated(model, x), rtol=0.05, atol=0.05)
    stored = other.head.peftkit.default.copy.state_dict()
    assert all(torch.equal(t, model.head.peftkit.default.copy.state_dict()[n]) for n, t in stored.items())


@pytest.mark.parametrize("also", ["head", {"embed": [4, 10]}])
def test_on_the_meta_device_the_values_come_with_the_base(also):
    """The base gets its weights after attaching; `reset` takes them over."""
    real, x = classifier(), tokens()
    with torch.device("meta"):
        model = Classifier().eval()
    peftkit.inject(model, config(also))
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict(), strict=False)
    peftkit.reset(model)
    assert torch.equal(evaluated(model, x), evaluated(real, x))
    train(model, x)
    assert same(snapshot(model), snapshot(real))


@pytest.mark.parametrize("also", [["embed", "lm_head"], {"embed": [4, 10]}])
def test_what_was_tied_on_the_meta_device_is_tied_when_the_values_come(also):
    real, x = tied(), tokens()
    with torch.device("meta"):
        model = Biased().eval()
    peftkit.inject(model, config(also, "mid"))
    model.to_empty(device="cpu")
    model.lm_head.weight = model.embed.weight
    model.load_state_dict(real.state_dict(), strict=False)
    peftkit.reset(model)
    assert torch.equal(evaluated(model, x), evaluated(real, x))
    shared = [p for n, p in model.named_parameters(remove_duplicate=False) if n.endswith(("rows", "copy.weight"))]
    assert len(shared) == 2
    assert shared[0] is shared[1]


def test_resetting_takes_the_base_s_values_and_never_merged_ones():
    model, x = classifier(), tokens()
    base = evaluated(model, x)
    peftkit.inject(model, LoRAConfig(r=2, targets="head.0"), name="merged")
    with torch.no_grad():
        for p in peftkit.parameters(model):
            p.normal_()
    peftkit.inject(model, config("head"), name="whole")
    train(model, x)
    peftkit.activate(model, "merged")
    peftkit.merge(model)
    with pytest.raises(ValueError, match=r"'merged' is merged; unmerge\(model\) before resetting"):
        peftkit.reset(model, "whole")
    peftkit.unmerge(model)
    peftkit.reset(model, "whole")
    peftkit.activate(model, "whole")
    assert torch.equal(evaluated(model, x), base)


def computed() -> nn.Module:
    layer = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    layer(torch.ones(1, 4))
    return layer


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "a typo": (classifier, "haed", "also_train: 'haed' matches no module; did you mean 'head'"),
    "no parameters": (classifier, "head.1", "'head.1' cannot be trained whole: it is a Tanh without parameters"),
    "a row too many": (classifier, {"embed": [11]}, r"rows of 'embed' lie in 0 … 10; got \[11\]"),
    "a negative row": (classifier, {"embed": [-1, 2]}, r"rows of 'embed' lie in 0 … 10"),
    "no rows": (classifier, {"embed": []}, "rows of 'embed' lie in"),
    "rows of another kind": (classifier, {"embed": ["a"]}, "rows of 'embed' are token ids"),
    "rows of a Linear": (classifier, {"body": [0]}, "rows can be trained of an Embedding; 'body' is a Linear"),
    "also a target": (classifier, "body", "'body' is a target and lies in 'body' of also_train"),
    "one in another": (classifier, ["head", "head.0"], "'head.0' lies in 'head', which is trained whole"),
    "half of what is tied": (tied, "embed", "'embed' shares a weight with 'lm_head'; name both"),
    "rows, and the head they are tied to": (
        tied, {"embed": [1], "lm_head": None}, "'lm_head' shares a weight with 'embed'|shares its weight with 'lm_head'",
    ),
    "never called": (
        lambda: nn.ModuleDict({"body": nn.Linear(4, 4), "list": nn.ModuleList([nn.Linear(4, 4)])}), "list",
        "'list' cannot be trained whole: a ModuleList is never called",
    ),
    "lazy": (
        lambda: nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.LazyLinear(4)}), "head",
        "'head' cannot be trained whole: it has no shape yet",
    ),
    "computed": (
        lambda: nn.ModuleDict({"body": nn.Linear(4, 4), "head": computed()}), "head", "computes a weight by a hook",
    ),
    "max_norm": (
        lambda: nn.ModuleDict({"body": nn.Linear(4, 4), "embed": nn.Embedding(4, 4, max_norm=1.0)}), {"embed": [1]},
        "'embed' has max_norm",
    ),
    "scripted": (
        lambda: nn.ModuleDict({"body": nn.Linear(4, 4), "head": torch.jit.script(nn.Linear(4, 4))}), "head",
        "'head' cannot be trained whole: it is a scripted module",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("make", "also", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_conflicts_are_errors_that_change_nothing(make, also, message):
    model = make()
    classes = {n: type(m) for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        peftkit.inject(model, config(also, "mid" if make is tied else "body"))
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_a_target_that_is_tied_to_trained_rows_is_refused():
    with pytest.raises(ValueError, match="'lm_head' is a target and shares its weight with an embedding"):
        peftkit.inject(tied(), config({"embed": [1]}, "lm_head"))


def test_an_offloaded_module_is_refused_and_one_offloaded_later_is_not_merged():
    accelerate = pytest.importorskip("accelerate")
    x = tokens()
    model = accelerate.cpu_offload(classifier(), execution_device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match="'head' cannot be trained whole: weight of 0 in it is offloaded by accelerate"
    ):
        peftkit.inject(model, config("head"))
    model = tied()
    peftkit.inject(model, config({"embed": [4, 10]}, "mid"))
    train(model, x)
    want = evaluated(model, x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(evaluated(model, x), want)
    with pytest.raises(ValueError, match="cannot be merged"):
        peftkit.merge(model)


def test_a_real_language_model_learns_new_tokens():
    """Resized embeddings of a Llama with a tied head: the new rows are trained, and saved as so many numbers."""
    model, x = models.llama(tie_word_embeddings=True), ids(33)
    model.resize_token_embeddings(33, mean_resizing=False)
    peftkit.inject(model, LoRAConfig(r=2, also_train={"embed_tokens": [31, 32]}))
    x[0, :2] = torch.tensor([31, 32])
    loss = model(x, labels=x).loss
    loss.backward()
    rows = model.model.embed_tokens.peftkit.default.rows
    assert rows.shape == (2, 16)
    assert rows.grad.abs().sum() > 0
