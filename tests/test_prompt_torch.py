"""Prompt tuning under what torch does with models: checkpointing, compiling, copying, autocast."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_prompt import IDS, MASK, RIGHT_PADDED, N, by_hand, prompted, rows

import peftkit
from peftkit import PromptTuningConfig
from peftkit.testing.models import llama

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = prompted(lambda: llama(layers=1)).train()
    expected = torch.autograd.grad(model(**RIGHT_PADDED, labels=IDS).loss, rows(model))[0]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**RIGHT_PADDED, labels=IDS).loss.backward()
    torch.testing.assert_close(rows(model).grad, expected)


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_training_step_compiles_into_one_graph(use_cache):
    model = prompted(lambda: llama(layers=1)).train()
    call = torch.compile(
        lambda x, m: model(x, attention_mask=m, labels=x, use_cache=use_cache).loss, fullgraph=True, backend="aot_eager"
    )
    expected = torch.autograd.grad(model(IDS, attention_mask=MASK, labels=IDS).loss, rows(model))[0]
    found = torch.autograd.grad(call(IDS, MASK), rows(model))[0]
    torch.testing.assert_close(found, expected)


def test_a_step_behind_a_static_cache_compiles_into_one_graph():
    model = prompted(lambda: llama(layers=1)).eval()
    cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        expected = model(IDS).logits
        model(IDS[:, :3], past_key_values=cache)
        call = torch.compile(lambda x, c: model(x, past_key_values=c).logits, fullgraph=True, backend="aot_eager")
        for i in (3, 4, 5):
            torch.testing.assert_close(call(IDS[:, i : i + 1], cache)[:, 0], expected[:, i])


def test_copies_and_pickles_have_their_own_body():
    model = prompted()
    expected = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, expected)
        with torch.no_grad():
            other.get_input_embeddings().weight.mul_(2)
            rows(other).mul_(2)
        assert torch.equal(other(IDS).logits, by_hand(other, IDS, rows(other)).logits[:, N:])
        assert torch.equal(model(IDS).logits, expected)


def test_a_new_embedding_is_the_one_that_counts():
    model = prompted()
    model.resize_token_embeddings(40)
    ids = IDS + 8
    assert torch.equal(model(ids).logits, by_hand(model, ids, rows(model)).logits[:, N:])


def test_autocast_and_half_precision():
    model = llama().bfloat16()
    peftkit.inject(model, PromptTuningConfig(length=N))
    assert rows(model).dtype == torch.float32 and model(IDS).logits.dtype == torch.bfloat16
    model = llama()
    peftkit.inject(model, PromptTuningConfig(length=N))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**RIGHT_PADDED, labels=IDS).loss
    loss.backward()
    assert rows(model).grad.dtype == torch.float32 and bool(rows(model).grad.any())
