"""The benchmark of who trains when runs, in a size of no meaning, and leaves no figure out."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from torch import nn
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

pytest.importorskip("rich")

from benchmarks.demo.data import Review
from benchmarks.page import PAGE, PLOTS
from benchmarks.schedules import gauges, memory, one
from benchmarks.schedules.__main__ import NAME, keep, read
from benchmarks.schedules.asked import asked, norm_ratio
from benchmarks.schedules.recipes import RECIPES
from benchmarks.schedules.summary import HEAD, PARTS, STYLES, apart, parts, plot, summarised
from benchmarks.schedules.texts import Texts, held_out_loss, mean_loss

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 31}
BLOCK, OUTSIDE = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16, 31 * 16 + 16
HALF = 4 * 2 * 16 * 16 + 6 * 16 * 24  # half of the blocks' matrices; of the 9 norms 4 or 5
TRAINED = {"full": 4 * BLOCK + OUTSIDE} | {f"lisa-{n}": n * BLOCK + OUTSIDE for n in (1, 2, 4)}


class Tiny(Texts):
    """The texts on a Llama of four small blocks."""

    def __init__(self, cache) -> None:
        pass

    def load(self) -> nn.Module:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()

    def encode(self, reviews):
        return [[3 + (len(r.text) * k) % 23 for k in range(2 + len(r.text) % 5)] for r in reviews]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(one, "read_reviews", lambda path: [Review("x" * n, n % 2) for n in range(200)])
    monkeypatch.setattr(one, "Texts", Tiny)
    monkeypatch.setattr(memory, "real", lambda: Tiny(None).load())
    monkeypatch.setattr(memory, "tokens", lambda step: Tiny(None).collate([[3, 4 + step % 5, 9]], [0]))


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.schedules.__main__.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.measure.RESULTS", tmp_path)
    return tmp_path / f"{NAME}.json"


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_has_its_row(small, name):
    row = one.run(name, steps=2, every=1)
    assert row["recipe"] == name and json.loads(json.dumps(row)) == row
    assert all(math.isfinite(v) for v in row["losses"].values())
    if name == "none":
        assert row == {"recipe": "none", "trained": 0, "losses": row["losses"]} and list(row["losses"]) == ["0"]
        return
    assert list(row["losses"]) == ["0", "1", "2"] and len(set(row["losses"].values())) == 3
    assert row["losses"]["0"] == one.run("none", 2, 1)["losses"]["0"]
    assert row["gradient_bytes"] == 4 * row["trained"]
    assert 8 * row["trained"] < row["state_bytes"] < 8 * row["trained"] + 1000  # and a step count each
    assert row["peak_bytes"] > 0 and row["seconds"] > 0
    assert ("norms" in row) == (name in one.MEASURED_NORMS)
    if name in TRAINED:
        assert row["trained"] == TRAINED[name]
    if name == "half":
        assert HALF < row["trained"] - OUTSIDE < HALF + 5 * 16


def test_every_recipe_has_a_style():
    assert set(STYLES) == set(RECIPES) - {"none"}


def test_padding_is_not_predicted():
    task = Tiny(None)
    model = task.load()
    short, padded = task.collate([[3, 4, 5]], [0]), task.collate([[3, 4, 5], [3, 4, 5, 6, 7]], [0, 0])
    alone = mean_loss(model, short).item()
    both = mean_loss(model, padded).item()
    other = mean_loss(model, task.collate([[3, 4, 5, 6, 7]], [0])).item()
    assert both == pytest.approx((2 * alone + 4 * other) / 6)
    assert held_out_loss(model, [short, padded]) == pytest.approx((2 * alone + 6 * both) / 8)


def test_bytes_are_counted_over_tensors():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    assert (gauges.weight_bytes(layer), gauges.gradient_bytes(layer), gauges.state_bytes(optimizer)) == (32, 0, 0)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert (gauges.gradient_bytes(layer), gauges.state_bytes(optimizer)) == (32, 2 * 32 + 2 * 4)
    gauges.forget_peak()
    assert gauges.peak() > 0


@pytest.mark.parametrize("arm", ["full", "lisa-2"])
def test_memory_is_measured(small, arm):
    trained = TRAINED[arm]
    found = memory.peaks(arm, memory.real, steps=3)
    assert found["trained"] == trained and found["blocks"] == 4 and found["block_parameters"] == BLOCK
    found = memory.switches(arm, memory.real, steps=3)
    assert len(found["peak"]) == len(found["resident"]) == 3 and found["peak"] == sorted(found["peak"])
    assert memory.state(arm, memory.real, steps=6)["gradient_bytes"] == 4 * trained


def test_the_small_llama_is_the_one_that_was_promised():
    found = memory.state("lisa-2", steps=1)
    assert found["trained"] == 2 * 803_328 + 2 * 2000 * 256 + 256


def test_what_was_asked_is_judged(results):
    base = {"allocator": "plain", "blocks": 30, "block_parameters": 10**6}
    keep("memory", {**base, "measure": "peaks", "arm": "full", "peak_bytes": 10**9}, ("arm",))
    assert read()["asked"] == []
    lisa = {**base, "measure": "peaks", "arm": "lisa-2"}
    for saved, met in ((336, True), (370, False), (300, False)):
        keep("memory", {**lisa, "peak_bytes": 10**9 - saved * 10**6}, ("measure", "arm"))
        (row,) = read()["asked"]
        assert row["met"] is met and row["measured"] == pytest.approx(saved / 336)
    flat = {"peak": [10**9] * 50, "resident": [10**8 + 10**6 * n for n in range(50)]}
    found = {"runs": [], "memory": [{"measure": "switches", "arm": "lisa-2", "allocator": "plain", **flat}]}
    assert [(r["measured"], r["met"]) for r in asked(found)] == [(0, True), (45, False), (45, None)]
    found["memory"] = [{"measure": "state", "arm": "lisa-2", "allocator": "plain", "state_bytes": 20.14 * 2**20}]
    assert [r["met"] for r in asked(found)] == [True]


def test_rows_are_renewed_and_others_stay(results):
    for recipe in ("lora", "full", "none"):
        row = {"recipe": recipe, "trained": 12, "losses": {"0": 4.0, "10": 3.5}, "peak_bytes": 10**9}
        keep("runs", row | ({"norms": [2.0, 3.0]} if recipe != "none" else {}), ("recipe",))
    row = {"recipe": "lora", "trained": 1234, "losses": {"0": 4.0, "10": 3.25}, "norms": [3.0, 3.0]}
    keep("runs", row, ("recipe",))
    found = read()
    assert [r["recipe"] for r in found["runs"]] == ["none", "full", "lora"]
    assert found["norm_ratio"] == norm_ratio(found["runs"]) == [1.5, 1.0]
    assert [r["measured"] for r in found["asked"]] == [1.0, 1.5]
    assert summarised(found)[1:] == [
        ("full fine-tuning", "12", "3.500", "", "", "1.00 GB"),
        ("LoRA", "1,234", "3.250", "", "", ""),
    ]
    assert len(HEAD) == 6
    sizes = {f"{kind}_bytes": 2 * 10**9 for kind in ("weight", "gradient", "state", "peak")} | {
        "resident_before": 10**6
    }
    keep("memory", {"measure": "peaks", "arm": "lora", "allocator": "plain", **sizes}, ("arm",))
    assert parts(read()) == [("LoRA", "glibc as it comes", "2,000", "2,000", "2,000", "1", "2,000")]
    assert len(PARTS) == 7


def test_labels_are_moved_apart():
    assert apart([1.0, 3.0, 2.0], 0.5) == [1.0, 3.0, 2.0]
    moved = apart([2.0, 1.0, 2.1, 2.0], 0.5)
    assert moved[1] == 1.0 and sorted([moved[0], moved[3], moved[2]]) == [moved[0], moved[3], moved[2]]
    assert moved[3] - moved[0] == pytest.approx(0.5) == moved[2] - moved[3]


def test_the_plot_is_the_one_that_is_kept(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    kept = PAGE.parent / "figures" / f"{NAME}.svg"
    for name in ("a.svg", "b.svg"):
        plot(read(), PLOTS[NAME][0], tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text() and "<svg" in text
    if re.search(rf"Matplotlib v{re.escape(matplotlib.__version__)}\b", kept.read_text()):
        assert text == kept.read_text(), "run `python -m benchmarks.page`"


def test_no_figure_is_left_out():
    found = read()
    assert [r["recipe"] for r in found["runs"]] == list(RECIPES)
    every = {(m, arm, a) for m, of in memory.MEASURES.items() for arm in of.arms for a in memory.ALLOCATORS}
    assert {(r["measure"], r["arm"], r["allocator"]) for r in found["memory"]} == every
    assert found["asked"] == asked(found) and found["norm_ratio"] == norm_ratio(found["runs"])
