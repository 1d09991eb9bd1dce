"""transformers' Trainer on a model with adapters: checkpoints of adapters alone, and runs that go on from them exactly."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainers import CONFIG, Sentences, adapted, equal, states
from transformers import Trainer, TrainingArguments

import peftkit
from peftkit import LISA, HalfFineTuning, LoRAConfig, StorageError
from peftkit.integrations.transformers import AdapterTrainer, ScheduleCallback
from peftkit.testing.models import evaluated, ids, llama


def arguments(folder, **kwargs):
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=6, save_strategy="steps", save_steps=2,
        learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no", seed=7,
    )  # fmt: skip
    return TrainingArguments(**(settings | kwargs))


def trained(model, folder, cls=AdapterTrainer, resume=None, callbacks=None, **kwargs):
    trainer = cls(
        model=model,
        args=arguments(folder, **kwargs),
        train_dataset=Sentences(),
        eval_dataset=Sentences(4, 1),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_checkpoint_holds_the_adapter_and_not_the_base(tmp_path):
    model = adapted()
    base = states(model, False)
    trained(model, tmp_path)
    found = {f.name for f in (tmp_path / "checkpoint-4").iterdir()}
    assert found == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "trainer_state.json", "training_args.bin", "peftkit_adapters.json",
    }  # fmt: skip
    assert equal(states(model, False), base)
    optimizer = torch.load(tmp_path / "checkpoint-4/optimizer.pt")
    assert len(optimizer["state"]) == len(peftkit.parameters(model))
    fresh = llama()
    peftkit.load(fresh, tmp_path / "checkpoint-6")
    assert torch.equal(evaluated(fresh.eval(), ids()), evaluated(model.eval(), ids()))


ALSO = {"lm_head": None, "*.input_layernorm": None, "embed_tokens": [3, 5]}
CASES = {
    "one": ((CONFIG,), ("default",)),
    "named": ((CONFIG,), ("task-a",)),
    "two": ((CONFIG, LoRAConfig(r=1, targets="mlp")), ("default", "task-b")),
    "also": ((LoRAConfig(r=2, dropout=0.1, also_train=ALSO),), ("default",)),
    "pissa": ((LoRAConfig(r=2, init="pissa"),), ("a",)),
}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(case, accumulation, tmp_path):
    configs, names = CASES[case]
    kwargs = {"tie_word_embeddings": False}
    whole = adapted(*configs, names=names, **kwargs)
    start = states(whole, True)
    trained(whole, tmp_path / "whole", gradient_accumulation_steps=accumulation)
    assert not equal(states(whole, True), start)
    again = adapted(*configs, names=names, **kwargs)
    folder = tmp_path / "whole"
    trainer = trained(again, folder, resume=str(folder / "checkpoint-2"), gradient_accumulation_steps=accumulation)
    assert trainer.state.global_step == 6
    assert equal(states(again, True), states(whole, True))
    assert equal(states(again, False), states(whole, False))


def test_an_adapter_that_rests_stays_as_it_is(tmp_path):
    model = adapted(CONFIG, CONFIG, names=("a", "b"))
    peftkit.activate(model, "b")
    before = {k: t for k, t in states(model, True).items() if ".a." in k}
    trained(model, tmp_path)
    other = adapted(CONFIG, CONFIG, names=("a", "b"))
    peftkit.activate(other, "b")
    trained(other, tmp_path / "2", resume=str(tmp_path / "checkpoint-4"))
    assert equal(states(other, True), states(model, True))
    assert equal({k: t for k, t in states(model, True).items() if ".a." in k}, before)
    assert peftkit.active(other) == ("b",)


def test_the_last_checkpoint_is_found_and_old_ones_go(tmp_path):
    model = adapted()
    trained(model, tmp_path, save_total_limit=1)
    assert [d.name for d in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    again = adapted()
    trained(again, tmp_path, resume=True, max_steps=8)
    assert sorted(d.name for d in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = adapted()
    trainer = trained(
        model, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_total_limit=2,
        metric_for_best_model="loss", greater_is_better=True,  # so that it is not the last
    )  # fmt: skip
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    fresh = llama()
    peftkit.load(fresh, best)
    assert torch.equal(evaluated(fresh.eval(), ids()), evaluated(model.eval(), ids()))
    assert all(p.requires_grad for p in peftkit.parameters(model))
    worse = llama()
    peftkit.load(worse, tmp_path / "checkpoint-6")
    assert not torch.equal(evaluated(worse.eval(), ids()), evaluated(model, ids()))


def test_save_model_writes_the_adapter(tmp_path):
    model = adapted(names=("x",))
    trainer = trained(model, tmp_path, save_strategy="no", max_steps=1)
    trainer.save_model()
    assert {f.name for f in tmp_path.iterdir()} == {"x", "training_args.bin", "peftkit_adapters.json"}
    peftkit.restore(model, tmp_path, name="x")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_trains_the_adapters(checkpointing, tmp_path):
    model = adapted(LoRAConfig(r=2))
    trained(model, tmp_path, gradient_checkpointing=checkpointing, save_strategy="no")
    b = [t for k, t in states(model, True).items() if k.endswith("lora_B")]
    assert all(t.abs().sum() > 0 for t in b)


def test_what_would_lose_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no adapter is attached"):
        trained(llama(), tmp_path)
    model = adapted()
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="model.norm.weight is trained and belongs to no adapter"):
        trained(model, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_checkpoint_must_be_of_what_is_attached(tmp_path):
    trained(adapted(), tmp_path, max_steps=2)
    folder = str(tmp_path / "checkpoint-2")
    for model, message in (
        (adapted(names=("other",)), "holds 'default'; attached: 'other'"),
        (adapted(names=("default", "more")), "attached: 'default', 'more'"),
        (adapted(LoRAConfig(r=3, alpha=4, dropout=0.2)), "r=2.*r=3"),
    ):
        with pytest.raises(StorageError, match=message):
            trained(model, tmp_path, resume=folder)
    os.truncate(tmp_path / "checkpoint-2/adapter_model.safetensors", 200)
    with pytest.raises(StorageError):
        trained(adapted(), tmp_path, resume=folder)


def test_a_schedule_goes_on_exactly(tmp_path):
    def run(folder, resume=None, steps=8):
        model = llama(layers=4)
        callback = ScheduleCallback(LISA, active_layers=1, interval=2, seed=1)
        seen = []
        callback.on_step_begin = lambda *_, **__: seen.append(callback.schedule.active)
        trained(model, folder, cls=Trainer, resume=resume, callbacks=[callback], max_steps=steps, save_steps=3)
        return model, seen

    whole, seen = run(tmp_path / "a")
    assert len(set(seen)) > 1 and all(seen[i] == seen[i + 1] for i in (0, 2, 4, 6))
    assert all(p.requires_grad for p in whole.parameters())  # closed
    again, later = run(tmp_path / "b", resume=str(tmp_path / "a/checkpoint-3"))
    assert later == seen[3:]
    assert equal(states(again, False), states(whole, False))
    assert "model.safetensors" in os.listdir(tmp_path / "a/checkpoint-3")


def test_a_schedule_counts_optimizer_steps(tmp_path):
    callback = ScheduleCallback(LISA, active_layers=1, interval=2)
    trained(llama(), tmp_path, cls=Trainer, callbacks=[callback], gradient_accumulation_steps=3, save_strategy="no")
    assert callback.schedule.steps == 6


def test_a_schedule_and_checkpoints_of_adapters_exclude_each_other(tmp_path):
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = AdapterTrainer(
        model, arguments(tmp_path), train_dataset=Sentences(), optimizers=(optimizer, None),
        callbacks=[ScheduleCallback(LISA, active_layers=1, interval=2)],
    )  # fmt: skip
    with pytest.raises(ValueError, match="belongs to no adapter"):
        trainer.train()
    assert trainer.state.global_step == 0  # said before anything was trained


def test_checkpoints_are_what_peft_reads(tmp_path):
    trained(adapted(), tmp_path, max_steps=2)
    keys = load_file(tmp_path / "checkpoint-2/adapter_model.safetensors")
    assert all(k.startswith("base_model.model.") for k in keys)


def test_what_lies_outside_of_the_adapted_part_is_not_lost(tmp_path):
    model = llama(tie_word_embeddings=False)
    peftkit.inject(model.model, LoRAConfig(r=2))
    with pytest.raises(ValueError, match="lm_head.weight is trained and belongs to no adapter"):
        trained(model, tmp_path)


def test_what_would_not_train_says_so(tmp_path):
    peftkit.save(adapted(), tmp_path / "adapter")
    model = llama()
    peftkit.load(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="loaded without trainable=True"):
        trained(model, tmp_path / "run")
    trainer = AdapterTrainer(model, arguments(tmp_path / "run"), eval_dataset=Sentences(4, 1))
    assert trainer.evaluate()["eval_loss"] > 0  # but may be evaluated


def test_saving_the_model_beside_its_checkpoints_leaves_them_as_they_were(tmp_path):
    trainer = trained(adapted(), tmp_path, max_steps=12)
    times = {d.name: d.stat().st_mtime_ns for d in tmp_path.glob("checkpoint-*")}
    here = os.stat(tmp_path).st_ino
    time.sleep(0.05)
    trainer.save_model()
    assert {d.name: d.stat().st_mtime_ns for d in tmp_path.glob("checkpoint-*")} == times
    assert os.stat(tmp_path).st_ino == here and not list(tmp_path.glob(".adapters-*"))  # a mount point stays one
    trained(adapted(), tmp_path, resume=str(tmp_path / "checkpoint-12"), max_steps=14, save_total_limit=3)
    assert {d.name for d in tmp_path.glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-12", "checkpoint-14"}


def test_what_an_earlier_run_left_in_the_directory_is_not_taken_for_this_one_s(tmp_path):
    trained(adapted(names=("a",)), tmp_path)
    trainer = trained(
        adapted(),
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="loss",
    )
    assert trainer.state.best_model_checkpoint
    with pytest.raises(StorageError, match="no checkpoint of adapters"):
        trained(adapted(), tmp_path, resume=str(tmp_path / "checkpoint-4" / "a"))


def test_all_adapters_are_restored_or_none(tmp_path):
    configs, names = (CONFIG, LoRAConfig(r=1, targets="mlp")), ("default", "task-b")
    trained(adapted(*configs, names=names), tmp_path, max_steps=2)
    os.truncate(tmp_path / "checkpoint-2/task-b/adapter_model.safetensors", 100)
    model = adapted(*configs, names=names)
    before = states(model, True)
    with pytest.raises(StorageError):
        trained(model, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert equal(states(model, True), before)


class Stop(Exception):
    pass


def test_a_run_after_one_that_was_interrupted(tmp_path):
    callback = ScheduleCallback(LISA, active_layers=1, interval=2)
    model = llama(layers=4)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Sentences(), callbacks=[callback])

    def stop(args, state, control, **kwargs):
        if state.global_step == 3:
            raise Stop

    callback.on_step_begin = stop
    with pytest.raises(Stop):
        trainer.train()
    assert not all(p.requires_grad for p in model.parameters())
    del callback.on_step_begin
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.schedule.steps == 6 and all(p.requires_grad for p in model.parameters())
    callback.on_step_begin = stop
    with pytest.raises(Stop):
        trainer.train()
    del callback.on_step_begin
    trained(model, tmp_path / "new", cls=Trainer, callbacks=[callback])  # as a notebook's cell that is run again
    assert callback.schedule.steps == 6 and all(p.requires_grad for p in model.parameters())
    wrong = ScheduleCallback(LISA, active_layers=2, interval=2)
    with pytest.raises(ValueError, match="saved with active_layers=1"):
        trained(model, tmp_path, cls=Trainer, callbacks=[wrong], resume=str(tmp_path / "checkpoint-4"))
    assert all(p.requires_grad for p in model.parameters())


def test_each_run_of_half_fine_tuning_is_a_round(tmp_path):
    callback, model, seen = ScheduleCallback(HalfFineTuning), llama(layers=4), []
    trainer = Trainer(model, arguments(tmp_path, save_strategy="no"), train_dataset=Sentences(), callbacks=[callback])
    callback.on_step_begin = lambda *_, **__: seen.append(tuple(callback.schedule.trained))
    trainer.train(), trainer.train()
    assert len(set(seen[:6])) == len(set(seen[6:])) == 1 and seen[0] != seen[6]


def test_a_schedule_beside_adapters_with_the_plain_trainer(tmp_path):
    def run(folder, resume=None):
        model = adapted(layers=4)
        callback = ScheduleCallback(LISA, active_layers=1, interval=2)
        trainer = Trainer(
            model, arguments(folder), train_dataset=Sentences(), callbacks=[callback],
            optimizers=(torch.optim.AdamW(model.parameters(), lr=1e-2), None),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "a")
    assert equal(run(tmp_path / "b", str(tmp_path / "a/checkpoint-4")).state_dict(), whole.state_dict())
    start = adapted(layers=4)
    assert not equal(states(whole, True), states(start, True)) and not equal(states(whole, False), states(start, False))
