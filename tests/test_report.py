"""What the report says is what is there."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

import peftkit
from peftkit import LoRAConfig
from peftkit.testing.models import llama


def test_counts_are_of_the_model():
    model = llama()
    base = sum(p.numel() for p in model.parameters())
    report = peftkit.inject(model, LoRAConfig(r=2, also_train=["lm_head"]))
    own = [p for n, p in model.named_parameters() if ".peftkit." in n]
    assert report.parameters == sum(p.numel() for p in own) == report.trained
    assert report.bytes == sum(p.numel() * p.element_size() for p in own)
    assert report.total == base
    assert len(report.sites) == 15


def test_reference_counts_of_the_papers():
    """LLaMA-7B on the meta device: q and v at r 8; q, k, v, up and down at r 32 (METHODS of LoRA and DoRA)."""
    with torch.device("meta"):
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000))
    few = peftkit.inject(model, LoRAConfig(r=8, targets=["q_proj", "v_proj"]))
    assert few.parameters == 4_194_304 and few.total == 6_738_415_616
    peftkit.eject(model)
    names = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert peftkit.inject(model, LoRAConfig(r=32, targets=names)).parameters == 56_098_816


def test_states_and_text():
    model = llama()
    peftkit.inject(model, LoRAConfig(r=2), name="a")
    peftkit.inject(model, LoRAConfig(r=3, targets="q_proj"), name="b")
    peftkit.merge(model)
    found = {r.adapter: r.state for r in peftkit.describe(model).rows}
    assert found == {"a": "attached", "b": "merged"}
    text = str(peftkit.describe(model))
    assert "self_attn.q_proj ×2" in text and "r=3" in text and "merged" in text


@pytest.mark.parametrize("width", [60, 100, 160])
def test_it_fits_the_console_it_is_printed_on(width):
    model = llama()
    out = io.StringIO()
    Console(file=out, width=width).print(peftkit.inject(model, LoRAConfig(r=2)))
    assert max(len(line) for line in out.getvalue().splitlines()) <= width


def test_nothing_attached():
    report = peftkit.describe(llama())
    assert report.rows == () and report.parameters == 0 and "0 B" in report.summary()


def test_a_model_that_saves_itself_is_told_what_that_leaves_out():
    model = llama()
    assert peftkit.describe(model).saving == ""
    told = str(peftkit.inject(model, LoRAConfig(r=1)))
    assert "save it by peftkit.save(model, path): from_pretrained reads the base alone" in told
    plain = nn.Sequential(nn.Linear(2, 2))
    assert peftkit.inject(plain, LoRAConfig(r=1, targets="all-linear")).saving == ""
