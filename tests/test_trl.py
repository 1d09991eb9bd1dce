"""TRL's SFT and DPO on a model with adapters: the reference is the model without them, and no second copy."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from trainers import adapted, equal, states
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig

import peftkit
from peftkit import LoRAConfig
from peftkit.integrations.trl import AdapterDPOTrainer, AdapterSFTTrainer, Reference
from peftkit.testing.models import evaluated, ids, llama

WORDS = [f"w{i}" for i in range(28)]
SETTINGS = dict(
    per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True,
    save_steps=2, logging_steps=1, bf16=False, seed=7,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{w: i + 3 for i, w in enumerate(WORDS)}}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def texts(count: int, seed: int) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(0, 28, (5,), generator=g)) for _ in range(count)]


def preferences() -> Dataset:
    return Dataset.from_dict({"prompt": texts(12, 0), "chosen": texts(12, 1), "rejected": texts(12, 2)})


def dpo(model, tokenizer, folder, cls=AdapterDPOTrainer, train=True, **kwargs):
    settings = {k: kwargs.pop(k) for k in list(kwargs) if k != "ref_model"}
    trainer = cls(
        model, args=DPOConfig(output_dir=str(folder), **(SETTINGS | settings)), processing_class=tokenizer,
        train_dataset=preferences(), **kwargs,
    )  # fmt: skip
    if train:
        trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_dpo_begins_at_log_2_and_equals_a_run_with_a_copied_reference(tokenizer, tmp_path):
    model = adapted(LoRAConfig(r=2))
    base = states(model, False)
    ours = dpo(model, tokenizer, tmp_path / "ours")
    assert losses(ours)[0] == pytest.approx(math.log(2), abs=1e-6) and losses(ours)[-1] != losses(ours)[0]
    other = adapted(LoRAConfig(r=2))
    theirs = dpo(other, tokenizer, tmp_path / "theirs", cls=DPOTrainer, ref_model=llama(), save_strategy="no")
    assert losses(theirs) == losses(ours)
    assert equal(states(model, True), states(other, True)) and equal(states(model, False), base)


def test_the_reference_stays_what_the_base_gives(tokenizer, tmp_path):
    trainer = dpo(adapted(LoRAConfig(r=2)), tokenizer, tmp_path)
    copied = dpo(adapted(LoRAConfig(r=2)), tokenizer, tmp_path / "b", DPOTrainer, train=False, ref_model=llama())
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    expected = copied.compute_ref_log_probs(copied.ref_model, batch)
    policy = trainer.compute_ref_log_probs(trainer.model, batch)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], policy[0])


def held() -> int:
    """Bytes of all parameters that are alive."""
    gc.collect()
    return sum(o.nbytes for o in gc.get_objects() if type(o) is nn.Parameter)


def test_no_second_copy_is_held(tokenizer, tmp_path):
    model = adapted(LoRAConfig(r=2))
    before, size = held(), sum(t.nbytes for t in states(model, False).values())
    ours = dpo(model, tokenizer, tmp_path, train=False)
    assert isinstance(ours.ref_model, Reference) and not list(ours.ref_model.parameters())
    assert held() == before
    _theirs = dpo(model, tokenizer, tmp_path, DPOTrainer, train=False, ref_model=llama())
    assert held() >= before + size


def test_a_reference_with_an_earlier_adapter(tokenizer, tmp_path):
    model = adapted(LoRAConfig(r=2), LoRAConfig(r=1), names=("sft", "dpo"))
    with torch.no_grad():
        for p in peftkit.parameters(model, "sft"):
            p.add_(0.2)
    alone = copy.deepcopy(model)
    peftkit.eject(alone, "dpo")
    reference = Reference(model, "sft")
    with torch.no_grad():
        for p in peftkit.parameters(model, "dpo"):
            p.add_(0.2)
    assert torch.equal(evaluated(reference, ids()), evaluated(alone.eval(), ids()))
    with pytest.raises(ValueError, match="'sft' is trained, so the reference would change"):
        dpo(model, tokenizer, tmp_path / "2", ref_model=reference)
    for p in (*peftkit.parameters(model, "sft"), *peftkit.parameters(policy := copy.deepcopy(model), "sft")):
        p.requires_grad_(False)
    trainer = dpo(policy, tokenizer, tmp_path, cls=DPOTrainer, ref_model=alone, save_strategy="no")
    found = dpo(model, tokenizer, tmp_path / "2", ref_model=Reference(model, "sft"), save_strategy="no")
    assert losses(found) == losses(trainer) and losses(found)[0] != pytest.approx(math.log(2), abs=1e-4)


def test_an_adapter_that_was_trained_before_names_its_reference(tokenizer, tmp_path):
    model = adapted(LoRAConfig(r=2))
    with torch.no_grad():
        for p in peftkit.parameters(model):
            p.add_(0.2)
    peftkit.save(model, tmp_path / "sft")
    with pytest.raises(ValueError, match="'default' changes the output before training begins, so name the reference"):
        dpo(model, tokenizer, tmp_path)
    model = llama()
    peftkit.load(model, tmp_path / "sft", name="ref")
    peftkit.load(model, tmp_path / "sft", trainable=True)
    trainer = dpo(model, tokenizer, tmp_path, ref_model=Reference(model, "ref"))
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("config", [LoRAConfig(r=2, init="pissa"), LoRAConfig(r=2, init="olora")], ids=lambda c: c.init)
def test_a_fresh_adapter_needs_no_reference_named(config, tokenizer, tmp_path):
    assert isinstance(dpo(adapted(config), tokenizer, tmp_path, train=False).ref_model, Reference)


def test_a_model_that_cannot_be_asked_yet_is_taken(tokenizer, tmp_path, monkeypatch):
    model = adapted(LoRAConfig(r=2))
    monkeypatch.setattr(type(model), "dummy_inputs", property(lambda self: {"input_ids": torch.tensor([[10**6]])}))
    assert isinstance(dpo(model, tokenizer, tmp_path, train=False).ref_model, Reference)


def test_a_reference_that_shares_its_weights_is_not_synchronised(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="sync_ref_model changes the reference's weights"):
        dpo(adapted(LoRAConfig(r=2)), tokenizer, tmp_path, train=False, sync_ref_model=True)


def test_precomputed_log_probabilities_are_the_bases(tokenizer, tmp_path):
    first = dpo(adapted(LoRAConfig(r=2)), tokenizer, tmp_path / "a", save_strategy="no")
    ahead = dpo(adapted(LoRAConfig(r=2)), tokenizer, tmp_path / "b", save_strategy="no", precompute_ref_log_probs=True)
    assert losses(ahead) == pytest.approx(losses(first), abs=1e-5)


def test_a_reference_owns_nothing_and_changes_nothing():
    model = adapted(LoRAConfig(r=2), attention_dropout=0.5)
    base = llama(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    reference = Reference(model)
    reference.train().to(torch.bfloat16).requires_grad_(True)
    assert torch.equal(evaluated(reference, ids()), evaluated(base.eval(), ids()))
    assert [m.training for m in model.modules()] == modes and next(model.parameters()).dtype == torch.float32
    assert peftkit.active(model) == ("default",)
    assert equal(dict(reference.state_dict()), states(base, False))
    with pytest.raises(KeyError):
        Reference(model, "none")
    with pytest.raises(ValueError, match="no adapter"):
        Reference(base)
    peftkit.merge(model)
    with pytest.raises(ValueError, match="merged"):
        reference(ids())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trains_the_adapters_alone(checkpointing, tokenizer, tmp_path):
    def run(resume=None):
        model = adapted(LoRAConfig(r=2, dropout=0.1))
        trainer = AdapterSFTTrainer(
            model, args=SFTConfig(output_dir=str(tmp_path), gradient_checkpointing=checkpointing, **SETTINGS),
            processing_class=tokenizer, train_dataset=Dataset.from_dict({"text": texts(12, 0)}),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model

    model = run()
    assert equal(states(model, False), states(llama(), False))
    assert all(t.abs().sum() > 0 for k, t in states(model, True).items() if k.endswith("lora_B"))
    assert not (tmp_path / "checkpoint-4/model.safetensors").exists()
    again = run(str(tmp_path / "checkpoint-2"))
    assert equal(states(again, True), states(model, True))
    fresh = llama()
    peftkit.load(fresh, tmp_path / "checkpoint-4")
    assert torch.equal(evaluated(fresh.eval(), ids()), evaluated(model.eval(), ids()))


@pytest.mark.parametrize(
    "config", [LoRAConfig(r=2, targets=["lm_head"]), LoRAConfig(r=2, also_train=["lm_head"])], ids=str
)
def test_an_adapter_on_the_head_is_refused(config, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"reads lm_head.weight"):
        dpo(adapted(config, tie_word_embeddings=False), tokenizer, tmp_path)


def test_a_model_without_adapters_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no adapter is attached"):
        dpo(llama(), tokenizer, tmp_path)
    with pytest.raises(TypeError, match="peftkit.inject"):
        dpo("some/model", tokenizer, tmp_path)
