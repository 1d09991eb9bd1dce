"""accelerate needs nothing of ours: `prepare`, `save_state` and `load_state` with adapters and with schedules."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from trainers import Sentences, adapted, equal, states

import peftkit
from peftkit import LISA, LoRAConfig
from peftkit.testing.models import llama


def run(kind, folder, resume=False, steps=6):
    """Trains, keeps the state after the third step, or goes on from there.

    Without dropout: to begin iterating over a DataLoader draws from torch's generator.
    """
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = llama(layers=4) if kind == "schedule" else adapted(LoRAConfig(r=2, also_train=["norm"]))
    trained = model.parameters() if kind == "schedule" else peftkit.parameters(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    loader = torch.utils.data.DataLoader(Sentences(), batch_size=2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    lisa = LISA(model, optimizer, active_layers=1, interval=2) if kind == "schedule" else None
    if lisa is not None:
        accelerator.register_for_checkpointing(lisa)
    done, seen = 0, []
    if resume:
        accelerator.load_state(str(folder))
        done, loader = 3, accelerator.skip_first_batches(loader, 6)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        done += 1
        if lisa is not None:
            seen.append(lisa.active)
            lisa.step()
        if done == 3 and not resume:
            accelerator.save_state(str(folder))
        if done == steps:
            break
    return model, seen


@pytest.mark.parametrize("kind", ["adapters", "schedule"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(kind, tmp_path):
    whole, seen = run(kind, tmp_path)
    again, later = run(kind, tmp_path, resume=True)
    assert equal(whole.state_dict(), again.state_dict()) and later == seen[3:]
    if kind == "adapters":
        assert equal(states(whole, False), states(llama(), False))
        assert not equal(states(whole, True), states(adapted(LoRAConfig(r=2, also_train=["norm"])), True))
