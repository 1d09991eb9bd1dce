"""Which modules are sub-layers: a table over model families, written by hand, and the structures behind it."""

from __future__ import annotations

import copy

import pytest
import torch
from block_models import FAMILIES, Attention, Backwards, FeedForward, Numbered, stack
from torch import nn

import peftkit
from peftkit import ParallelAdapterConfig, SeriesAdapterConfig, TargetError, blocks, running_order
from peftkit.sites import walk
from peftkit.testing.models import drawn, encoder, numbers

each = pytest.mark.parametrize("family", FAMILIES, ids=str)


def named(model: nn.Module) -> list[tuple[str, str | None, str | None]]:
    names = {id(s.module): s.name for s in walk(model) if s.part is None}
    series, parallel = SeriesAdapterConfig(), ParallelAdapterConfig()
    return [
        (s.kind, *(names[id(place)] if place is not None else None for place in (series.place(s), parallel.place(s))))
        for s in blocks.find(model)
    ]


def first(output):
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


@each
def test_sub_layers_are_where_the_table_says(family):
    assert named(family.make()) == family.expected()


@each
@pytest.mark.parametrize("config", [SeriesAdapterConfig, ParallelAdapterConfig], ids=lambda c: c.method)
def test_an_adapter_there_changes_nothing_at_first_and_every_one_acts(family, config):
    at = 1 if config is SeriesAdapterConfig else 2
    kinds = [k for k in ("attention", "mlp") if all(row[at] for row in family.expected() if row[0] == k)]
    model = family.make()
    before = copy.deepcopy(model).requires_grad_(False)
    if len(kinds) < 2:
        with pytest.raises(TargetError, match="but it "):
            peftkit.inject(model, config(bottleneck=3, targets=("attention", "mlp")))
        assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    if not kinds:
        return
    report = peftkit.inject(model, config(bottleneck=3, activation="tanh", targets=kinds))
    assert sorted(report.sites) == sorted(row[at] for row in family.expected() if row[0] in kinds)
    expected = first(before(**family.inputs()))
    assert torch.equal(first(model(**family.inputs())), expected)
    with torch.no_grad():
        for p in peftkit.parameters(model):
            p.normal_()
    found = first(model(**family.inputs()))
    assert found.shape == expected.shape and not torch.allclose(found, expected)
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in peftkit.parameters(model))
    peftkit.eject(model)
    assert torch.equal(first(model.requires_grad_(False)(**family.inputs())), expected)


def test_a_layer_that_is_shared_is_one_sub_layer():
    model = next(f for f in FAMILIES if f.name == "albert").make()
    assert model.config.num_hidden_layers == 3 and len(blocks.find(model)) == 2


# -- structure ----------------------------------------------------------------------------------------------------------


def test_torchs_own_encoder_layer():
    assert named(encoder())[:2] == [
        ("attention", "layers.0.self_attn", "layers.0.self_attn"),
        ("mlp", "layers.0.linear2", None),
    ]


def test_torchs_own_decoder_layer_has_two_attentions():
    layer = nn.TransformerDecoderLayer(8, 2, 12)
    assert named(nn.Sequential(layer)) == [
        ("attention", "0.self_attn", "0.self_attn"),
        ("attention", "0.multihead_attn", "0.multihead_attn"),
        ("mlp", "0.linear2", None),
    ]


def test_sub_layers_without_names_are_known_by_their_classes():
    assert named(Numbered())[:2] == [
        ("attention", "layers.0.0", "layers.0.0"),
        ("mlp", "layers.0.1", "layers.0.1"),
    ]


def test_a_sequential_called_mlp_beside_a_multihead_attention():
    assert named(stack()) == [("attention", "0.attn", "0.attn"), ("mlp", "0.mlp", "0.mlp")]


def test_a_norm_that_runs_last_over_a_residual_is_seen_though_it_is_registered_first():
    assert named(stack(Backwards()))[1] == ("mlp", "0.mlp.second", None)


def test_a_norm_that_ends_a_sequential_hides_no_residual():
    ended = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.LayerNorm(8))
    assert named(stack(ended))[1] == ("mlp", "0.mlp", "0.mlp")
    assert blocks.find(nn.Sequential(Attention()))[0].block is not None


def test_output_heads_are_no_sub_layers():
    model = nn.Module()
    model.attn, model.head = nn.MultiheadAttention(8, 2), nn.Module()
    model.head.mlp = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    assert [s.kind for s in blocks.find(model)] == ["attention"]


def test_a_tower_called_attention_is_entered():
    model = nn.Module()
    model.attention_tower = nn.Sequential(stack()[0], stack()[0])
    assert [name for _, name, _ in named(model)] == [
        "attention_tower.0.attn",
        "attention_tower.0.mlp",
        "attention_tower.1.attn",
        "attention_tower.1.mlp",
    ]


def test_a_module_that_holds_itself_ends():
    model = stack()
    model[0].mlp.append(nn.Identity())
    model[0].mlp[3].back = model[0].mlp
    model[0].back = model
    assert named(model) == [("attention", "0.attn", "0.attn"), ("mlp", "0.mlp", "0.mlp")]


def test_what_is_attached_already_is_not_looked_at():
    model = stack()
    before = named(model)
    peftkit.inject(model, SeriesAdapterConfig.houlsby(bottleneck=2))
    assert named(model) == before and blocks.sizes(model[0].mlp) == (8, 8)


def test_convolutions_are_no_sub_layers():
    model = nn.Module()
    model.mlp = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    assert blocks.find(model) == []


# -- sizes and order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(6, 10), (6, 10)),
        (nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4)), (6, 4)),
        (nn.LayerNorm(7), (7, 7)),
        (nn.LayerNorm(7, elementwise_affine=False), (7, 7)),
        (nn.RMSNorm(7), (7, 7)),
        (nn.Embedding(11, 6), (6, 6)),
        (nn.MultiheadAttention(8, 2, kdim=6, vdim=6), (8, 8)),
        (FeedForward(), (8, 8)),
        (Backwards(), (8, 8)),
        (nn.GELU(), None),
        (nn.Sequential(nn.GELU()), None),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_sizes(module, expected):
    assert blocks.sizes(module) == expected


def test_sizes_of_gpt2s_transposed_linear():
    from transformers.pytorch_utils import Conv1D

    assert blocks.sizes(Conv1D(10, 6)) == (6, 10)


def test_a_gate_that_gives_one_number_does_not_make_the_block_one_wide():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.shared = nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
            self.gate = nn.Linear(8, 1)

        def forward(self, x):
            y = self.router(x).sum(-1, keepdim=True) * self.shared(x)
            return y * self.gate(x)

    assert blocks.sizes(Mixture()) == (8, 8)


def test_running_order_follows_calls_within_calls_and_own_methods():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)

        def forward(self, x):
            return self.a(torch.relu(self.helper(x)) * self.b(x))

        def helper(self, x):
            return self.c(x) if x.dim() else self.forward(self.helper(x))

    made = Nested()
    assert running_order.in_order(made) == [made.c, made.b, made.a]


def test_running_order_without_source_is_that_of_registration():
    made = Backwards()
    exec_made = type("Typed", (Backwards,), {"forward": eval("lambda self, x: self.norm(x)")})()
    assert running_order.in_order(made) == [made.first, made.second, made.norm]
    assert running_order.in_order(exec_made) == [exec_made.norm, exec_made.second, exec_made.first]


def test_a_block_is_found_on_a_model_of_any_root():
    model = drawn(FeedForward())  # the root itself is no sub-layer of anything
    with pytest.raises(TargetError, match="matches no module"):
        peftkit.inject(model, SeriesAdapterConfig(bottleneck=2))
    peftkit.inject(model, SeriesAdapterConfig(bottleneck=2, targets="net"))
    assert torch.equal(model(numbers(2, 3, 8)()), drawn(FeedForward())(numbers(2, 3, 8)()))
