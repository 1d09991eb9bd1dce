"""Series and parallel adapters against their formulas in fp64, and the settings of papers against published counts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from block_models import Layer, stack
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig, ParallelAdapterConfig, SeriesAdapterConfig, TargetError
from peftkit.bottleneck_config import ACTIVATIONS
from peftkit.testing.models import bert, drawn, encoder, evaluated, gpt2, ids, linear, llama, numbers

CLASSES = (SeriesAdapterConfig, ParallelAdapterConfig)
every = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.method)
REFERENCE = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "silu": lambda x: x / (1 + (-x).exp()),
    "swish": lambda x: x / (1 + (-x).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "mish": lambda x: x * torch.tanh(torch.log1p(x.exp())),
    "softplus": lambda x: torch.log1p(x.exp()),
    "relu6": lambda x: x.clamp(0, 6),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
}


def draw(model: nn.Module, *names: str, seed: int = 3) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in peftkit.parameters(model, *names):
            p.copy_(0.5 * torch.randn(p.shape, generator=g))


def beside(model: nn.Module, path: str, x: Tensor, activation: str, scale: float, name: str = "default") -> Tensor:
    """`s · (W_up g(W_down x + b_down) + b_up)` of the adapter at `path`, in fp64."""
    held = {k: p.detach().double() for k, p in model.get_submodule(f"{path}.peftkit.{name}").named_parameters()}
    hidden = REFERENCE[activation](x.double() @ held["down"].T + held.get("down_bias", 0.0))
    return scale * (hidden @ held["up"].T + held.get("up_bias", 0.0))


# -- the formulas -------------------------------------------------------------------------------------------------------


def test_every_activation_has_a_reference():
    assert set(REFERENCE) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@every
def test_the_formula_with_every_activation(cls, activation):
    model, x = stack().double(), 2 * numbers(2, 5, 8)().double()
    block = model[0].mlp
    h = block(x)
    peftkit.inject(model, cls(bottleneck=3, activation=activation, scale=-1.5, targets="mlp"))
    draw(model)
    expected = h + beside(model, "0.mlp", h if cls is SeriesAdapterConfig else x, activation, -1.5)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    cls=st.sampled_from(CLASSES),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    shape=st.lists(st.integers(0, 3), max_size=3),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25, "learned"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_single_linears_of_any_shape(cls, sizes, shape, bias, scale, dtype, data):
    b = data.draw(st.integers(1, max(sizes) if cls is ParallelAdapterConfig else sizes[1]))
    model = drawn(nn.Sequential(nn.Linear(*sizes), nn.Identity())).to(dtype)
    x = torch.randn(*shape, sizes[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    h = model(x)
    peftkit.inject(model, cls(bottleneck=b, activation="tanh", bias=bias, scale=scale, targets="0"))
    assert torch.equal(model(x), h)
    draw(model)
    s = float(model[0].peftkit.default.scale.detach()) if scale == "learned" else scale
    expected = h.double() + beside(model, "0", h if cls is SeriesAdapterConfig else x, "tanh", s)
    found = model(x)
    assert found.dtype == dtype and found.shape == h.shape
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=32 * eps * (1 + float(expected.detach().abs().sum()))
    )


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("path", ["encoder.layer.0.output", "encoder.layer.1.attention.output"])
def test_berts_parallel_branch_enters_with_the_residual(path, keyword):
    model = bert().double()
    peftkit.inject(model, ParallelAdapterConfig.he(bottleneck=3, targets=("attention", "mlp")))
    draw(model)
    module = model.get_submodule(path)
    h, x = numbers(2, 5, module.dense.in_features)().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    expected = F.layer_norm(
        module.dense(h) + beside(model, path, x, "relu", 4.0) + x,
        (16,),
        module.LayerNorm.weight,
        module.LayerNorm.bias,
        module.LayerNorm.eps,
    )
    found = module(hidden_states=h, input_tensor=x) if keyword else module(h, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_berts_feed_forward_with_a_branch_is_that_of_the_paper():
    """`norm(FFN(x) + s·PA(x) + x)`, over the layer's own modules."""
    model = bert().double()
    peftkit.inject(model, ParallelAdapterConfig.he(bottleneck=3))
    draw(model)
    layer, x = model.encoder.layer[0], torch.randn(2, 5, 16, dtype=torch.float64)
    ffn = layer.output.dense(F.gelu(layer.intermediate.dense(x)))
    expected = layer.output.LayerNorm(ffn + beside(model, "encoder.layer.0.output", x, "relu", 4.0) + x)
    torch.testing.assert_close(layer.feed_forward_chunk(x), expected, rtol=1e-10, atol=1e-10)


def test_the_branch_of_an_attention_reads_its_query():
    model, x = drawn(nn.Sequential(Layer(nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8))))).double(), None
    attention = model[0].attn
    x, other = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    plain, weights = attention(x, other, other)
    peftkit.inject(model, ParallelAdapterConfig(bottleneck=3, targets="attention"))
    draw(model)
    expected = plain + beside(model, "0.attn", x, "relu", 1.0)
    for found, also in (attention(x, other, other), attention(key=other, value=other, query=x)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(also, weights)


@every
def test_dropout_comes_after_the_activation_and_in_training_alone(cls):
    model, x = stack().double(), numbers(2, 5, 8)().double()
    block = model[0].mlp
    h = block(x)
    peftkit.inject(model, cls(bottleneck=4, activation="sigmoid", dropout=0.5, targets="mlp"))
    draw(model)
    a, z = model[0].mlp.peftkit.default, h if cls is SeriesAdapterConfig else x
    whole = h + beside(model, "0.mlp", z, "sigmoid", 1.0)
    torch.testing.assert_close(block(x), whole, rtol=1e-10, atol=1e-10)
    model.train()
    torch.manual_seed(7)
    found = block(x)
    torch.manual_seed(7)
    hidden = F.dropout(torch.sigmoid(z @ a.down.T + a.down_bias), 0.5)
    assert (hidden == 0).any()
    torch.testing.assert_close(found, h + hidden @ a.up.T + a.up_bias, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found, whole)


def test_gradients_are_those_of_the_formula():
    model, x = linear().double(), numbers(3, 6)().double()
    peftkit.inject(model, SeriesAdapterConfig(bottleneck=3, activation="gelu", scale="learned", targets="0"))
    draw(model)
    a = model[0].peftkit.default
    ps = dict(a.named_parameters())

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(
            model, dict(zip((f"0.peftkit.default.{n}" for n in ps), values, strict=True)), (x,)
        )

    assert torch.autograd.gradcheck(run, tuple(p.detach().clone().requires_grad_() for p in ps.values()))


# -- several ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["attention", "mlp"])
@pytest.mark.parametrize("make", [llama, bert, gpt2, encoder], ids=lambda m: m.__name__)
@every
def test_several_read_the_same_and_add_up_in_any_order(cls, make, targets):
    model = make().double()
    x = numbers(2, 5, 8)().double() if make is encoder else ids()
    try:
        for i, name in enumerate(("a", "b", "c")):
            peftkit.inject(model, cls(bottleneck=2, activation="tanh", targets=targets), name=name)
            draw(model, name, seed=i)
    except TargetError as refusal:
        pytest.skip(str(refusal))
    found = []
    for order in (("a", "b", "c"), ("c", "a", "b"), ("b", "c", "a")):
        peftkit.activate(model, *order)
        found.append(evaluated(model, x))
    assert all(torch.allclose(y, found[0], rtol=1e-10, atol=1e-12) for y in found[1:])
    peftkit.activate(model, "a", "b")
    assert not torch.allclose(evaluated(model, x), found[0])


def test_two_series_adapters_are_the_sum_of_both_changes_of_one_output():
    model, x = linear().double(), numbers(3, 6)().double()
    h = model[0](x)
    for i, name in enumerate(("a", "b")):
        peftkit.inject(model, SeriesAdapterConfig(bottleneck=3, targets="0"), name=name)
        draw(model, name, seed=i)
    peftkit.activate(model, "a", "b")
    expected = h + beside(model, "0", h, "relu", 1.0, "a") + beside(model, "0", h, "relu", 1.0, "b")
    torch.testing.assert_close(model[0](x), expected, rtol=1e-10, atol=1e-10)


def test_a_series_adapter_reads_what_lora_makes_of_its_host_whichever_came_first():
    model, x = linear().double(), numbers(3, 6)().double()
    peftkit.inject(model, SeriesAdapterConfig(bottleneck=3, targets="0"), name="series")
    peftkit.inject(model, LoRAConfig(r=2, targets="0"), name="lora")
    peftkit.inject(model, ParallelAdapterConfig(bottleneck=2, targets="0"), name="beside")
    for i, name in enumerate(("series", "lora", "beside")):
        peftkit.activate(model, name)
        draw(model, name, seed=i)
    peftkit.activate(model, "lora")
    h = model[0](x)
    for order in (("series", "lora"), ("lora", "series")):
        peftkit.activate(model, *order)
        torch.testing.assert_close(model[0](x), h + beside(model, "0", h, "relu", 1.0, "series"))
    peftkit.activate(model, "beside")
    h = model[0](x)
    for order in (("series", "beside"), ("beside", "series")):
        peftkit.activate(model, *order)
        torch.testing.assert_close(model[0](x), h + beside(model, "0", h, "relu", 1.0, "series"))


# -- placements ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_7b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # the defaults are LLaMA-7B's
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    return model


@pytest.mark.parametrize(
    ("config", "count", "share", "sites"),
    [
        (SeriesAdapterConfig.llm_adapters(), 67_108_864, 0.99, 32),
        (ParallelAdapterConfig.llm_adapters(), 247_463_936, 3.54, 64),
        (SeriesAdapterConfig.houlsby(), 64 * (2 * 64 * 4096 + 64 + 4096), None, 64),
        (SeriesAdapterConfig.pfeiffer(), 32 * (2 * 256 * 4096 + 256 + 4096), None, 32),
        (ParallelAdapterConfig.he(), 32 * (2 * 512 * 4096 + 512 + 4096), None, 32),
    ],
    ids=["series", "parallel", "houlsby", "pfeiffer", "he"],
)
def test_parameters_of_the_placements_on_llama_7b(llama_7b, config, count, share, sites):
    report = peftkit.inject(llama_7b, config)
    try:
        assert (report.parameters, report.trained, len(report.sites)) == (count, count, sites)
        assert share is None or round(100 * count / (6_738_415_616 + count), 2) in (share, share - 0.01)
    finally:
        peftkit.eject(llama_7b)


def test_the_settings_of_papers():
    def of(config) -> tuple:
        return config.targets, config.activation, config.bias, config.scale, config.init, config.identity

    assert of(SeriesAdapterConfig.houlsby()) == (("attention", "mlp"), "gelu", True, 1.0, "kaiming", "bits")
    assert of(SeriesAdapterConfig.pfeiffer()) == (("mlp",), "relu", True, 1.0, "kaiming", "bits")
    assert of(ParallelAdapterConfig.he()) == (("mlp",), "relu", True, 4.0, "kaiming", "bits")
    for cls, targets in ((SeriesAdapterConfig, ("mlp",)), (ParallelAdapterConfig, ("up_proj", "down_proj"))):
        assert of(cls.llm_adapters()) == (targets, "tanh", False, 1.0, "bert", "none")
    assert SeriesAdapterConfig.pfeiffer(bottleneck=7).reduction is None
    assert SeriesAdapterConfig.houlsby(activation="silu", targets="mlp").activation == "silu"


def test_widths_by_pattern_and_by_reduction():
    model = llama()
    peftkit.inject(model, SeriesAdapterConfig(bottleneck={"*": 2, "layers.1.mlp": 5}, targets=("attention", "mlp")))
    found = {s: model.get_submodule(s).peftkit.default.shape.bottleneck for s in peftkit.describe(model).sites}
    assert set(found.values()) == {2, 5} and found["model.layers.1.mlp"] == 5
    peftkit.eject(model)
    peftkit.inject(model, ParallelAdapterConfig(reduction={"**": 8, "down_proj": 2}, targets=["up_proj", "down_proj"]))
    assert model.model.layers[0].mlp.up_proj.peftkit.default.down.shape == (3, 16)
    assert model.model.layers[0].mlp.down_proj.peftkit.default.down.shape == (8, 24)


@every
def test_without_targets_it_is_after_or_beside_the_feed_forward(cls):
    model = llama()
    assert peftkit.inject(model, cls(bottleneck=4)).sites == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert "b=4, relu" in str(peftkit.describe(model))


def test_initial_values():
    model = drawn(nn.Sequential(nn.Linear(400, 300)))
    peftkit.inject(model, ParallelAdapterConfig(bottleneck=200, scale="learned", targets="0"))
    a = model[0].peftkit.default
    assert not a.up.any() and not a.down_bias.any() and not a.up_bias.any() and a.scale == 1.0
    assert a.down.abs().max() <= 1 / 20 and abs(float(a.down.detach().std()) - 1 / 20 / math.sqrt(3)) < 1e-3
    peftkit.eject(model)
    peftkit.inject(model, ParallelAdapterConfig(bottleneck=200, init="bert", targets="0"))
    a = model[0].peftkit.default
    assert not a.down_bias.any() and all(abs(float(p.detach().std()) - 0.02) < 1e-3 for p in (a.down, a.up))
    assert not torch.equal(
        model(torch.ones(2, 400)), model[0].peftkit.default.forward(lambda x: 0 * x[:, :300], torch.ones(2, 400))
    )


def test_a_frozen_config_stays_what_it_was():
    widths = {"*": 2}
    config = SeriesAdapterConfig(bottleneck=widths)
    widths["*"] = 9
    assert config.bottleneck == {"*": 2} and dataclasses.replace(config, scale=2.0).bottleneck == {"*": 2}
