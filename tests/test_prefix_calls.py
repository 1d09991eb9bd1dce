"""Prefixes in `nn.MultiheadAttention` and hand-written attention, against softmax written out in fp64."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig, PrefixTuningConfig, TargetError
from peftkit.methods.prefix import start_from_tokens

P, WIDTH, HEADS = 3, 8, 2


def prefixed(model: nn.Module, name: str = "default", **settings: Any) -> nn.Module:
    peftkit.inject(model, PrefixTuningConfig(**{"length": P, **settings}), name=name)
    return model


def written_out(
    module: nn.MultiheadAttention, prefix: Any, q: Tensor, k: Tensor, v: Tensor, barred: Tensor, added: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention one query, head and sequence at a time; (batch tokens width). `barred`: (batch queries tokens)."""
    weight, bias = module.in_proj_weight, module.in_proj_bias
    separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    weights = separate if weight is None else weight.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((q, k, v), weights, bias.chunk(3), strict=True))
    dim = WIDTH // HEADS
    out, seen = torch.zeros_like(q), torch.zeros(len(q), HEADS, q.shape[1], k.shape[1], dtype=q.dtype)
    for b in range(len(q)):
        for h in range(HEADS):
            at = slice(h * dim, (h + 1) * dim)
            keys, values = torch.cat([prefix.key[h], k[b, :, at]]), torch.cat([prefix.value[h], v[b, :, at]])
            for i in range(q.shape[1]):
                scores = keys @ q[b, i, at] / math.sqrt(dim)
                scores = scores + torch.cat([torch.zeros(P), added[b, i]])
                scores[P:][barred[b, i]] = -math.inf
                share = scores.softmax(0)
                out[b, i, at], seen[b, h, i] = share @ values, share[P:]
    return module.out_proj(out), seen


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_multihead_attention_is_softmax_written_out(data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    kdim, first = data.draw(st.sampled_from([None, 6])), data.draw(st.booleans())
    module = nn.MultiheadAttention(WIDTH, HEADS, kdim=kdim, vdim=kdim, batch_first=first).double()
    nn.init.normal_(module.in_proj_bias)
    prefixed(module, targets=lambda name, m: m is module).train(data.draw(st.booleans()))
    itself = kdim is None and data.draw(st.booleans())
    q = torch.randn(2, 4, WIDTH).double()
    k = q if itself else torch.randn(2, 5, kdim or WIDTH).double()
    tokens = k.shape[1]
    mask_kind, pad_kind = (data.draw(st.sampled_from([None, "bool", "float"])) for _ in range(2))
    barred, added = torch.zeros(2, 4, tokens, dtype=torch.bool), torch.zeros(2, 4, tokens).double()
    mask = padding = None
    if mask_kind == "bool":
        mask = torch.rand(4, tokens) > 0.6
        barred |= mask
    elif mask_kind == "float":
        mask = torch.randn(4, tokens).double()
        added += mask
    if pad_kind == "bool":
        padding = torch.zeros(2, tokens, dtype=torch.bool)
        padding[0, : data.draw(st.integers(0, tokens))] = True  # to all of it: the prefix is attended to alone
        barred |= padding[:, None]
    elif pad_kind == "float":
        padding = torch.randn(2, tokens).double()
        added += padding[:, None]
    expected, seen = written_out(module, module.peftkit.default, q, k, k, barred, added)
    turn = (lambda t: t) if first else (lambda t: t.transpose(0, 1))
    query = turn(q)
    key = query if itself else turn(k)
    need, average = data.draw(st.booleans()), data.draw(st.booleans())
    with torch.set_grad_enabled(data.draw(st.booleans())):
        found, weights = module(
            query, key, key, key_padding_mask=padding, attn_mask=mask, need_weights=need, average_attn_weights=average
        )
    torch.testing.assert_close(turn(found), expected)
    if need:
        torch.testing.assert_close(weights, seen.mean(1) if average else seen)
    else:
        assert weights is None


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()


X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).double()


@torch.no_grad()
def test_an_encoder_in_eval_leaves_its_fused_path():
    base = encoder()
    model = prefixed(copy.deepcopy(base))
    padding = torch.tensor([[False] * 5, [True, True, False, False, False]])
    trained = model.train()(X, src_key_padding_mask=padding)
    assert torch.equal(model.eval()(X, src_key_padding_mask=padding), trained)
    assert not torch.allclose(base.eval()(X, src_key_padding_mask=padding)[~padding], trained[~padding])
    with peftkit.disabled(model):
        assert torch.equal(model(X), base(X))


def test_two_act_as_one_of_both_and_lora_beside_them():
    model, one = encoder(), None
    one = copy.deepcopy(model)
    prefixed(prefixed(model), "b", length=2)
    prefixed(one, length=P + 2)
    for m in (model, one):
        peftkit.inject(m, LoRAConfig(r=2, targets="all-linear"), name="lora")
    with torch.no_grad():
        for i, layer in enumerate(one.layers):
            pair = model.layers[i].self_attn.peftkit
            layer.self_attn.peftkit.default.key.copy_(torch.cat([pair.default.key, pair.b.key], 1))
            layer.self_attn.peftkit.default.value.copy_(torch.cat([pair.default.value, pair.b.value], 1))
        for p, q in zip(peftkit.parameters(model, "lora"), peftkit.parameters(one, "lora"), strict=True):
            p.normal_(std=0.3)
            q.copy_(p)
    peftkit.activate(model, "default", "b")
    peftkit.activate(one, "default")
    without = one(X)
    torch.testing.assert_close(model(X), without)
    peftkit.activate(model, "b", "lora", "default")
    peftkit.activate(one, "lora", "default")
    torch.testing.assert_close(model(X), one(X))
    assert not torch.allclose(one(X), without)


class Written(nn.Module):
    """Grouped-query attention as one writes it by hand; causal."""

    def __init__(self, repeats: bool = True) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.repeats, self.fused = 4, 2, 4, repeats, True
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.out = nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.repeats or not self.fused:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not self.repeats)
        else:
            scores = q @ k.transpose(-1, -2) / 2
            y = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("repeats", [True, False])
def test_attention_written_by_hand(repeats):
    module = Written(repeats).double()
    model = prefixed(nn.Sequential(module, nn.Tanh()))
    found = module(X)
    q, k, v = (p(X).unflatten(-1, (-1, 4)) for p in (module.q_proj, module.k_proj, module.v_proj))
    pair, out = module.peftkit.default, torch.zeros(2, 5, 4, 4).double()
    for b in range(2):
        for h in range(4):
            for i in range(5):
                keys = torch.cat([pair.key[h // 2], k[b, : i + 1, h // 2]])
                values = torch.cat([pair.value[h // 2], v[b, : i + 1, h // 2]])
                out[b, i, h] = (keys @ q[b, i, h] / 2).softmax(0) @ values
    torch.testing.assert_close(found, module.out(out.flatten(2)))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(X), model(X))


def test_heads_that_a_module_repeats_are_taken_once_from_real_tokens():
    base = nn.Sequential(nn.Embedding(9, WIDTH), Written()).double()
    model, first, rest = prefixed(copy.deepcopy(base)), torch.tensor([[4, 5, 6]]), torch.tensor([[1, 2, 7, 3]])
    start_from_tokens(model, first)
    torch.testing.assert_close(model(rest), base(torch.cat([first, rest], 1))[:, P:])


def test_an_attention_that_went_past_its_prefix_is_named():
    model = prefixed(nn.Sequential(Written().double()))
    model[0].fused = False
    with pytest.raises(RuntimeError, match="'0' has computed without its prefix"):
        model(X)
    with peftkit.disabled(model):
        model(X)


class Block(nn.Module):
    """An attention that another attention's module holds, and a call of its own around it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 4
        self.inner = Written()

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return F.scaled_dot_product_attention(h, h, h)


def test_nested_attentions_are_prefixed_once_inside():
    model = nn.Sequential(Block().double())
    with pytest.raises(TargetError, match="attention that it holds, 'inner', is the one to name"):
        peftkit.inject(model, PrefixTuningConfig(targets="0"))
    report = peftkit.inject(model, PrefixTuningConfig(length=P))
    assert report.sites == ["0.inner"]
    inner = copy.deepcopy(model[0].inner)(X)
    torch.testing.assert_close(model(X), F.scaled_dot_product_attention(inner, inner, inner))


def test_threads_prefix_apart():
    model = prefixed(prefixed(nn.Sequential(Written().double())), "b")
    expected = {}
    for name in ("default", "b"):
        peftkit.activate(model, name)
        expected[name] = model(X)
    start, found = threading.Barrier(2), {}

    def run(name: str) -> None:
        start.wait()
        with peftkit.using(model, name):
            found[name] = [model(X) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(name,)) for name in expected]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not torch.allclose(expected["default"], expected["b"])
    assert all(torch.equal(y, expected[name]) for name, ys in found.items() for y in ys)
