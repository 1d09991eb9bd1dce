"""LISA in training loops of all kinds: adapters beside it, accumulation, scaling, closures, several optimizers."""

from __future__ import annotations

import pytest
import torch
from schedule_models import ADAM, OPTIMIZERS, backward, batch, bits, changed, llama, of_block, train
from torch import nn

import peftkit
from peftkit import LISA, LoRAConfig


def test_adapters_train_on_beside_it_and_come_off_again():
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)  # by the user, so it stays
    peftkit.inject(model, LoRAConfig(r=2))
    adapter = {name for name, _ in model.named_parameters() if ".peftkit." in name}
    optimizer = ADAM(model.parameters())
    lisa = LISA(model, optimizer, active_layers=1, interval=2)
    for step in range(0, 8, 2):
        before, active = bits(model), lisa.active
        train(model, optimizer, [step, step + 1], lisa)
        moved = changed(before, model)
        assert {n for n in moved if ".peftkit." in n} == adapter
        expected = {n for n in before if of_block(n) is None or f"model.layers.{of_block(n)}" in active}
        assert moved - adapter == {n for n in expected if ".peftkit." not in n} - {"model.embed_tokens.weight"}
    lisa.close()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, _ in model.named_parameters() if n in adapter
    ]
    peftkit.eject(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]


def test_a_merged_adapter_is_refused():
    model = llama()
    peftkit.inject(model, LoRAConfig(r=2))
    optimizer = ADAM(model.parameters())
    lisa = LISA(model, optimizer)
    peftkit.merge(model)
    with pytest.raises(RuntimeError, match=r"'default' is merged.*unmerge\(model\)"):
        lisa.step()
    lisa.close()
    with pytest.raises(RuntimeError, match="'default' is merged"):
        LISA(model, optimizer)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    models = []
    for parts in (1, 3):
        model = llama().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        lisa = LISA(model, optimizer, interval=2)
        for step in range(8):
            ids = batch(step)
            for rows in ids.chunk(parts):
                (model(rows, labels=rows).loss / parts).backward()
            optimizer.step()
            lisa.step()
            optimizer.zero_grad()
        models.append(model)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-11), name


def test_gradients_that_were_not_set_to_none_do_not_move_what_rests():
    model = llama()
    optimizer = ADAM(model.parameters())
    backward(model, 0)  # of a run before
    lisa = LISA(model, optimizer, interval=1)
    for step in range(5):
        before, on = bits(model), set(lisa.trained)
        optimizer.zero_grad(set_to_none=False)
        backward(model, step)
        optimizer.step()
        assert changed(before, model) == on
        lisa.step()


def test_with_a_gradient_scaler_and_a_step_that_overflows():
    model = llama()
    optimizer = ADAM(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    lisa = LISA(model, optimizer, interval=2)
    for step in range(10):
        before, on = bits(model), set(lisa.trained)
        ids = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        scaler.scale(loss * (float("inf") if step == 5 else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=False)
        scaler.step(optimizer)
        scaler.update()
        assert changed(before, model) == (set() if step == 5 else on)
        lisa.step()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**7


def test_what_is_injected_under_an_open_schedule_stays_alone_after_closing_it():
    model = llama()
    model.lm_head.requires_grad_(False)
    lisa = LISA(model, ADAM(model.parameters()))
    peftkit.inject(model, LoRAConfig(r=2))
    lisa.close()
    assert all((".peftkit." in name) == p.requires_grad for name, p in model.named_parameters())
    peftkit.eject(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_closing_after_the_adapters_came_off_leaves_what_they_gave_back():
    model = llama()
    model.lm_head.requires_grad_(False)
    peftkit.inject(model, LoRAConfig(r=2))
    lisa = LISA(model, ADAM(model.parameters()))
    peftkit.eject(model)
    lisa.close()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


@pytest.mark.parametrize("kind", ["adamw", "sgd-fused"])
def test_with_a_closure(kind):
    found = []
    for closed in (False, True):
        model = llama()
        optimizer = OPTIMIZERS[kind](model.parameters())
        lisa = LISA(model, optimizer, interval=2)
        for step in range(8):

            def closure(step: int = step, model: nn.Module = model) -> torch.Tensor:
                ids = batch(step)
                loss = model(ids, labels=ids).loss
                loss.backward()
                return loss

            if not closed:
                closure()
            optimizer.step(closure if closed else None)
            lisa.step()
            optimizer.zero_grad()
        found.append(model)
    assert changed(bits(found[0]), found[1]) == set()


@pytest.mark.parametrize("made", ["of what was prepared", "before"])
def test_within_accelerate_s_accumulation_only_real_steps_count(made):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = llama().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lisa = LISA(model, optimizer, interval=2) if made == "before" else None
    model, optimizer = accelerator.prepare(model, optimizer)
    lisa = lisa or LISA(model, optimizer, interval=2)
    plain = llama().double()
    own = torch.optim.SGD(plain.parameters(), lr=0.1)
    beside = LISA(plain, own, interval=2)
    for step in range(8):
        for rows in batch(step).chunk(3):
            with accelerator.accumulate(model):
                accelerator.backward(model(rows, labels=rows).loss)
                optimizer.step()
                lisa.step()
                optimizer.zero_grad()
        train(plain, own, [step], beside)
        assert lisa.active == beside.active and lisa.state_dict()["steps"] == step + 1
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-11)


def test_several_optimizers_that_hold_all_together():
    model = llama()
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    own = {id(p) for p in matrices}
    muon = torch.optim.Muon(matrices, lr=1e-2)
    adam = ADAM([p for p in model.parameters() if id(p) not in own])
    with pytest.raises(ValueError, match=r"\[Muon\(…\), AdamW\(…\)\]"):
        LISA(model, muon)
    lisa = LISA(model, [muon, adam], interval=2)
    for interval in range(5):
        before, on = bits(model), set(lisa.trained)
        for step in range(2):
            backward(model, 2 * interval + step)
            muon.step(), adam.step()
            held = {n for n, p in model.named_parameters() if muon.state.get(p) or adam.state.get(p)}
            assert held == on
            lisa.step()
            model.zero_grad()
        assert changed(before, model) == on
