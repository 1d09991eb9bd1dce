"""Lightning's Trainer on a model with adapters: checkpoints of adapters alone, and fits that go on from them exactly."""

from __future__ import annotations

import pickle

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from trainers import CONFIG, Sentences, adapted, equal, states

import peftkit
from peftkit import LISA, LoRAConfig, StorageError
from peftkit.integrations.lightning import AdapterCheckpoints, ScheduleCallback, without_base
from peftkit.testing.models import evaluated, ids, llama


class Task(lightning.LightningModule):
    """A language model and, beside it, a number that is trained and one that is not."""

    def __init__(self, model: nn.Module | None = None):
        super().__init__()
        self.model = adapted() if model is None else model
        self.scale = nn.Parameter(torch.ones(()))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        if model is None:
            without_base(self)

    def loss(self, batch):
        return self.scale * self.model(**batch).loss

    def training_step(self, batch, _):
        return self.loss(batch)

    def validation_step(self, batch, _):
        self.log("val", -self.loss(batch))  # so that the first is the best

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Loader:
    """Batches that a resumed fit goes on with where it was; torch's own DataLoader would begin anew."""

    def __init__(self, count: int = 48, seed: int = 0):
        self.data, self.at = Sentences(count, seed), 0

    def __len__(self):
        return len(self.data) // 2

    def __iter__(self):
        while self.at < len(self):
            self.at += 1
            yield torch.utils.data.default_collate([self.data[2 * self.at - 2], self.data[2 * self.at - 1]])
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def fitted(task, folder, callbacks=None, resume=None, steps=6, **kwargs):
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*([AdapterCheckpoints()] if callbacks is None else callbacks), keep],
        **({"limit_val_batches": 0} | kwargs),
    )  # fmt: skip
    torch.manual_seed(11)
    trainer.fit(task.train(), Loader(), Loader(4, 1), ckpt_path=resume, weights_only=False)
    return trainer


class Seeds(lightning.Callback):
    """Lightning keeps no random numbers; a test must."""

    state = None

    def state_dict(self):
        return {"state": torch.get_rng_state()}

    def load_state_dict(self, state_dict):
        self.state = state_dict["state"]

    def on_train_start(self, trainer, pl_module):
        if self.state is not None:
            torch.set_rng_state(self.state)


def test_a_checkpoint_holds_the_adapter_and_not_the_base(tmp_path):
    task = Task(adapted())
    base = states(task.model, False)
    fitted(task, tmp_path)
    kept = torch.load(tmp_path / "step=4.ckpt", weights_only=False)
    adapter = {f"model.{k}" for k in states(task.model, True)}
    assert set(kept["state_dict"]) == adapter | {"scale", "fixed", "peftkit_left_out"}
    assert equal(states(task.model, False), base)
    assert task.model.state_dict().keys() >= base.keys()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "configs",
    [(CONFIG,), (CONFIG, LoRAConfig(r=1, init="pissa")), (LoRAConfig(r=2, also_train=["lm_head", "norm"]),)],
    ids=["one", "two", "also"],
)
def test_a_resumed_fit_is_the_uninterrupted_one_to_the_bit(configs, accumulation, tmp_path):
    def task():
        return Task(adapted(*configs, names=("a", "b")[: len(configs)], tie_word_embeddings=False))

    whole, again = task(), task()
    kwargs = {"accumulate_grad_batches": accumulation}
    fitted(whole, tmp_path, [AdapterCheckpoints(), Seeds()], **kwargs)
    fitted(again, tmp_path / "2", [AdapterCheckpoints(), Seeds()], str(tmp_path / "step=4.ckpt"), **kwargs)
    assert equal(again.state_dict(), whole.state_dict())
    assert not equal(states(whole.model, True), states(task().model, True))


def test_the_best_model_is_tested(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val", save_top_k=1, mode="max")
    task = Task(adapted())
    trainer = fitted(
        task, tmp_path, [best, AdapterCheckpoints()], val_check_interval=2, limit_val_batches=2, num_sanity_val_steps=0
    )
    kept = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    trainer.test(task, Loader(4, 1), ckpt_path="best", weights_only=False, verbose=False)
    del kept["peftkit_left_out"]
    assert all(torch.equal(t, task.state_dict()[k]) for k, t in kept.items())


def test_a_module_made_from_a_checkpoint(tmp_path):
    task = Task()
    fitted(task, tmp_path)
    again = Task.load_from_checkpoint(tmp_path / "step=6.ckpt", weights_only=False)
    assert torch.equal(evaluated(again.model.eval(), ids()), evaluated(task.model.eval(), ids()))


def test_reading_is_strict(tmp_path):
    fitted(Task(adapted()), tmp_path, steps=2)
    path = str(tmp_path / "step=2.ckpt")

    def damaged(change):
        kept = torch.load(path, weights_only=False)
        change(kept["state_dict"])
        torch.save(kept, tmp_path / "other.ckpt")
        return str(tmp_path / "other.ckpt")

    def resume(task, file):
        trainer = lightning.Trainer(
            max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[AdapterCheckpoints()], enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(task, Loader(), ckpt_path=file, weights_only=False)

    one = next(k for k in torch.load(path, weights_only=False)["state_dict"] if k.endswith("lora_A"))
    with pytest.raises(RuntimeError, match="Missing key.*lora_A"):
        resume(Task(adapted()), damaged(lambda s: s.pop(one)))
    with pytest.raises(RuntimeError, match="Missing key.*fixed"):
        resume(Task(adapted()), damaged(lambda s: s.pop("fixed")))
    with pytest.raises(RuntimeError, match="Unexpected key.*more"):
        resume(Task(adapted()), damaged(lambda s: s.update(more=torch.ones(1))))
    with pytest.raises(StorageError, match="alpha=4.*alpha=2"):
        resume(Task(adapted(LoRAConfig(r=2, alpha=2, dropout=0.2))), path)
    other = Task(adapted())
    with torch.no_grad():
        other.model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    with pytest.raises(StorageError, match="another base"):
        resume(other, path)
    with pytest.raises(ValueError, match="no adapter"):
        resume(Task(llama()), path)


def test_weights_only_is_refused_and_the_hook_goes(tmp_path):
    task = Task(adapted())
    keep = ModelCheckpoint(tmp_path, "other", save_weights_only=True, every_n_epochs=1)
    with pytest.raises(ValueError, match="save_weights_only"):
        fitted(task, tmp_path, [AdapterCheckpoints(), keep])
    fitted(task, tmp_path)
    kept = torch.load(tmp_path / "step=6.ckpt", weights_only=True)  # plain values and tensors alone
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"model.model.embed_tokens"):
        task.load_state_dict(kept["state_dict"])


def test_a_schedule_goes_on_exactly(tmp_path):
    def run(folder, resume=None, **kwargs):
        schedule = ScheduleCallback(LISA, active_layers=1, interval=3, seed=1)
        task, seen = Task(llama(layers=4)), []
        schedule.on_before_zero_grad = lambda *_: seen.append(schedule.schedule.active)
        fitted(task, folder, [schedule, Seeds()], resume, steps=8, **kwargs)
        assert schedule.schedule.steps == 8
        return task, seen

    whole, seen = run(tmp_path / "a")
    assert len(set(seen)) > 1 and all(seen[i] == seen[i + 1] for i in (0, 1, 3, 4, 6)) and len(seen) == 8
    assert all(p.requires_grad for p in whole.model.parameters())  # closed
    for kept in (2, 4):
        again, later = run(tmp_path / "b", str(tmp_path / f"a/step={kept}.ckpt"))
        assert later == seen[kept:]
        assert equal(again.state_dict(), whole.state_dict())


def test_a_schedule_counts_optimizer_steps(tmp_path):
    schedule = ScheduleCallback(LISA, active_layers=1, interval=2)
    fitted(Task(llama()), tmp_path, [schedule], steps=4, accumulate_grad_batches=3)
    assert schedule.schedule.steps == 4


def test_adapters_may_hang_on_the_whole_module(tmp_path):
    task = Task(llama())
    peftkit.inject(task, LoRAConfig(r=2, targets=["q_proj"]))
    fitted(task, tmp_path, steps=2)
    kept = torch.load(tmp_path / "step=2.ckpt", weights_only=False)["state_dict"]
    assert set(kept) == set(states(task, True)) | {"peftkit_left_out"}


def test_a_module_of_another_base_or_other_settings_is_not_made_from_a_checkpoint(tmp_path):
    fitted(Task(), tmp_path, steps=2)

    class Other(Task):
        def __init__(self):
            super().__init__(model=type(self).made())
            without_base(self)

    def scaled():
        model = adapted()
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(2)
        return model

    for made, message in (
        (lambda: adapted(LoRAConfig(r=2, alpha=400, dropout=0.2)), "alpha"),
        (scaled, "another base"),
    ):
        Other.made = staticmethod(made)
        with pytest.raises(StorageError, match=message):
            Other.load_from_checkpoint(tmp_path / "step=2.ckpt", weights_only=False)


@pytest.mark.parametrize("first", ["schedule", "checkpoints"])
@pytest.mark.parametrize("interval", [1, 2])
def test_a_schedule_beside_adapters_keeps_what_it_trained(first, interval, tmp_path):
    def run(folder, resume=None):
        task = Task(adapted(layers=4))
        every = torch.optim.AdamW(task.parameters(), lr=1e-2)
        task.configure_optimizers = lambda: every
        both = [ScheduleCallback(LISA, active_layers=1, interval=interval), AdapterCheckpoints()]
        fitted(task, folder, [*(both if first == "schedule" else both[::-1]), Seeds()], resume)
        return task

    whole = run(tmp_path / "a")
    assert equal(run(tmp_path / "b", str(tmp_path / "a/step=4.ckpt")).state_dict(), whole.state_dict())
    kept = torch.load(tmp_path / "a/step=6.ckpt", weights_only=False)["state_dict"]
    start = Task(adapted(layers=4)).state_dict()
    moved = {k for k, t in whole.state_dict().items() if not torch.equal(t, start[k])}
    assert moved <= set(kept)
    assert any(".layers.0." in k for k in moved) or any(".layers.1." in k for k in moved)


def test_what_was_trained_and_then_frozen_is_kept(tmp_path):
    task = Task(adapted())
    norm = task.model.model.norm.weight.requires_grad_(True)

    class Freeze(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                norm.requires_grad_(False)

    fitted(task, tmp_path, [AdapterCheckpoints(), Freeze()])
    kept = torch.load(tmp_path / "step=6.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(kept["model.model.norm.weight"], norm) and not torch.equal(norm, torch.ones_like(norm))


def test_a_model_under_two_names_is_left_out_under_both(tmp_path):
    task = Task(adapted())
    task.backbone = task.model.model
    fitted(task, tmp_path, steps=2)
    kept = torch.load(tmp_path / "step=2.ckpt", weights_only=False)["state_dict"]
    assert all(".peftkit." in k or k in {"scale", "fixed", "peftkit_left_out"} for k in kept)


def test_after_an_exception_nothing_is_left_behind(tmp_path):
    class Fail(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                raise RuntimeError("stopped")

    callback, schedule = AdapterCheckpoints(), ScheduleCallback(LISA, active_layers=1, interval=2)
    task = Task(adapted())
    with pytest.raises(RuntimeError, match="stopped"):
        fitted(task, tmp_path, [callback, Fail()])
    kept = torch.load(tmp_path / "step=2.ckpt", weights_only=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        task.load_state_dict(kept["state_dict"])
    again = Task(adapted())
    fitted(again, tmp_path / "2", [callback], str(tmp_path / "step=2.ckpt"))
    plain = Task(llama(layers=4))
    with pytest.raises(RuntimeError, match="stopped"):
        fitted(plain, tmp_path / "3", [schedule, Fail()])
    assert all(p.requires_grad for p in plain.model.parameters())
    fitted(plain, tmp_path / "4", [schedule], steps=2)
    assert schedule.schedule.steps == 2


def test_what_is_not_trained_says_so_and_what_was_ejected_is_a_whole_model(tmp_path):
    model = adapted()
    peftkit.activate(model)
    with pytest.raises(ValueError, match="is trained"):
        fitted(Task(model), tmp_path)
    task = Task()
    assert pickle.loads(pickle.dumps(task)).state_dict().keys() == task.state_dict().keys()
    trainer = fitted(task, tmp_path, steps=2)
    peftkit.merge(task.model, keep_base=False)
    trainer.save_checkpoint(tmp_path / "merged.ckpt")
    kept = torch.load(tmp_path / "merged.ckpt", weights_only=False)["state_dict"]
    assert kept.keys() == task.state_dict().keys()
    task.load_state_dict(kept)


@pytest.mark.parametrize("how", ["the same module", "made from the checkpoint"])
def test_a_second_fit_keeps_what_the_first_one_trained(how, tmp_path):
    class Tuned(Task):
        def __init__(self):
            super().__init__(adapted(tie_word_embeddings=False))
            without_base(self)

    task = Tuned()
    task.model.lm_head.requires_grad_(True)
    fitted(task, tmp_path / "1", steps=2)
    head = task.model.lm_head.weight.detach().clone()
    if how != "the same module":
        task = Tuned.load_from_checkpoint(tmp_path / "1/step=2.ckpt", weights_only=False)
    task.model.lm_head.requires_grad_(False)
    fitted(task, tmp_path / "2", steps=2)
    again = Tuned.load_from_checkpoint(tmp_path / "2/step=2.ckpt", weights_only=False)
    assert torch.equal(again.model.lm_head.weight, head) and not torch.equal(head, Tuned().model.lm_head.weight)
