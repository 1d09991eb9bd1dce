"""Prompt tuning, against rows and embeddings put together by hand and given to the base alone."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from storage_helpers import moved
from storage_models import IDS, t5
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig, PromptTuningConfig, TargetError
from peftkit.testing.models import bert, gpt2, llama

transformers = pytest.importorskip("transformers")

N = 3
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
RIGHT_PADDED = {"input_ids": IDS, "attention_mask": MASK}


def prompted(make: Any = llama, name: str = "default", seed: int = 1, **kwargs: Any) -> nn.Module:
    model = make().double()
    peftkit.inject(model, PromptTuningConfig(**{"length": N, **kwargs}), name=name)
    return moved(model, peftkit.parameters(model, name), seed)


def rows(model: nn.Module, name: str = "default") -> nn.Parameter:
    return next(p for n, p in model.named_parameters() if n.endswith(f"peftkit.{name}.prompt"))


def by_hand(model: nn.Module, ids: Tensor, before: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
    """What the base alone makes of rows and tokens."""
    with peftkit.disabled(model):
        embeds = torch.cat([before.expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], 1)
        if mask is not None:
            mask = torch.cat([mask.new_ones(len(ids), before.shape[0]), mask], 1)
        return model(inputs_embeds=embeds, attention_mask=mask, **kwargs)


def first(out: Any) -> Tensor:
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("make", [llama, gpt2, bert])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
def test_it_is_a_concatenation(make, mask):
    model = prompted(make)
    found, expected = first(model(IDS, attention_mask=mask)), first(by_hand(model, IDS, rows(model), mask))
    assert torch.equal(found, expected[:, N:])
    assert not torch.allclose(found, expected[:, :-N])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_labels_are_those_of_the_tokens(make):
    model = prompted(make)
    labels = IDS.masked_fill(MASK == 0, -100)
    labels[:, 0] = -100  # by hand it would be predicted too, from the last of the rows
    loss = model(**RIGHT_PADDED, labels=labels).loss
    found = torch.autograd.grad(loss, rows(model))[0]
    before = rows(model).detach().requires_grad_()
    longer = torch.cat([labels.new_full((2, N), -100), labels], 1)
    expected = by_hand(model, IDS, before, MASK, labels=longer).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, before)[0], rtol=1e-9, atol=1e-12)


def test_an_encoder_decoder():
    model = prompted(t5)
    assert peftkit.describe(model).sites == ["encoder", "decoder"]
    asked = {"labels": IDS[:, :4].contiguous(), "decoder_input_ids": IDS[:, 2:]}
    out = model(**RIGHT_PADDED, **asked)
    before = rows(model).detach().requires_grad_()
    expected = by_hand(model, IDS, before, MASK, **asked)
    assert torch.equal(out.logits, expected.logits)
    assert out.encoder_last_hidden_state.shape[1] == N + IDS.shape[1]
    found, wanted = torch.autograd.grad(out.loss, rows(model)), torch.autograd.grad(expected.loss, before)
    torch.testing.assert_close(found, wanted)
    alone = transformers.T5EncoderModel(model.config).double().eval()
    peftkit.inject(alone, PromptTuningConfig(length=N))
    assert alone(IDS).last_hidden_state.shape == (*IDS.shape, 16)
    for target in ("encoder", "decoder"):
        bare = t5()
        with pytest.raises(TargetError, match="leave targets out"):
            peftkit.inject(bare, PromptTuningConfig(targets=target))
        assert not any(hasattr(type(m), "__grafted__") for m in bare.modules())


def test_bart_is_another_with_learned_positions():
    config = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=32, max_position_embeddings=12, pad_token_id=0,
    )  # fmt: skip
    model = prompted(lambda: transformers.BartForConditionalGeneration(config).eval())
    decoder = {"decoder_input_ids": IDS[:, :4]}
    found = model(**RIGHT_PADDED, **decoder).logits
    assert torch.equal(found, by_hand(model, IDS, rows(model), MASK, **decoder).logits)
    with pytest.raises(ValueError, match="13 positions, but this BartEncoder has learned 12"):
        model(IDS.repeat(1, 2)[:, :10], **decoder)


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=str)
def test_masks_of_four_dimensions(make, dtype):
    model = prompted(make)
    visible = MASK[:, None, None].bool().expand(-1, 1, 6, -1)
    visible = visible & torch.ones(6, 6).tril().bool() if make is llama else visible
    mask = visible if dtype == torch.bool else torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -1e300)
    found, expected = first(model(IDS, attention_mask=mask)), first(model(**RIGHT_PADDED))
    real = MASK.bool()
    torch.testing.assert_close(found[real], expected[real])


def test_rows_of_a_model_that_looks_both_ways_see_what_any_token_sees():
    model = prompted(bert)
    visible = torch.ones(6, 6).triu(-1).bool().expand(2, 1, 6, 6) & (torch.arange(6) != 4)
    wide = torch.ones(2, 1, N + 6, N + 6, dtype=torch.bool)
    wide[..., N:, N:], wide[..., :N, N + 4] = visible, False
    with peftkit.disabled(model):
        embeds = torch.cat([rows(model).expand(2, -1, -1), model.get_input_embeddings()(IDS)], 1)
        expected = first(model(inputs_embeds=embeds, attention_mask=wide))
    torch.testing.assert_close(first(model(IDS, attention_mask=visible)), expected[:, N:])
    one_way, other = torch.ones(2, 1, 6, 6).tril().bool(), IDS.clone()
    other[:, -1] += 1  # rows that saw it would tell the tokens before it
    found = [first(model(ids, attention_mask=one_way))[:, :-1] for ids in (IDS, other)]
    torch.testing.assert_close(*found)


def test_positions_and_token_types():
    model = prompted()
    torch.testing.assert_close(model(IDS, position_ids=torch.arange(6)[None]).logits, model(IDS).logits)
    apart = torch.arange(6)[None] * 2
    with pytest.raises(ValueError, match="several sequences packed in a row"):
        model(IDS, position_ids=apart)
    wide = torch.cat([torch.arange(N), N + apart[0]])[None]
    found = model(IDS, position_ids=apart, attention_mask=torch.ones_like(IDS)).logits
    expected = by_hand(model, IDS, rows(model), torch.ones_like(IDS), position_ids=wide).logits
    assert torch.equal(found, expected[:, N:])
    shifted = torch.arange(4, 10)[None]  # not the beginning of another sequence
    wide = torch.cat([torch.arange(N), N + shifted[0]])[None]
    expected = by_hand(model, IDS, rows(model), torch.ones_like(IDS), position_ids=wide).logits
    assert torch.equal(model(IDS, position_ids=shifted).logits, expected[:, N:])
    model, kinds = prompted(bert), (IDS > 5).long()
    wide = torch.cat([torch.zeros(2, N, dtype=torch.long), kinds], 1)
    found = model(**RIGHT_PADDED, token_type_ids=kinds).last_hidden_state
    expected = by_hand(model, IDS, rows(model), MASK, token_type_ids=wide).last_hidden_state
    assert torch.equal(found, expected[:, N:])


def test_everything_else_that_comes_out():
    model = prompted(lambda: llama(attn_implementation="eager"))
    asked = {"output_hidden_states": True, "output_attentions": True}
    out, whole = model(IDS, **asked), by_hand(model, IDS, rows(model), **asked)
    assert all(torch.equal(a, b[:, N:]) for a, b in zip(out.hidden_states, whole.hidden_states, strict=True))
    assert all(torch.equal(a, b[:, :, N:]) for a, b in zip(out.attentions, whole.attentions, strict=True))
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 6, dtype=torch.float64))
    pair = model.model(IDS, return_dict=False)
    assert torch.equal(pair[0], model.model(IDS).last_hidden_state) and pair[1].get_seq_length() == N + 6
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, model(IDS).logits)
    assert torch.equal(model.model(IDS, MASK)[0], model.model(**RIGHT_PADDED)[0])  # by position
    with pytest.raises(ValueError, match="exactly one of"):
        model(IDS, inputs_embeds=model.get_input_embeddings()(IDS))


def test_what_a_router_says_is_of_the_tokens():
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=31, num_local_experts=2, num_experts_per_tok=1,
        experts_implementation="eager",
    )  # fmt: skip
    model = prompted(lambda: transformers.MixtralForCausalLM(config).eval())
    out = model(**RIGHT_PADDED, labels=IDS, output_router_logits=True)
    whole = by_hand(model, IDS, rows(model), MASK, output_router_logits=True)
    for a, b in zip(out.router_logits, whole.router_logits, strict=True):
        torch.testing.assert_close(a.view(2, 6, -1), b.view(2, N + 6, -1)[:, N:])
    assert bool(out.aux_loss.isfinite())


def test_pooling_is_that_of_the_whole():
    from storage_models import bert as classifier

    model = prompted(classifier)
    assert torch.equal(model(IDS).logits, by_hand(model, IDS, rows(model)).logits)


# -- beside others --------------------------------------------------------------------------------------------------------


def test_prompts_together_stand_in_the_order_of_attaching():
    model = prompted()
    peftkit.inject(model, PromptTuningConfig(length=2), name="second")
    moved(model, peftkit.parameters(model, "second"), 2)
    both = torch.cat([rows(model, "second"), rows(model)])
    expected = by_hand(model, IDS, both).logits[:, N + 2 :]
    for names in (("default", "second"), ("second", "default")):
        peftkit.activate(model, *names)
        assert torch.equal(model(IDS).logits, expected)
    cache = model(IDS[:, :4], use_cache=True).past_key_values
    torch.testing.assert_close(model(IDS[:, 4:], past_key_values=cache).logits, expected[:, 4:])
    body = model.model
    kept, body.forward = body.forward, lambda *args, **kwargs: kept(*args, **kwargs)  # as accelerate's hooks do
    assert torch.equal(model(IDS).logits, expected)


def test_lora_on_the_embedding_acts_on_the_tokens_alone():
    model = prompted()
    peftkit.inject(model, LoRAConfig(r=2, targets=["embed_tokens", "q_proj"]), name="lora")
    moved(model, peftkit.parameters(model, "lora"))
    peftkit.activate(model, "default", "lora")
    with peftkit.using(model, "lora"):
        embeds = torch.cat([rows(model).expand(2, -1, -1), model.get_input_embeddings()(IDS)], 1)
        expected = model(inputs_embeds=embeds).logits
    assert torch.equal(model(IDS).logits, expected[:, N:])


def test_merging_is_refused():
    model = prompted()
    with pytest.raises(peftkit.NotMergeable, match="an input of the model"):
        peftkit.merge(model)


# -- where, and with what -------------------------------------------------------------------------------------------------


def test_rows_begin_as_rows_of_the_vocabulary():
    torch.manual_seed(3)
    model = llama()
    table = model.get_input_embeddings().weight
    peftkit.inject(model, PromptTuningConfig(length=8, tokens=[7, 2]))
    found = rows(model)
    assert torch.equal(found[:2], table[[7, 2]])
    assert all((table == row).all(1).any() for row in found) and len(found.unique(dim=0)) > 2
    before = found.detach().clone()
    peftkit.reset(model)
    assert torch.equal(found[:2], before[:2]) and not torch.equal(found[2:], before[2:])
    for init, largest in (("uniform", 0.5), ("normal", 9)):
        peftkit.eject(model)
        peftkit.inject(model, PromptTuningConfig(length=500, tokens=[7], init=init))
        assert torch.equal(rows(model)[:1], table[[7]]) and 0.4 < rows(model)[1:].abs().max() <= largest
        assert abs(rows(model)[1:].std() - (0.5 / 3**0.5 if init == "uniform" else 1)) < 0.05


def test_rows_are_in_the_space_of_what_the_embedding_returns():
    config = transformers.Gemma3TextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=31,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval()
    peftkit.inject(model, PromptTuningConfig(length=1, tokens=[5]))
    torch.testing.assert_close(rows(model)[0], 4 * model.get_input_embeddings().weight[5])
    found = model(IDS).logits
    peftkit.eject(model)
    as_token = torch.cat([torch.full((2, 1), 5), IDS], 1)
    torch.testing.assert_close(found, model(as_token).logits[:, 1:])


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"length": 0}, "at least 1"),
        ({"length": True}, "at least 1"),
        ({"length": 1, "tokens": [1, 2]}, "at most length=1"),
        ({"tokens": [-1]}, "ids of at least 0"),
        ({"init": "vocabulary"}, "one of 'vocab'"),
        ({"dtype": torch.int8}, "floating-point"),
    ],
)
def test_settings_that_make_no_sense(kwargs, words):
    with pytest.raises(ValueError, match=words):
        PromptTuningConfig(**kwargs)


@pytest.mark.parametrize(
    ("make", "kwargs", "words"),
    [
        (gpt2, {"length": 32}, "has learned 32 positions"),
        (llama, {"tokens": [31]}, "31 lies beyond the 31 rows"),
        (llama, {"targets": "^"}, "it wraps 'model', which turns the ids into hidden states"),
        (llama, {"targets": "norm"}, "it takes no inputs_embeds"),
        (bert, {"targets": "embeddings"}, "it takes no attention_mask"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "matches no module of Sequential"),
        (lambda: nn.ModuleList([bert(), bert()]), {}, "'0' and '1' are meant; choose with targets='0'"),
    ],
)
def test_places_that_cannot_have_a_prompt(make, kwargs, words):
    model = make()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        peftkit.inject(model, PromptTuningConfig(**kwargs))
    assert [type(m) for m in model.modules()] == classes


def test_positions_run_out():
    model = prompted(gpt2)
    ids = torch.ones(1, 30, dtype=torch.long)
    assert model(ids[:, :29]).logits.shape[1] == 29
    for kwargs in ({}, {"position_ids": torch.arange(30)[None], "attention_mask": torch.ones_like(ids)}):
        with pytest.raises(
            ValueError, match="3 rows and 30 tokens are 33 positions, but this GPT2Model has learned 32"
        ):
            model(ids, **kwargs)
    with pytest.raises(ValueError, match="33 positions, but this GPT2Model has learned 32"):  # few, but far out
        model(torch.ones(1, 2, dtype=torch.long), position_ids=torch.tensor([[0, 29]]))


class Own(nn.Module):
    """A model of somebody's own, which says what it must say and nothing more."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(31, 8)
        self.mix = nn.GRU(8, 8, batch_first=True)

    def forward(self, tokens: Tensor | None, inputs_embeds: Tensor | None = None, attention_mask: Any = None) -> Tensor:
        embeds = self.table(tokens) if inputs_embeds is None else inputs_embeds
        return self.mix(embeds)[0]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table


class Recurrent(Own):
    """One whose state may hold the rows or not, which nobody can tell."""

    def forward(self, tokens: Any, inputs_embeds: Any = None, attention_mask: Any = None, mems: Any = None) -> Tensor:
        return super().forward(tokens, inputs_embeds)


def test_a_state_of_another_kind_is_refused():
    with pytest.raises(TargetError, match="it keeps its state in mems"):
        peftkit.inject(Recurrent(), PromptTuningConfig(targets=lambda name, module: isinstance(module, Recurrent)))


def test_a_grafted_body_takes_what_it_took():
    model = bert()
    before = inspect.signature(model.forward)
    peftkit.inject(model, PromptTuningConfig(length=N))
    assert inspect.signature(model.forward) == before
    with peftkit.disabled(model):
        assert torch.equal(model(IDS).last_hidden_state, bert()(IDS).last_hidden_state)


def test_a_model_of_ones_own():
    model = prompted(Own)
    embeds = torch.cat([rows(model).expand(2, -1, -1), model.table(IDS)], 1)
    assert torch.equal(model(IDS), model.mix(embeds)[0][:, N:])
