"""What the ranks of `test_lisa_ranks.py` do, in processes of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from peftkit import LISA, HalfFineTuning

WORLD = 2
STEPS = 8


class Block(nn.Module):
    """x + f(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Embedding, four blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def net() -> Net:
    """The same each time."""
    torch.manual_seed(0)
    return Net()


def train(model: nn.Module, lisa: LISA, optimizer: torch.optim.Optimizer, rows: slice) -> list[tuple[str, ...]]:
    """Train on some rows of each batch; returns the blocks of each step."""
    drawn = []
    for step in range(STEPS):
        ids = torch.randint(0, 10, (4, 5), generator=torch.Generator().manual_seed(step))[rows]
        drawn.append(lisa.active)
        nn.functional.cross_entropy(model(ids).transpose(1, 2), ids.roll(1, 1)).backward()
        optimizer.step()
        lisa.step()
        optimizer.zero_grad()
    return drawn


def alone() -> tuple[Net, list[tuple[str, ...]]]:
    """One process on whole batches: what the ranks together must come to."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, train(model, LISA(model, optimizer, interval=2, seed=4), optimizer, slice(None))


def ddp(rank: int) -> dict[str, Any]:
    """Each rank has half of the batch."""
    wrapped = DistributedDataParallel(model := net(), find_unused_parameters=True)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    lisa = LISA(wrapped, optimizer, interval=2, seed=4)
    drawn = train(wrapped, lisa, optimizer, slice(2 * rank, 2 * rank + 2))
    return {"drawn": drawn, "states": len(optimizer.state), "off": difference(model)}


def sharded(rank: int) -> dict[str, Any]:
    """FSDP2, each block a unit."""
    model = net()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lisa = LISA(model, optimizer, interval=2, seed=4)
    drawn = train(model, lisa, optimizer, slice(2 * rank, 2 * rank + 2))
    whole = {name: p.full_tensor() for name, p in model.state_dict().items()}
    return {"drawn": drawn, "states": len(optimizer.state), "off": difference(whole)}


def refused(rank: int) -> dict[str, Any]:
    """What cannot work says so on every rank."""

    def error(make: Any) -> str:
        try:
            make()
        except (ValueError, RuntimeError, TypeError) as found:
            return f"{type(found).__name__}: {found}"
        return ""

    def adam(model: nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    def without_wrapper() -> None:
        optimizer = adam(model := net())
        train(model, LISA(model, optimizer, interval=2), optimizer, slice(2 * rank, 2 * rank + 2))

    def wrapped_too_late(check_ranks: bool) -> None:
        optimizer = adam(model := net())
        lisa = LISA(model, optimizer, interval=2, check_ranks=check_ranks)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        train(wrapped, lisa, optimizer, slice(2 * rank, 2 * rank + 2))

    frozen = net()
    frozen.layers[1].requires_grad_(False)
    late = DistributedDataParallel(frozen, find_unused_parameters=True)
    import peftkit

    adapted = net()
    peftkit.inject(adapted, peftkit.LoRAConfig(r=1, targets="all-linear"))
    adapted = DistributedDataParallel(adapted, find_unused_parameters=True)
    waiting = DistributedDataParallel(net())
    static = DistributedDataParallel(net(), find_unused_parameters=True, static_graph=True)
    flat = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True)
    zero = ZeroRedundancyOptimizer(net().parameters(), torch.optim.AdamW, lr=1e-2)
    return {
        "seeds": error(lambda: LISA(m := net(), adam(m), seed=rank)),
        "models": error(lambda: HalfFineTuning(m := net(), adam(m), blocks="layers.[01]" if rank else "layers.*")),
        "no wrapper": error(without_wrapper),
        "wrapped too late": error(lambda: wrapped_too_late(True)),
        "not compared": error(lambda: wrapped_too_late(False)),
        "block frozen": error(lambda: LISA(late, adam(late))),
        "adapters alone": error(lambda: LISA(adapted, adam(adapted))),
        "waiting": error(lambda: LISA(waiting, adam(waiting))),
        "static": error(lambda: LISA(static, adam(static))),
        "fsdp1": error(lambda: LISA(flat, adam(flat))),
        "zero": error(lambda: LISA(net(), zero)),
    }


def difference(found: Any) -> float:
    """How far the weights are from those of one process."""
    state = found.state_dict() if isinstance(found, nn.Module) else found
    return max(float((state[name] - p).abs().max()) for name, p in alone()[0].state_dict().items())


def main() -> None:
    """`python lisa_ranks.py RANK FILE JOB`."""
    rank, store, job = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    result = {"ddp": ddp, "sharded": sharded, "refused": refused}[job](rank)
    distributed.destroy_process_group()
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
