"""LISA with what torch adds to a training loop: compiled blocks, checkpointing, and the memory it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from schedule_models import backward, bits, changed, llama, train
from torch import nn

import peftkit
from peftkit import LISA, HalfFineTuning, LoRAConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recompiles():
    """Counts the graphs that dynamo makes, with compilers that cost nothing."""
    torch._dynamo.reset()
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        made.append(1)
        return graph.forward

    yield made, backend
    torch._dynamo.reset()


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_compiled_blocks_are_compiled_twice_and_never_again(recompiles, how, adapted):
    """Once at rest and once training; after that no draw compiles anything."""
    made, backend = recompiles
    model, plain = llama(), llama()
    for one in (model, plain) if adapted else ():
        torch.manual_seed(1)
        peftkit.inject(one, LoRAConfig(r=2, targets="q_proj"))
    layers = model.model.layers
    for i, layer in enumerate(layers):
        if how == "in place":
            layer.compile(backend=backend)
        else:
            layers[i] = torch.compile(layer, backend=backend)
    optimizer, other = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain))
    lisa, beside = LISA(model, optimizer, interval=1, seed=1), LISA(plain, other, interval=1, seed=1)
    assert [b.name for b in lisa.blocks] == [b.name for b in beside.blocks]
    seen = set()
    for step in range(10):
        assert lisa.active == beside.active
        if step == 1:
            count = len(made)
            assert count <= 2 * (1 if how == "in place" else len(layers))
        seen.add(lisa.active)
        train(model, optimizer, [step], lisa)
        train(plain, other, [step], beside)
    assert len(seen) > 5 and len(made) == count
    assert lisa.state_dict() == beside.state_dict()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("schedule", ["lisa", "half"])
def test_checkpointing_changes_nothing(reentrant, schedule):
    found = []
    for checkpointing in (False, True):
        model = llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        lisa = LISA(model, optimizer, interval=2) if schedule == "lisa" else None
        half = HalfFineTuning(model, optimizer) if schedule == "half" else None
        train(model, optimizer, range(6), lisa)
        if half is not None:
            half.new_round()
        train(model, optimizer, range(6, 8), lisa)
        found.append(bits(model))
    assert all(torch.equal(p, found[1][name]) for name, p in found[0].items())


def test_a_wrapped_and_a_compiled_model_have_the_names_of_the_plain_one():
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lisa = LISA(model, optimizer, interval=3)
    state = lisa.state_dict()
    lisa.close()
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        lisa = LISA(wrapped, optimizer, interval=3)  # type: ignore[arg-type]
        lisa.load_state_dict(state)
        assert lisa.state_dict() == state
        lisa.close()


def test_optimizer_state_is_what_the_active_part_needs():
    """8 blocks, 2 active, after 60 steps: 20.1 MiB; a callback that drops nothing comes to 56.8, as full fine-tuning."""
    model = llama(8, hidden_size=256, intermediate_size=704, num_key_value_heads=4, vocab_size=2000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    lisa = LISA(model, optimizer, active_layers=2, interval=5)
    for step in range(60):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        lisa.step()
    backward(model, 60)
    optimizer.step()
    moments = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim())
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert moments / 2**20 == pytest.approx(20.1, abs=0.05)
    assert gradients * 2 == moments
    assert sum(p.nbytes for p in model.parameters()) * 2 / 2**20 == pytest.approx(56.8, abs=0.05)


CODE = """
import json, re, sys, torch
from pathlib import Path
from torch import nn
from peftkit import LISA
torch.set_num_threads(1)
model = nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0), 12, enable_nested_tensor=False)
model.head = nn.Linear(256, 256)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
lisa = LISA(model, optimizer, active_layers=int(sys.argv[1]), interval=1)
peaks = []
for step in range(51):
    model.head(model(torch.randn(4, 1, 256))).square().mean().backward()  # what rests saves activations too: few tokens
    optimizer.step()
    optimizer.zero_grad()
    lisa.step()
    peaks.append(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
sys.stdout.write(json.dumps({"peaks": peaks, "block": sum(p.nbytes for p in model.layers[0].parameters())}))
"""


def test_memory_of_a_process_is_that_of_the_active_part_over_fifty_switches():
    """Peaks of fresh processes: under full fine-tuning's by gradients and moments of what rests, and flat."""
    found = {}
    for active in (12, 2):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CODE, str(active)],
            cwd=ROOT,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},  # else glibc keeps some of what was freed
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found[active] = json.loads(done.stdout.splitlines()[-1])
    dropped = 10 * 3 * found[2]["block"]
    saved = found[12]["peaks"][-1] - found[2]["peaks"][-1]
    assert saved == pytest.approx(dropped, rel=0.1), (saved, dropped)
    assert found[2]["peaks"][-1] - found[2]["peaks"][4] < 0.02 * dropped


def test_what_rests_saves_no_input_for_its_weights():
    """Of a Linear that rests autograd keeps less: what a weight's gradient needs is not saved."""
    model = llama().train()
    saved = {}
    for active in (6, 0):
        lisa = LISA(model, torch.optim.AdamW(model.parameters()), active_layers=active)
        bytes_ = 0

        def pack(t: torch.Tensor) -> torch.Tensor:
            nonlocal bytes_
            bytes_ += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            backward(model, 0)
        saved[active] = bytes_
        lisa.close()
        model.zero_grad()
    assert saved[0] < 0.8 * saved[6]
    assert changed(bits(model), model) == set()
