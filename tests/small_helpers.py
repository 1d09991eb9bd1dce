"""The small methods on one Linear, and what hangs where."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftkit import BitFitConfig, IA3Config, LoHaConfig, LoKrConfig, VeRAConfig

ALL = [IA3Config(targets="0"), VeRAConfig(r=2, targets="0"), BitFitConfig(targets="0"), LoHaConfig(r=1, targets="0"),
       LoHaConfig(r=4, targets="0"), LoKrConfig(r=1, targets="0")]  # fmt: skip


def grafted(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """The adapters by module path, parts behind a colon."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(type(module), "__grafted__"):
            for key, adapter in module.peftkit.named_children():
                if key.partition(":")[0] == name:
                    found[f"{path}{key[len(name) :]}"] = adapter
    return found
