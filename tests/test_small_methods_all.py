"""What all small methods keep to, where (IA)³ goes, what LoHa and LoKr start from."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_helpers import ALL, grafted
from storage_helpers import llama
from storage_models import bert, gpt2, t5
from test_foreign_hosts import QUANTISED
from torch import Tensor, nn

import peftkit
from peftkit import IA3Config, LoHaConfig, LoKrConfig, TargetError
from peftkit.methods.loha import hadamard
from peftkit.methods.lokr import through_factors
from peftkit.sites import walk
from peftkit.testing import models
from peftkit.testing.models import evaluated, output

# -- all ---------------------------------------------------------------------------------------------------------------
every = pytest.mark.parametrize("config", ALL, ids=lambda c: c.method)


@every
def test_adapters_over_half_precision_are_fp32_and_the_output_is_not(config):
    model = nn.Sequential(nn.Linear(6, 8)).bfloat16()
    peftkit.inject(model, config)
    assert {p.dtype for p in grafted(model)["0"].parameters()} == {torch.float32}
    assert evaluated(model, torch.randn(2, 6).bfloat16()).dtype is torch.bfloat16
    other = nn.Sequential(nn.Linear(6, 8))
    peftkit.inject(other, type(config)(targets="0", dtype=torch.float16))
    assert {p.dtype for p in grafted(other)["0"].parameters()} == {torch.float16}
    with pytest.raises(ValueError, match="dtype: a floating-point dtype, not"):
        type(config)(targets="0", dtype=torch.int8)


@every
def test_attached_on_the_meta_device_they_follow_the_weights(config, tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)).to("meta")
    peftkit.inject(model, config)
    with pytest.raises(ValueError, match="meta device"):
        peftkit.save(model, tmp_path / "a")
    model.to_empty(device="cpu")
    plain = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    model.load_state_dict(plain.state_dict(), strict=False)
    peftkit.reset(model)
    x = torch.randn(3, 6)
    assert torch.equal(evaluated(model, x), evaluated(plain, x))
    fresh = copy.deepcopy(plain)
    torch.manual_seed(7)
    peftkit.inject(fresh, config)
    torch.manual_seed(7)
    peftkit.reset(model)
    for a, b in zip(grafted(model)["0"].parameters(), grafted(fresh)["0"].parameters(), strict=True):
        assert torch.equal(a, b)


class Packed(nn.Linear):
    """Stands for a quantised Linear: its weight is of bytes, and its forward knows what they mean."""

    def __init__(self) -> None:
        super().__init__(6, 8)
        self.weight = nn.Parameter((self.weight.detach() * 200).to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 200, self.bias)


@every
@pytest.mark.parametrize("make", ["bitsandbytes-8bit", "bitsandbytes-nf4", "torchao-int8"])
def test_a_quantised_host_is_added_to(config, make):
    model = QUANTISED[make]()
    x = torch.randn(3, 64)
    base = evaluated(model, x)
    peftkit.inject(model, config)
    assert torch.equal(evaluated(model, x), base)
    with torch.no_grad():
        for p in peftkit.parameters(model):
            p.copy_(torch.randn(p.shape))
    out = evaluated(model, x)
    assert not torch.allclose(out, base) and bool(torch.isfinite(out).all())
    output(model, x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in peftkit.parameters(model))


@every
@pytest.mark.parametrize("beside", [False, True])
def test_a_packed_weight_is_called_and_never_merged(config, beside):
    torch.manual_seed(0)
    model = nn.Sequential(Packed())
    plain = nn.Sequential(nn.Linear(6, 8))
    plain.load_state_dict({"0.weight": model[0].weight / 200, "0.bias": model[0].bias})
    configs = {"default": config}
    if beside:
        configs["second"] = IA3Config(targets="0", feedforward="0")
    for m in (model, plain):
        for i, (name, one) in enumerate(configs.items()):
            peftkit.inject(m, one, name=name)
            g = torch.Generator().manual_seed(i)
            with torch.no_grad():
                for p in peftkit.parameters(m, name):
                    p.copy_(torch.randn(p.shape, generator=g))
        peftkit.activate(m, *configs)
    x = torch.randn(3, 6)
    torch.testing.assert_close(evaluated(model, x), evaluated(plain, x))
    with pytest.raises(peftkit.NotMergeable, match="packed torch.int8"):
        peftkit.merge(model)


# -- (IA)³ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "outputs", "inputs"),
    [
        (llama, {"k_proj", "v_proj"}, {"down_proj"}),
        (bert, {"attention.self.key", "attention.self.value"}, {"0.output.dense", "1.output.dense"}),
        (gpt2, {"attn.c_attn"}, {"mlp.c_proj"}),
        (t5, {"SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v"}, {"DenseReluDense.wo"}),
        (models.encoder, {"self_attn:in_proj"}, {"linear2"}),
        (lambda: models.Attend(6), {"attn:k_proj", "attn:v_proj"}, set()),
    ],
    ids=["llama", "bert", "gpt2", "t5", "encoder", "attention"],
)
def test_vectors_go_where_the_paper_has_them(make, outputs, inputs):
    model = make()
    peftkit.inject(model, IA3Config())
    found = grafted(model)

    for wanted, on_input in ((outputs, False), (inputs, True)):
        kind = {path for path, a in found.items() if a.on_input is on_input}
        parts = [(path, site.part) for path, site in ((s.name, s) for s in walk(model))]
        meant = {
            path.removesuffix(f".{part}") + (f":{part}" if part else "")
            for path, part in parts
            if any(path.endswith(end.replace(":", ".")) for end in wanted)
        }
        assert (kind == meant and meant) or not wanted


def test_a_feedforward_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(TargetError, match=r"feedforward: 'down_prj' matches none.*did you mean .*down_proj"):
        peftkit.inject(llama(), IA3Config(feedforward="down_prj"))


# -- LoHa and LoKr -----------------------------------------------------------------------------------------------------

size = st.integers(1, 5)


@settings(max_examples=60, deadline=None)
@given(size, size, size, size, st.lists(st.integers(1, 3), max_size=2))
def test_the_blocks_compute_the_kronecker_product(out1, in1, out2, in2, batch):
    w1, w2 = torch.randn(out1, in1, dtype=torch.float64), torch.randn(out2, in2, dtype=torch.float64)
    x = torch.randn(*batch, in1 * in2, dtype=torch.float64)
    torch.testing.assert_close(through_factors(x, w1, w2), x @ torch.kron(w1, w2).t(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init", ["peft", "lycoris"])
@pytest.mark.parametrize("make", [LoHaConfig, LoKrConfig])
def test_one_factor_is_zero_at_the_start(make, init):
    model = nn.Sequential(nn.Linear(30, 20))
    peftkit.inject(model, make(r=2, init=init, targets="0"))
    zero = {n for n, t in grafted(model)["0"].tensors().items() if not t.any()}
    assert zero == {
        (LoHaConfig, "peft"): {"hada_w2_b"}, (LoHaConfig, "lycoris"): {"hada_w2_a"},
        (LoKrConfig, "peft"): {"lokr_w1"}, (LoKrConfig, "lycoris"): {"lokr_w2_b"},
    }[make, init]  # fmt: skip
    with pytest.raises(ValueError, match="init: one of 'peft', 'lycoris', not 'zero'"):
        make(init="zero")


@pytest.mark.parametrize("factor", [0, -2, 1.5, True])
def test_factors_that_make_no_sense(factor):
    with pytest.raises(ValueError, match="factor: a positive integer, or -1"):
        LoKrConfig(factor=factor)


def test_the_hadamard_product_and_its_gradients():
    g = torch.Generator().manual_seed(0)
    shapes = ((4, 2), (2, 3), (4, 2), (2, 3))
    factors = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
    a, b, c, d = factors
    assert torch.equal(hadamard(a, b, c, d), (a @ b) * (c @ d))
    assert torch.autograd.gradcheck(hadamard, factors) and torch.autograd.gradgradcheck(hadamard, factors)
