"""peft is the oracle for the file of a prompt, both ways; what it computes has the rows' positions in front."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from storage_helpers import (
    adapter_bits,
    config_of,
    llama,
    moved,
    peft_model,
    refused,
    rewrite,
    same,
    set_config,
    tensors_of,
)
from storage_models import IDS, bert, gpt2, t5
from torch import Tensor, nn

import peftkit
from peftkit import PromptTuningConfig

peft = pytest.importorskip("peft")
N = 3
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


@dataclass(frozen=True)
class Case:
    """A model, what peft calls its task, what both train beside the prompt."""

    name: str
    make: Callable[[], nn.Module]
    task: str
    heads: tuple[str, ...] = ()
    inputs: dict[str, Tensor] = field(default_factory=dict)


CASES = [
    Case("llama", llama, "CAUSAL_LM"),
    Case("gpt2", gpt2, "CAUSAL_LM"),
    Case("t5", t5, "SEQ_2_SEQ_LM", (), {"decoder_input_ids": IDS[:, :4]}),
    Case("bert", lambda: bert().bert, "FEATURE_EXTRACTION"),
    Case("bert-classifier", bert, "SEQ_CLS", ("classifier",), {"token_type_ids": (IDS > 5).long()}),
]
each = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def result(case: Case, model: nn.Module, *, longer: bool = False) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=MASK, **case.inputs)
    value = out.logits if "logits" in out else out.last_hidden_state
    return value[:, N:] if longer and case.task in ("CAUSAL_LM", "FEATURE_EXTRACTION") else value


def ours(case: Case) -> nn.Module:
    model = case.make()
    peftkit.inject(model, PromptTuningConfig(length=N, also_train=case.heads))
    return moved(model, peftkit.parameters(model))


@each
def test_peft_reads_what_save_writes(case, tmp_path):
    model = ours(case)
    peftkit.save(model, tmp_path)
    theirs = peft_model(case.make(), tmp_path)
    assert config_of(tmp_path)["task_type"] == case.task
    assert torch.equal(result(case, theirs, longer=True), result(case, model))
    assert not torch.allclose(result(case, model), result(case, case.make()), rtol=1e-2)


@each
def test_load_reads_what_peft_wrote(case, tmp_path):
    theirs = made_by_peft(case, tmp_path / "a")
    model = case.make()
    peftkit.load(model, tmp_path / "a")
    assert torch.equal(result(case, model), result(case, theirs, longer=True))
    assert not torch.allclose(result(case, model), result(case, case.make()), rtol=1e-2)
    peftkit.save(model, tmp_path / "again")
    stored, again = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "again")
    stored["prompt_embeddings"] = stored["prompt_embeddings"][:N]  # of an encoder-decoder it never reads the others
    assert same(stored, again)
    assert set(config_of(tmp_path / "again")) <= set(config_of(tmp_path / "a"))


def made_by_peft(case: Case, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PromptTuningConfig(task_type=case.task, num_virtual_tokens=N)
        model = peft.get_peft_model(case.make(), config).eval()
        moved(model, [p for n, p in model.named_parameters() if p.requires_grad or "prompt_encoder" in n])
        model.save_pretrained(folder)
    return model


def test_without_the_head_peft_is_told_of_features(tmp_path):
    """For a task with a head it would not load a file that has none."""
    case = Case("bert", bert, "SEQ_CLS")
    model = ours(case)
    peftkit.save(model, tmp_path)
    assert config_of(tmp_path)["task_type"] == "FEATURE_EXTRACTION"
    assert torch.equal(result(case, peft_model(bert(), tmp_path)), result(case, model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_encoder_decoder_comes_back_bit_for_bit(dtype, tmp_path):
    case = CASES[2]
    model = ours(case).to(dtype)
    peftkit.save(model, tmp_path)
    other = t5().to(dtype)
    report = peftkit.load(other, tmp_path)
    assert report.sites == ["encoder", "decoder"]
    assert same(adapter_bits(other), adapter_bits(model)) and torch.equal(result(case, other), result(case, model))


def test_files_that_do_not_fit(tmp_path):
    model = ours(CASES[0])
    peftkit.save(model, tmp_path / "a")
    refused(tmp_path / "a", "another base", model=llama(seed=3))
    refused(tmp_path / "a", "prompt_embeddings", "expected floats of (3, 24)", model=llama(hidden=24), check_base=False)
    refused(tmp_path / "a", "the model has no module 'model'", model=gpt2())
    found = tensors_of(tmp_path / "a")
    rewrite(tmp_path / "a", found)
    for wrong, words in (
        ({"prompt_embeddings": found["prompt_embeddings"][:2].clone()}, "of shape (2, 16), expected"),
        ({"prompt_embeddings": found["prompt_embeddings"].repeat(2, 1)}, "of shape (6, 16), expected"),
        ({"prompt_embeddings": found["prompt_embeddings"].int()}, "expected floats"),
        ({"prompt": found["prompt_embeddings"]}, "unexpected prompt"),
        ({**found, "base_model.model.more": torch.ones(2)}, "unexpected"),
    ):
        rewrite(tmp_path / "a", wrong)
        refused(tmp_path / "a", words, model=llama())
    rewrite(tmp_path / "a", found)
    set_config(tmp_path / "a", num_virtual_tokens=4)
    refused(tmp_path / "a", "expected floats of (4, 16)", model=llama())
