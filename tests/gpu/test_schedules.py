"""LISA on a GPU: what is allocated, fused optimizers, and fp16 with a scaler."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peftkit import LISA

LAYERS, WIDTH = 8, 512
pytestmark = pytest.mark.gpu


def model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False), nn.Linear(WIDTH, 8)).cuda()


def step(net: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
    with torch.autocast("cuda", torch.float16, enabled=scaler is not None):
        loss = net(torch.randn(1, 4, WIDTH, device="cuda")).float().square().mean()
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"fused": True, "capturable": True}])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_allocated_is_the_active_part(settings, scaled):
    """Weights, and gradients and two moments of what trains, to the allocator's rounding, over fifty switches."""
    warm = model()
    step(warm, torch.optim.SGD(warm.parameters(), lr=0.0))  # what the libraries keep for themselves
    del warm
    start = torch.cuda.memory_allocated()
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, **settings)
    scaler = torch.amp.GradScaler("cuda") if scaled else None
    lisa = LISA(net, optimizer, active_layers=2, interval=1)
    for _ in range(50):
        step(net, optimizer, scaler)
        on = sum(p.nbytes for p in net.parameters() if p.requires_grad)
        weights = sum(p.nbytes for p in net.parameters())
        assert torch.cuda.memory_allocated() - start == pytest.approx(weights + 3 * on, rel=0.05)
        lisa.step()
        optimizer.zero_grad()


def test_what_rests_keeps_its_bits():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    lisa = LISA(net, optimizer, active_layers=2, interval=2)
    for _ in range(6):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        on = set(lisa.trained)
        for _ in range(2):
            step(net, optimizer)
            lisa.step()
            optimizer.zero_grad()
        assert {n for n, p in net.named_parameters() if not torch.equal(p, before[n])} == on
