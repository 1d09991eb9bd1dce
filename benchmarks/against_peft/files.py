"""What saving and loading cost.

Each library reads what it wrote; peftkit also syncs to disk and checks what it reads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import peft

import peftkit
from benchmarks.measure import interleaved

from .attaching import on_fresh_models, one_by_one
from .common import Row, Size, against, llama, ours, theirs


def measure(size: Size) -> Iterator[Row]:
    """Time of `save` and `load`."""
    count = 7 * size.layers
    with tempfile.TemporaryDirectory() as folder:
        at = {name: str(Path(folder) / name) for name in ("peftkit", "peft")}
        model, wrapped = llama(size.layers), peft.get_peft_model(llama(size.layers), theirs())
        peftkit.inject(model, ours())
        times = interleaved(
            {
                "peftkit": lambda: peftkit.save(model, at["peftkit"]),
                "peft": lambda: wrapped.save_pretrained(at["peft"]),
            },
            2 * size.rounds,
        )
        yield against(f"save {count} Linears, on the wall clock", times, size.limit(1 / 2))

        times = on_fresh_models(
            size.layers,
            {
                "peftkit": lambda model: peftkit.load(model, at["peftkit"]),
                "peft": lambda model: peft.PeftModel.from_pretrained(model, at["peft"]),
            },
            size.rounds,
        )
        yield against(f"load {count} Linears", times, size.limit(1 / 6))
        yield from _many(size, Path(folder))


def _many(size: Size, folder: Path) -> Iterator[Row]:
    count, linears = size.adapters, 7 * size.fewer
    mine, wrapped_at = str(folder / "mine"), str(folder / "theirs")
    model, wrapped = llama(size.fewer), peft.get_peft_model(llama(size.fewer), theirs(), adapter_name="first")
    peftkit.inject(model, ours())
    peftkit.save(model, mine)
    peftkit.eject(model)
    wrapped.save_pretrained(wrapped_at)
    at = str(Path(wrapped_at) / "first")

    totals = {
        "peftkit": sum(one_by_one(lambda name: peftkit.load(model, mine, name=name), count)),
        "peft": sum(one_by_one(lambda name: wrapped.load_adapter(at, adapter_name=name), count)),
    }
    yield against(f"load {count} adapters on {linears} Linears", totals, size.limit(1 / 60, adapters=100))
