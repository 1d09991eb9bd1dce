"""generate with a prompt: every way through a cache gives what one forward over the whole sequence gives."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from storage_helpers import moved
from torch import Tensor, nn

import peftkit
from peftkit import PromptTuningConfig
from peftkit.testing.models import gpt2, llama

transformers = pytest.importorskip("transformers")

LENGTH, NEW = 3, 5
IDS = torch.tensor([[4, 9, 17, 2, 25], [11, 3, 8, 29, 6]])


def prompted(make: Any = llama, name: str = "default", seed: int = 1, **kwargs: Any) -> nn.Module:
    model = make(**kwargs).double()
    config = model.generation_config
    config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 0, None, 0
    peftkit.inject(model, PromptTuningConfig(length=LENGTH), name=name)
    return moved(model, peftkit.parameters(model, name), seed)


def rows(model: nn.Module, name: str = "default") -> Tensor:
    return next(p for n, p in model.named_parameters() if n.endswith(f"peftkit.{name}.prompt")).detach()


def by_hand(model: nn.Module, ids: Tensor, before: Tensor) -> Tensor:
    """Logits of the next token: the rows and the tokens as one sequence, through the base alone."""
    with peftkit.disabled(model), torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        return model(inputs_embeds=torch.cat([before.expand(len(ids), -1, -1), embeds], 1)).logits[:, -1]


def stepped(model: nn.Module, ids: Tensor, new: int = NEW) -> Tensor:
    before = rows(model)
    for _ in range(new):
        ids = torch.cat([ids, by_hand(model, ids, before).argmax(-1, keepdim=True)], 1)
    return ids


def generated(model: nn.Module, ids: Tensor = IDS, **kwargs: Any) -> Any:
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **kwargs})


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    "way",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}, {"num_beams": 1}],
    ids=lambda w: "-".join(map(str, w.values())) or "dynamic",
)
def test_greedy_is_one_forward_at_a_time(make, way):
    model = prompted(make)
    expected = stepped(model, IDS)
    for kwargs in ({}, {"attention_mask": torch.ones_like(IDS)}):
        found = generated(model, output_logits=True, return_dict_in_generate=True, **kwargs, **way)
        assert torch.equal(found.sequences, expected)
        for i, logits in enumerate(found.logits):
            each = by_hand(model, expected[:, : IDS.shape[1] + i], rows(model)).float()
            torch.testing.assert_close(logits, each, rtol=1e-5, atol=1e-6)
    with peftkit.disabled(model):
        bare = generated(model, output_logits=True, return_dict_in_generate=True)
    assert not torch.allclose(bare.logits[0], found.logits[0], rtol=1e-2)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    "way", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}]
)
def test_left_padding_changes_nothing(make, way):
    model = prompted(make)
    short, long = IDS[:1, :3], IDS[1:]
    padded = torch.cat([torch.cat([torch.zeros(1, 2, dtype=torch.long), short], 1), long])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = generated(model, padded, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **way)
    alone = [generated(model, x, output_logits=True, return_dict_in_generate=True) for x in (short, long)]
    for row, one in enumerate(alone):
        assert torch.equal(found.sequences[row, -NEW:], one.sequences[0, -NEW:])
        for a, b in zip(found.logits, one.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}])
def test_beams_are_those_without_a_cache(way):
    model = prompted()
    expected = generated(model, num_beams=3, num_return_sequences=2, use_cache=False)
    assert torch.equal(generated(model, num_beams=3, num_return_sequences=2, **way), expected)
    with peftkit.disabled(model):
        assert not torch.equal(generated(model, num_beams=3, num_return_sequences=2), expected)


def test_eager_attention_takes_the_static_cache_too():
    model = prompted(attn_implementation="eager")
    padded = torch.cat([torch.zeros(2, 1, dtype=torch.long), IDS], 1)
    mask = (padded > 0).long()
    expected = stepped(model, IDS)
    found = generated(model, padded, attention_mask=mask, cache_implementation="static")
    assert torch.equal(found[:, 1:], expected)


def test_sampling_draws_from_the_same_distribution():
    model = prompted()
    out = generated(model, output_logits=True, return_dict_in_generate=True, do_sample=True)
    for i, logits in enumerate(out.logits):
        expected = by_hand(model, out.sequences[:, : IDS.shape[1] + i], rows(model))
        torch.testing.assert_close(logits, expected.float(), rtol=1e-5, atol=1e-5)


def test_going_on_from_a_cache():
    model = prompted()
    cache = transformers.DynamicCache(config=model.config)
    first = generated(model, past_key_values=cache)
    assert cache.get_seq_length() == LENGTH + first.shape[1] - 1
    more = torch.cat([first, torch.tensor([[7, 8], [9, 1]])], 1)
    expected = stepped(model, more)
    new = more[:, cache.get_seq_length() - LENGTH :]
    used = copy.deepcopy(cache)
    found = generated(model, new, past_key_values=used, attention_mask=torch.ones_like(more))
    assert torch.equal(found[:, -NEW:], expected[:, -NEW:])
    # generate would leave out as many tokens as the cache holds, the rows among them
    with pytest.raises(ValueError, match="give it the new tokens alone"):
        generated(model, torch.cat([more, more], 1), past_key_values=copy.deepcopy(cache))
    with torch.no_grad(), pytest.raises(ValueError, match=r"attention_mask has 2 columns, expected"):
        model(new[:, -2:], past_key_values=copy.deepcopy(cache), attention_mask=torch.ones(2, 2))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_several_tokens_at_once_behind_a_cache(make):
    model = prompted(make)
    with torch.no_grad():
        whole = model(IDS).logits
        for mask in (None, torch.ones_like(IDS)):
            out = model(IDS[:, :2], use_cache=True)
            positions = torch.arange(2, 5)[None]
            for kwargs in ({}, {"position_ids": positions}):
                rest = model(
                    IDS[:, 2:], past_key_values=copy.deepcopy(out.past_key_values), attention_mask=mask, **kwargs
                ).logits
                torch.testing.assert_close(rest, whole[:, 2:])


def test_a_static_cache_of_the_users_is_enlarged():
    model = prompted()
    cache = transformers.StaticCache(config=model.config, max_cache_len=IDS.shape[1] + NEW)
    assert torch.equal(generated(model, past_key_values=cache), stepped(model, IDS))
    cache.reset()
    with pytest.raises(ValueError, match="was allocated already"):
        generated(model, past_key_values=cache)


def test_a_static_cache_behind_which_several_tokens_come():
    model = prompted()
    padded = torch.cat([torch.zeros(2, 1, dtype=torch.long), IDS], 1)
    mask = (padded > 0).long()
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    first = generated(model, padded, attention_mask=mask, past_key_values=cache)
    more = torch.cat([first, torch.tensor([[7, 8, 9], [9, 1, 2]])], 1)
    every = torch.cat([mask, torch.ones(2, more.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    new = more[:, first.shape[1] - 1 :]
    found = generated(model, new, past_key_values=cache, attention_mask=every)
    assert torch.equal(found[:, -NEW:], stepped(model, more[:, 1:])[:, -NEW:])


def test_a_cache_that_holds_something_else_is_refused():
    model = prompted()
    with peftkit.disabled(model), torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled without a prompt"):
        model(IDS[:, :1], past_key_values=cache)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    peftkit.inject(model, PromptTuningConfig(length=LENGTH), name="other")
    with pytest.raises(ValueError, match="3 rows of another prompt"):
        model(IDS[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="does not say how much it holds"):
        model(IDS[:, :1], past_key_values=((IDS, IDS),))


def test_a_sliding_window_in_a_static_cache_is_refused():
    config = transformers.MistralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=31, sliding_window=64,
    )  # fmt: skip
    model = prompted(lambda: transformers.MistralForCausalLM(config).eval())
    assert torch.equal(generated(model), stepped(model, IDS))
    with pytest.raises(ValueError, match="cannot take a prompt"):
        generated(model, cache_implementation="static")


def test_an_encoder_decoder():
    from storage_models import t5

    model = prompted(t5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = generated(model, attention_mask=mask, use_cache=False)
    before = rows(model)
    with peftkit.disabled(model), torch.no_grad():
        assert not torch.equal(generated(model, attention_mask=mask), expected)
        embeds = torch.cat([before.expand(2, -1, -1), model.get_input_embeddings()(IDS)], 1)
        wide = torch.cat([torch.ones(2, LENGTH, dtype=torch.long), mask], 1)
        by_base = model.generate(inputs_embeds=embeds, attention_mask=wide, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(by_base, expected)
    for way in ({}, {"num_beams": 1}, {"cache_implementation": "static"}):
        assert torch.equal(generated(model, attention_mask=mask, **way), expected)
    beams = generated(model, attention_mask=mask, num_beams=3, use_cache=False)
    assert torch.equal(generated(model, attention_mask=mask, num_beams=3), beams)
    with peftkit.disabled(model), torch.no_grad():
        bare = model.encoder(IDS)
    with pytest.raises(ValueError, match="computed while the same adapters act"):
        model(encoder_outputs=bare, attention_mask=mask, decoder_input_ids=IDS)


def test_what_peft_generates():
    peft = pytest.importorskip("peft")
    model = prompted()
    theirs = llama().double()
    theirs.generation_config = copy.deepcopy(model.generation_config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            theirs, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
        ).eval()
        theirs.prompt_encoder["default"].embedding.weight.data = rows(model).clone()
        expected = theirs.generate(input_ids=IDS, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generated(model), expected)
