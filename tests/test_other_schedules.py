"""Gradual unfreezing, rates by depth, and the norms that LISA was derived from."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from schedule_models import adam, backward, bits, changed, llama, of_block, train

import peftkit
from peftkit import (
    LISA,
    GradualUnfreezing,
    LoRAConfig,
    MeanWeightNorms,
    NotMergeable,
    SeriesAdapterConfig,
    layerwise_lr,
)


def test_one_group_more_from_the_top_down():
    model = llama(3)
    optimizer = adam(model)
    gradual = GradualUnfreezing(model, optimizer, interval=2)
    expected = [{None}, {None, 2}, {None, 2, 1}, {None, 2, 1, 0}]
    for stage in range(6):
        blocks = expected[min(stage, 3)]
        names = {n for n, _ in model.named_parameters() if of_block(n) in blocks}
        names -= {"model.embed_tokens.weight"} if stage < 4 else set()
        before = bits(model)
        assert gradual.done == (stage >= 4)
        for step in range(2):
            backward(model, step)
            optimizer.step()
            assert {n for n, p in model.named_parameters() if p in optimizer.state} == names
            gradual.step()
            optimizer.zero_grad()
        assert changed(before, model) == names
    assert gradual.state_dict()["steps"] == 12


def test_a_tied_embedding_trains_from_the_start():
    model = llama(2, tie_word_embeddings=True)
    gradual = GradualUnfreezing(model, adam(model))
    assert gradual.trained == ["model.embed_tokens.weight", "model.norm.weight"]
    gradual.step(), gradual.step()
    assert gradual.done


def test_gradual_unfreezing_goes_on_where_it_stopped():
    model = llama(3)
    gradual = GradualUnfreezing(model, adam(model), interval=3)
    for _ in range(4):
        gradual.step()
    other = GradualUnfreezing(fresh := llama(3), adam(fresh), interval=3)
    other.load_state_dict(gradual.state_dict())
    for _ in range(8):
        assert other.trained == gradual.trained
        other.step(), gradual.step()


def test_without_a_head_there_is_nowhere_to_begin():
    model = llama(2)
    model.lm_head.requires_grad_(False)
    model.model.norm.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing above 'model.layers.1' is trainable"):
        GradualUnfreezing(model, adam(model))
    with pytest.raises(ValueError, match="interval is a whole number"):
        GradualUnfreezing(llama(2), adam(model), interval=0)


def rates(model: torch.nn.Module, groups: list[dict]) -> dict[str, float]:
    names = {id(p): n for n, p in model.named_parameters()}
    assert len({id(p) for g in groups for p in g["params"]}) == sum(len(g["params"]) for g in groups)
    return {names[id(p)]: g["lr"] for g in groups for p in g["params"]}


def test_ulmfit_s_rates():
    """η^(l−1) = η^l / 2.6, from the head down."""
    model = llama(3)
    found = rates(model, layerwise_lr(model, 1e-2, decay=1 / 2.6, weight_decay=0.1))
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, rate in found.items():
        depth = {"model.embed_tokens.weight": 0, "model.norm.weight": 4, "lm_head.weight": 4}.get(name)
        depth = of_block(name) + 1 if depth is None else depth  # type: ignore[operator]
        assert rate == pytest.approx(1e-2 / 2.6 ** (4 - depth)), name


def test_adaptive_fine_tuning_of_2405_13181():
    """OPT-125M: 12 blocks, η_l = η · 0.95^(12 − l), and what lies below block 10 is frozen."""
    config = hf.OPTConfig(
        hidden_size=16, num_hidden_layers=12, num_attention_heads=4, ffn_dim=24, vocab_size=30, word_embed_proj_dim=16,
        num_labels=2,
    )  # fmt: skip
    model = hf.OPTForSequenceClassification(config)
    found = rates(model, layerwise_lr(model, 1e-5, decay=0.95, frozen=10))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == found.keys()
    for name, rate in found.items():
        l = int(name.split(".")[3]) if ".layers." in name else 12  # noqa: E741
        assert l >= 10 and rate == pytest.approx(1e-5 * 0.95 ** (12 - l)), name
    assert {int(n.split(".")[3]) for n in found if ".layers." in n} == {10, 11}
    assert {n for n in found if ".layers." not in n} == {
        "score.weight",
        "model.decoder.final_layer_norm.weight",
        "model.decoder.final_layer_norm.bias",
    }


def test_adapters_learn_at_the_rate_of_their_block():
    model = llama(3)
    peftkit.inject(model, LoRAConfig(r=2))
    found = rates(model, layerwise_lr(model, 1.0, decay=0.5))
    assert {id(p) for p in peftkit.parameters(model)} == {id(p) for n, p in model.named_parameters() if n in found}
    for name, rate in found.items():
        assert rate == 0.5 ** (3 - of_block(name))  # type: ignore[operator]
    optimizer = torch.optim.AdamW(layerwise_lr(model, 1e-2))
    before = bits(model)
    train(model, optimizer, range(2))
    assert changed(before, model) == found.keys()


def test_a_tied_embedding_learns_as_the_embedding():
    model = llama(3, tie_word_embeddings=True)
    found = rates(model, layerwise_lr(model, 1.0, decay=0.5))
    assert found["model.embed_tokens.weight"] == 0.5**4 and found["model.norm.weight"] == 1.0


def test_bad_rates():
    model = llama(3)
    for arguments, message in [
        ({"lr": 0.0}, "lr is positive"),
        ({"lr": float("nan")}, "lr is positive"),
        ({"lr": 1.0, "decay": 2.6}, r"decay is in \(0, 1\], not 2.6; ULMFiT's factor of 2.6 is decay=1 / 2.6"),
        ({"lr": 1.0, "decay": 0.0}, "decay is in"),
        ({"lr": 1.0, "frozen": 4}, "frozen=4, and the model has 3 blocks"),
        ({"lr": 1.0, "frozen": -1}, "frozen is a whole number"),
    ]:
        with pytest.raises(ValueError, match=message):
            layerwise_lr(model, **arguments)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter .* is trainable"):
        layerwise_lr(model, 1.0)


def test_mean_norms_are_those_of_what_the_forward_uses():
    """1/T Σ_t ‖θ_t‖ of each block, in fp64, adapters merged for the reference."""
    model = llama(3).double()
    peftkit.inject(model, LoRAConfig(r=2, targets="all-linear"))
    optimizer = torch.optim.AdamW(peftkit.parameters(model), lr=1e-1)
    norms = MeanWeightNorms(model)
    expected = torch.zeros(3, dtype=torch.float64)
    for step in range(4):
        train(model, optimizer, [step])
        norms.update()
        peftkit.merge(model)
        for i, layer in enumerate(model.model.layers):
            own = [p for n, p in layer.named_parameters() if ".peftkit." not in n]
            expected[i] += torch.cat([p.flatten() for p in own]).norm() / 4
        merged = MeanWeightNorms(model)
        merged.update()
        peftkit.unmerge(model)
        again = MeanWeightNorms(model)
        again.update()
        assert again.mean() == pytest.approx(merged.mean(), rel=1e-12)
    assert norms.mean() == pytest.approx(expected.tolist(), rel=1e-12)
    full = MeanWeightNorms(llama(3))
    full.update()
    weights = norms.ratio(full)
    assert weights == pytest.approx([a / b for a, b in zip(norms.mean(), full.mean(), strict=True)])
    fresh = llama(3)
    assert LISA(fresh, adam(fresh), weights=weights).state_dict()["settings"]["weights"] == weights


def test_norms_that_cannot_be_measured():
    model = llama(2)
    with pytest.raises(ValueError, match=r"no weights were counted; call update\(\)"):
        MeanWeightNorms(model).mean()
    with pytest.raises(ValueError, match="2 blocks cannot be compared with 3"):
        MeanWeightNorms(model).ratio(MeanWeightNorms(llama(3)))
    peftkit.inject(model, SeriesAdapterConfig(bottleneck=2))
    with pytest.raises(NotMergeable, match="has no weight to measure"):
        MeanWeightNorms(model).update()
