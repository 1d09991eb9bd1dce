"""The benchmark of all methods runs, in a size of no meaning, and leaves no method out."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers.models.bert import BertConfig, BertModel

pytest.importorskip("rich")

from benchmarks.demo.data import Review
from benchmarks.demo.tasks import MiniLM, ReviewClassifier
from benchmarks.methods import one, steps
from benchmarks.methods.__main__ import keep
from benchmarks.methods.recipes import METHODS, RECIPES
from benchmarks.methods.summary import TITLES, plot, summarised
from peftkit.method import registered

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 31}
RUNS = [
    {"method": "none", "seed": 0, "trained": 0, "accuracy": 0.75, "peak_bytes": 10**9},
    *({"method": "lora", "seed": s, "trained": 1234, "accuracy": 0.8 + s / 100, "peak_bytes": 10**9} for s in range(3)),
]


class Tiny(MiniLM):
    """The encoder's task on a BERT of two small blocks."""

    def __init__(self) -> None:
        pass

    def load(self) -> ReviewClassifier:
        torch.manual_seed(0)
        return ReviewClassifier(BertModel(BertConfig(**SIZES), add_pooling_layer=False)).eval()

    def encode(self, reviews):
        return [[2 + len(r.text) % 7, 3 + r.label] for r in reviews]


@pytest.fixture
def small(monkeypatch, tmp_path):
    reviews = [Review("x" * n, n % 2) for n in range(200)]
    for module in (one, steps):
        monkeypatch.setattr(module, "read_reviews", lambda path: reviews)
        monkeypatch.setitem(module.TASKS, "minilm", Tiny)
    monkeypatch.setitem(RECIPES, "minilm", type(RECIPES["minilm"])(40, 20, 0, 2, 4, 1e-3))
    monkeypatch.setattr(one, "CACHE", tmp_path)


def test_every_method_has_a_recipe_and_a_title():
    ours = {name for name, cls in registered().items() if cls.__module__.startswith("peftkit.")}
    assert set(METHODS) == ours == set(TITLES) - {"none"}


@pytest.mark.parametrize("method", ["none", "lora"])
def test_a_run_has_its_row(small, method):
    row = one.run("minilm", method, 0)
    assert 0 <= row["accuracy"] <= 1 and row["peak_bytes"] > 0 and row["seed"] == 0
    assert row["trained"] == (0 if method == "none" else 2 * 8 * (4 * 32 + 2 * 40))  # without the head
    assert json.loads(json.dumps(row)) == row


def test_steps_are_over_the_base(small):
    found = steps.measure("minilm", ["lora", "bitfit"], rounds=1)
    assert found.keys() == {"lora", "bitfit"} and all(math.isfinite(v) and v > 0 for v in found.values())


def test_rows_are_renewed_and_others_stay(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.methods.__main__.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.measure.RESULTS", tmp_path)
    for row in reversed(RUNS):
        keep("minilm", row)
    keep("minilm", {**RUNS[1], "accuracy": 0.5})
    keep("minilm", steps={"lora": 1.25})
    found = json.loads((tmp_path / "methods-minilm.json").read_text())["rows"]
    assert [(r["method"], r["seed"]) for r in found["runs"]] == [("none", 0), ("lora", 0), ("lora", 1), ("lora", 2)]
    assert summarised(found)[1] == ("LoRA", "1,234", "71.0%", "50.0%, 81.0%, 82.0%", "1.25", "1.00 GB")


def test_the_plot_is_the_same_for_the_same_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        plot({"runs": RUNS, "steps": {}}, "title", tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text() and "<svg" in text
