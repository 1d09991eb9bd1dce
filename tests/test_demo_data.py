"""The demo's data and its rival: a wrong split or an unconverged probe would flatter the result."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks.demo.data import (
    BAD,
    GOOD,
    SDIST,
    Review,
    length_bucketed,
    length_sorted,
    parse_ratings,
    read_reviews,
    split,
)
from benchmarks.demo.probe import fit_probe, logistic_regression

REVIEWS = [Review(f"review {i}", (BAD, GOOD)[i % 2]) for i in range(200)]


def test_only_clear_ratings_count_and_each_text_once():
    table = "1\t2.25\tA joy.\r\n2\t-0.5\tDull.\r\n3\t0.49\tWell.\r\n4\t-3\tDull.\r\n"
    assert parse_ratings(table, margin=0.5) == [Review("A joy.", GOOD), Review("Dull.", BAD)]


def test_parts_are_balanced_disjoint_and_repeatable():
    train, held_out = split(REVIEWS, 100, 40)
    assert (len(train), len(held_out)) == (100, 40)
    assert len({review.text for review in train + held_out}) == 140
    assert sum(review.label for review in train) == 50
    assert sum(review.label for review in held_out) == 20
    assert split(REVIEWS, 100, 40) == (train, held_out)
    assert split(REVIEWS, 100, 40, seed=1) != (train, held_out)


def test_a_prefix_of_a_part_is_mixed():
    (train,) = split(REVIEWS, 100)
    assert 0 < sum(review.label for review in train[:20]) < 20


def test_skipping_gives_texts_that_the_usual_draw_does_not_have():
    usual = split(REVIEWS, 40, 20)
    other = split(REVIEWS, 40, 20, skip=60)
    assert not {r.text for part in usual for r in part} & {r.text for part in other for r in part}


@pytest.mark.parametrize(("sizes", "message"), [((150, 60), "210 balanced reviews"), ((3,), r"even sizes.*3")])
def test_a_split_that_cannot_be_is_refused(sizes: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        split(REVIEWS, *sizes)


def test_every_text_is_in_one_batch_and_hardly_any_padding():
    rng = random.Random(0)
    lengths = [rng.randrange(3, 60) for _ in range(500)]
    for batches in (length_sorted(lengths, 32), length_bucketed(lengths, 32, rng)):
        assert sorted(i for batch in batches for i in batch) == list(range(500))
        padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        assert padded < 1.15 * sum(lengths)


def test_epochs_differ():
    rng = random.Random(0)
    lengths = [20] * 100
    assert length_bucketed(lengths, 10, rng) != length_bucketed(lengths, 10, rng)


def test_a_missing_or_damaged_download_says_what_to_do(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"make .*fetches it"):
        read_reviews(tmp_path / SDIST)
    (tmp_path / SDIST).write_bytes(b"half a file")
    with pytest.raises(ValueError, match="delete it and run"):
        read_reviews(tmp_path / SDIST)


def test_the_real_reviews():
    sdist = Path(__file__).parents[1] / ".cache" / SDIST
    if not sdist.exists():
        pytest.skip(f"{sdist.name} is not downloaded; `make test` does it")
    reviews = read_reviews(sdist)
    assert len(reviews) == len({review.text for review in reviews}) == 10_070
    assert sum(review.label == GOOD for review in reviews) == 4_995
    texts = {review.text: review.label for review in reviews}
    assert texts["Effective but too tepid biopic"] == BAD
    assert all(text == text.strip() for text in texts)


def test_the_probe_is_the_minimum():
    generator = torch.Generator().manual_seed(0)
    x = F.pad(torch.randn(300, 8, generator=generator, dtype=torch.float64), (0, 1), value=1.0)
    y = (x[:, 0] + torch.randn(300, generator=generator) > 0.3).double()

    def loss(w: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(x @ w, y) + 0.01 / 2 * w[:-1].square().sum()

    w = logistic_regression(x, y, ridge=0.01).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(w), w)
    assert gradient.abs().max() < 1e-9
    for _ in range(20):
        assert loss(w + 0.01 * torch.randn(9, generator=generator)) > loss(w)


def test_the_probe_reads_raw_features():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    features = 5 + 3 * torch.randn(400, 6, generator=generator)
    features[:, 2] += 9 * labels
    probe = fit_probe(features, labels)
    assert (probe(features).argmax(-1) == labels).double().mean() > 0.9
    assert probe.weight.dtype == features.dtype


@pytest.mark.slow
def test_the_demo_in_small(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    demo = pytest.importorskip("benchmarks.demo.__main__")
    recipe = replace(demo.MiniLM.recipe, train=32, held_out=32, checked=16, steps=2, batch=4)
    monkeypatch.setattr(demo.MiniLM, "recipe", recipe)
    monkeypatch.setattr(sys, "argv", ["demo", "--model", "minilm"])
    monkeypatch.chdir(Path(__file__).parents[1])
    assert demo.main() == 0
    shown = capsys.readouterr().out
    for line in ("held-out accuracy", "parameters trained", "peak memory", "bit-equal on 16 texts", "off fp64"):
        assert line in shown
