"""Context distillation: the loss written out, aligned by response tokens, its teacher kept whole or in part."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_models import bits, changed, llama
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig, PrefixTuningConfig, TeacherLogits, context_distillation, teacher_logits


@pytest.fixture
def model() -> nn.Module:
    made = llama(2).double()
    torch.manual_seed(1)
    peftkit.inject(made, LoRAConfig(r=2, targets="all-linear"))
    with torch.no_grad():
        for p in peftkit.parameters(made):
            p.normal_(std=0.3)
    return made


def inputs(rows: list[tuple[list[int], list[int]]], side: str = "right") -> dict[str, Tensor]:
    """Token ids, masks and labels of (what comes before, response), padded on a side."""
    longest = max(len(a) + len(b) for a, b in rows)
    ids, mask, labels = [], [], []
    for before, response in rows:
        fill = longest - len(before) - len(response)
        row = [before + response, [1] * (longest - fill), [-100] * len(before) + response]
        for out, values, pad in zip((ids, mask, labels), row, (0, 0, -100), strict=True):
            out.append([pad] * fill + values if side == "left" else values + [pad] * fill)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


ASKED = [([3, 4], [5, 6, 7]), ([8], [9, 10]), ([11, 12, 13], [14])]
CONTEXTS = [[20, 21, 22], [23], [24, 25]]
WITH = [(context + before, response) for context, (before, response) in zip(CONTEXTS, ASKED, strict=True)]


def written_out(model: nn.Module, temperature: float = 1.0) -> Tensor:
    """Row by row, without padding, each response token by itself."""
    terms = []
    for (long, response), (short, _) in zip(WITH, ASKED, strict=True):
        with peftkit.disabled(model), torch.no_grad():
            t = model(torch.tensor([long + response])).logits[0, len(long) - 1 : -1] / temperature
        s = model(torch.tensor([short + response])).logits[0, len(short) - 1 : -1] / temperature
        p = t.softmax(-1)
        terms += list((p * (p.log() - s.softmax(-1).log())).sum(-1))
    return temperature**2 * torch.stack(terms).mean()


@pytest.mark.parametrize("sides", [("right", "right"), ("left", "right"), ("right", "left"), ("left", "left")])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_the_definition(model, sides, temperature):
    """Whatever the lengths of contexts and the side of the padding; gradients too."""
    expected = written_out(model, temperature)
    wanted = torch.autograd.grad(expected, peftkit.parameters(model))
    loss = context_distillation(model, inputs(ASKED, sides[0]), inputs(WITH, sides[1]), temperature=temperature)
    found = torch.autograd.grad(loss, peftkit.parameters(model))
    assert torch.allclose(loss, expected, rtol=1e-9)
    for a, b in zip(found, wanted, strict=True):  # rotary angles are in fp32 in any model, and padding shifts positions
        assert torch.allclose(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))


def test_cross_entropy_is_added(model):
    one, both = inputs(ASKED), inputs(WITH)
    plain = context_distillation(model, one, both)
    found = context_distillation(model, one, both, ce_weight=0.25)
    assert torch.allclose(found, plain + 0.25 * model(**one).loss)


def test_an_identical_input_and_an_adapter_at_its_start_give_zero():
    model = llama(2)
    peftkit.inject(model, LoRAConfig(r=2))
    loss = context_distillation(model, inputs(ASKED), inputs(ASKED))
    assert abs(float(loss.detach())) < 1e-6
    assert float(context_distillation(model, inputs(ASKED), inputs(WITH))) > 1e-5


def test_training_brings_the_student_to_the_teacher():
    """The adapter comes to hold the context, the base keeps its bits, and the teacher what it says."""
    model = llama(2)
    peftkit.inject(model, LoRAConfig(r=4, targets="all-linear"))
    before = bits(model)
    kept = teacher_logits(model, inputs(WITH))
    optimizer = torch.optim.AdamW(peftkit.parameters(model), lr=2e-2)
    losses = []
    for _ in range(60):
        loss = context_distillation(model, inputs(ASKED), inputs(WITH))
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.05 * losses[0]
    assert all(".peftkit." in name for name in changed(before, model))
    assert torch.equal(kept.log_probs, teacher_logits(model, inputs(WITH)).log_probs)


def test_the_teacher_has_no_dropout_and_the_student_keeps_its_mode():
    model = llama(2, attention_dropout=0.5).train()
    peftkit.inject(model, LoRAConfig(r=2, dropout=0.5))
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    first, again = teacher_logits(model, inputs(WITH)), teacher_logits(model, inputs(WITH))
    assert torch.equal(first.log_probs, again.log_probs) and not first.log_probs.requires_grad
    assert [m.training for m in model.modules()] == modes
    losses = {float(context_distillation(model, inputs(ASKED), first)) for _ in range(3)}
    assert len(losses) == 3
    with pytest.raises(RuntimeError):
        teacher_logits(model, inputs(WITH) | {"attention_mask": torch.ones(1, 2, 3, 4)})
    assert [m.training for m in model.modules()] == modes and peftkit.active(model) == ("default",)


# -- a teacher that was kept ---------------------------------------------------------------------------------------------


def test_a_kept_teacher_gives_the_same_loss(model, tmp_path):
    exact = context_distillation(model, inputs(ASKED), inputs(WITH), temperature=2.0)
    kept = [teacher_logits(model, inputs([row]), temperature=2.0) for row in WITH]
    torch.save([vars(k) for k in kept], tmp_path / "kept.pt")
    parts = [TeacherLogits(**k) for k in torch.load(tmp_path / "kept.pt")]
    joined = TeacherLogits.joined(parts)
    assert torch.allclose(context_distillation(model, inputs(ASKED), joined, temperature=2.0), exact, rtol=1e-9)
    swapped = TeacherLogits.joined([parts[2], parts[0]])
    found = context_distillation(model, inputs([ASKED[2], ASKED[0]]), swapped, temperature=2.0)
    expected = context_distillation(model, inputs([ASKED[2], ASKED[0]]), inputs([WITH[2], WITH[0]]), temperature=2.0)
    assert torch.allclose(found, expected, rtol=1e-9)


def test_of_the_likeliest_tokens_more_come_closer_and_all_are_exact(model):
    one, both = inputs(ASKED), inputs(WITH)
    exact = float(context_distillation(model, one, both, temperature=1.5))
    found = []
    for k in (1, 3, 10, 39, 40, 1000):
        kept = teacher_logits(model, both, temperature=1.5, top_k=k)
        assert kept.log_probs.shape == (6, min(k, 40))
        if k < 40:
            assert kept.rest is not None
            mass = kept.log_probs.exp().sum(-1) + kept.rest.exp()
            assert torch.allclose(mass, torch.ones(6, dtype=torch.float64))
        found.append(float(context_distillation(model, one, kept, temperature=1.5)))
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found))
    assert found[0] < 0.9 * exact and found[-3:] == pytest.approx([exact] * 3, rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**30), k=st.integers(1, 8), scale=st.floats(0.01, 50))
def test_the_divergence_in_part_is_never_above_the_exact_one(seed, k, scale):
    from peftkit.distillation import _kl, _rest

    g = torch.Generator().manual_seed(seed)
    t = (torch.randn(3, 9, generator=g, dtype=torch.float64) * scale).log_softmax(-1)
    s = (torch.randn(3, 9, generator=g, dtype=torch.float64) * scale).log_softmax(-1).requires_grad_()
    tokens = torch.zeros(3, dtype=torch.int64)
    exact = _kl(TeacherLogits(tokens, (3,), t, None, None, 1.0), s)
    assert torch.allclose(exact, nn.functional.kl_div(s, t, reduction="batchmean", log_target=True))
    values, indices = t.topk(k, -1)
    part = _kl(TeacherLogits(tokens, (3,), values, _rest(t, indices), indices, 1.0), s)
    assert -1e-12 <= float(part) <= float(exact) + 1e-9
    assert torch.isfinite(torch.autograd.grad(part, s)[0]).all()


def test_what_the_teacher_rules_out_adds_nothing():
    from peftkit.distillation import _kl

    t = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    s = torch.tensor([[0.3, -math.inf]], dtype=torch.float64, requires_grad=True)
    loss = _kl(TeacherLogits(torch.zeros(1), (1,), t, None, None, 1.0), s.log_softmax(-1))
    loss.backward()
    assert float(loss.detach()) == 0 and s.grad is not None and torch.isfinite(s.grad).all()


@pytest.mark.parametrize("top_k", [3, 5, 8, None])
def test_a_masked_vocabulary_has_gradients(top_k):
    from peftkit.distillation import _kl, _rest

    def masked(seed: int) -> Tensor:
        x = torch.randn(4, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return x.masked_fill(torch.arange(10) >= 5, -math.inf)

    t, s = masked(0).log_softmax(-1), masked(1).requires_grad_()
    values, indices = t.topk(top_k or 10, -1)
    kept = TeacherLogits(torch.zeros(4), (4,), values, _rest(t, indices), indices, 1.0)
    loss = _kl(kept if top_k else TeacherLogits(torch.zeros(4), (4,), t, None, None, 1.0), s.log_softmax(-1))
    loss.backward()
    assert s.grad is not None and torch.isfinite(s.grad).all() and float(s.grad.abs().sum()) > 0
    if top_k != 3:
        exact = (t.exp() * (t - s.log_softmax(-1)))[:, :5].sum(-1).mean()
        assert torch.allclose(loss, exact)


def test_logits_of_some_tokens_only_are_refused_and_other_outputs_taken(model):
    class Wrapped(nn.Module):
        def __init__(self, cut: int):
            super().__init__()
            self.model, self.cut = model, cut

        def forward(self, **inputs: Tensor) -> tuple[Tensor]:
            return (self.model(**inputs).logits[:, self.cut :],)

    loss = context_distillation(Wrapped(0), inputs(ASKED), inputs(WITH))
    assert torch.allclose(loss, written_out(model), rtol=1e-6)
    with pytest.raises(ValueError, match=r"logits of \(3, 7\) tokens for labels of \(3, 8\)"):
        context_distillation(Wrapped(1), inputs(ASKED), inputs(WITH))
    short = {k: v.int() for k, v in inputs(ASKED).items()}
    assert torch.isfinite(context_distillation(model, short, inputs(WITH), ce_weight=0.5))


# -- other models -------------------------------------------------------------------------------------------------------


def test_an_encoder_decoder_has_the_context_in_its_encoder():
    torch.manual_seed(0)
    config = hf.T5Config(
        d_model=16,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        d_kv=4,
        vocab_size=40,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = hf.T5ForConditionalGeneration(config).double()
    peftkit.inject(model, LoRAConfig(r=2))
    with torch.no_grad():
        for p in peftkit.parameters(model):
            p.normal_(std=0.3)
    labels = torch.tensor([[5, 6, 7], [9, 10, -100]])
    short = {"input_ids": torch.tensor([[3, 4], [8, 2]]), "labels": labels}
    long = {"input_ids": torch.tensor([[20, 21, 3, 4], [20, 21, 8, 2]]), "labels": labels}
    with peftkit.disabled(model), torch.no_grad():
        t = model(**long).logits[labels != -100].log_softmax(-1)
    s = model(**short).logits[labels != -100].log_softmax(-1)
    expected = nn.functional.kl_div(s, t, reduction="batchmean", log_target=True)
    assert torch.allclose(context_distillation(model, short, long), expected)


def test_a_prefix_is_off_in_the_teacher():
    model = llama(2)
    plain = model(**{k: v for k, v in inputs(WITH).items() if k != "labels"}).logits
    peftkit.inject(model, PrefixTuningConfig(length=3))
    kept = teacher_logits(model, inputs(WITH))
    rows, columns = (inputs(WITH)["labels"] != -100).nonzero(as_tuple=True)
    assert torch.equal(kept.log_probs, plain[rows, columns - 1].float().log_softmax(-1))


# -- what is refused ----------------------------------------------------------------------------------------------------


def test_bad_input(model):
    one, both = inputs(ASKED), inputs(WITH)
    other = inputs([([3], [5, 6, 8]), *ASKED[1:]])
    shorter = inputs([([3], [5, 6]), *ASKED[1:]])
    starts = inputs([([], [5, 6, 7]), *ASKED[1:]])
    kept = teacher_logits(model, both, temperature=2.0)
    for arguments, message in [
        ((one, shorter), "row 0: the student's response has 3 tokens and the teacher's 2"),
        ((one, other), "first in token 7 of the student's and 8 of the teacher's"),
        ((one, inputs(WITH[:2])), "3 rows and the teacher 2"),
        ((starts, both), "row 0 begins with a response token"),
        (({k: v for k, v in one.items() if k != "labels"}, both), "hold no labels"),
        ((one | {"labels": one["labels"] * 0 - 100}, both), "all labels are -100"),
        ((one, kept), "kept at temperature 2.0, not 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            context_distillation(model, *arguments)
    for settings_, message in [
        ({"temperature": 0.0}, "temperature is positive"),
        ({"ce_weight": -1.0}, "ce_weight is not negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            context_distillation(model, one, both, **settings_)
    for top_k in (0, True, 1.5):
        with pytest.raises(ValueError, match="top_k is a whole number of at least 1"):
            teacher_logits(model, both, top_k=top_k)
    with pytest.raises(ValueError, match="one temperature"):
        TeacherLogits.joined([kept, teacher_logits(model, both)])
    with pytest.raises(ValueError, match="at least one"):
        TeacherLogits.joined([])
    peftkit.merge(model)
    with pytest.raises(ValueError, match="is merged and cannot stop to act"):
        context_distillation(model, one, both)
    peftkit.unmerge(model)
    peftkit.activate(model)
    with pytest.raises(ValueError, match="no adapter acts"):
        context_distillation(model, one, both)
    with pytest.raises(ValueError, match="no adapter acts"):
        context_distillation(llama(2), one, both)
