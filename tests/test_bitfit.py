"""BitFit: which biases it finds, and where they act."""

from __future__ import annotations

import copy

import pytest
import torch
from small_helpers import grafted
from storage_helpers import llama
from storage_models import bert
from torch import Tensor, nn

import peftkit
from peftkit import BitFitConfig, TargetError
from peftkit.testing.models import drawn, evaluated, numbers


class Kinds(nn.Module):
    """Every module whose bias is understood."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True),
            nn.ConvTranspose2d(4, 3, 2), nn.Flatten(2), nn.Linear(36, 5), nn.LayerNorm((3, 5)),
        )  # fmt: skip
        self.pair = nn.Bilinear(5, 5, 6)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.steps(x)
        x = self.pair(x, x)
        return self.attn(x, x, x)[0]


@pytest.mark.parametrize("training", [False, True])
def test_every_bias_of_the_model_is_trained_and_kept(training):
    plain = drawn(Kinds()).double().train(training)
    model = copy.deepcopy(plain)
    peftkit.inject(model, BitFitConfig())
    biases = [n for n, _ in plain.named_parameters() if n.endswith("bias")]
    assert len(peftkit.parameters(model)) == len(biases) == 10
    assert sum(p.numel() for p in peftkit.parameters(model)) == sum(plain.get_parameter(n).numel() for n in biases)
    with torch.no_grad():
        for i, (path, adapter) in enumerate(grafted(model).items()):
            adapter.delta_bias.copy_(torch.randn(adapter.delta_bias.shape, generator=torch.Generator().manual_seed(i)))
            where, _, part = path.partition(":")
            bias = plain.get_parameter(f"{where}.{part}_bias" if part else f"{where}.bias")
            bias += adapter.delta_bias
    x = numbers(2, 2, 7, 7)().double()
    torch.testing.assert_close(evaluated(model, x), evaluated(plain, x), rtol=1e-11, atol=1e-11)
    if not training:
        peftkit.merge(model)
        for name in biases:
            torch.testing.assert_close(model.get_parameter(name).detach(), plain.get_parameter(name).detach())


@pytest.mark.parametrize(("make", "shape"), [(nn.BatchNorm1d, (3, 4)), (nn.BatchNorm1d, (3, 4, 5)), (nn.Conv1d, (4, 5)),
                                             (nn.InstanceNorm1d, (4, 5))])  # fmt: skip
def test_a_bias_is_along_the_channels_with_a_batch_or_without(make, shape):
    module = make(4, 4, 1) if make is nn.Conv1d else make(4, affine=True)
    model = drawn(nn.Sequential(module))
    x = numbers(*shape)()
    before = evaluated(model, x)
    peftkit.inject(model, BitFitConfig())
    with torch.no_grad():
        peftkit.parameters(model)[0].copy_(torch.arange(4.0))
    channel = x.dim() - 2 if make in (nn.Conv1d, nn.InstanceNorm1d) else 1
    added = evaluated(model, x) - before
    want = torch.arange(4.0).reshape([4 if d == channel else 1 for d in range(x.dim())])
    torch.testing.assert_close(added, want.expand_as(added), rtol=1e-5, atol=1e-5)


def test_a_model_without_biases_has_nothing_to_train():
    model = llama()
    with pytest.raises(TargetError, match="it has no biases, as LLaMA has none, so there is nothing to train"):
        peftkit.inject(model, BitFitConfig())
    half = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    with pytest.raises(TargetError, match="'0' matches '0', but it is a Linear without a bias"):
        peftkit.inject(half, BitFitConfig(targets="0"))
    peftkit.inject(half, BitFitConfig())
    assert list(grafted(half)) == ["1"]


def test_a_linear_whose_weight_is_computed_has_a_bias_all_the_same():
    model = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(3, 3))).eval()
    x = torch.randn(2, 3)
    before = evaluated(model, x)
    peftkit.inject(model, BitFitConfig())
    with torch.no_grad():
        peftkit.parameters(model)[0].fill_(0.5)
    torch.testing.assert_close(evaluated(model, x), before + 0.5)
    with pytest.raises(peftkit.NotMergeable, match="may not compute"):
        peftkit.merge(model)


def test_a_bias_that_is_used_in_an_unknown_way_is_refused():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.bias

    model = nn.Sequential(nn.Linear(3, 3), Odd())
    with pytest.raises(TargetError, match="it is a Odd, and what that does with its bias is not known"):
        peftkit.inject(model, BitFitConfig(targets="1"))


def test_the_head_is_trained_whole_beside_the_biases(tmp_path):
    model = bert()
    peftkit.inject(model, BitFitConfig(also_train=["classifier"]))
    assert "classifier" in {p.site for p in peftkit.describe(model).rows}
    with torch.no_grad():
        for p in peftkit.parameters(model):
            p.add_(0.1)
    peftkit.save(model, tmp_path / "a")
    assert "peft reads it" not in (tmp_path / "a" / "README.md").read_text()
    other = bert()
    peftkit.load(other, tmp_path / "a")
    x = torch.arange(6)[None]
    assert torch.equal(evaluated(other, x), evaluated(model, x))
