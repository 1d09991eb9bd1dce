"""Valid files for the fuzzers to damage, made by the library itself: every method's examples, bases, other formats."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save, save_file
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig
from peftkit.method import Config, registered
from peftkit.storage import layout
from peftkit.testing.models import CASES
from peftkit.testing.stands import attach, fitted

Files = dict[str, Any]  # path below the case's folder -> bytes, or what `mutations` puts in their place


@dataclass(frozen=True)
class Seed:
    """An adapter on a model.

    Attributes:
        name: the method, the number of its example, the model, and whether the files are peftkit's own.
        model: without the adapter.
        adapter: files of its directory.
        base: files of the model's directory.
    """

    name: str
    model: nn.Module
    adapter: Files
    base: Files


def own_methods() -> list[tuple[str, type[Config]]]:
    """peftkit's; others may have registered theirs."""
    return [(n, m) for n, m in sorted(registered().items()) if m.__module__.startswith("peftkit.")]


@functools.cache
def adapters() -> tuple[Seed, ...]:
    """Every example of every method on the first small model that it can hang on, as peftkit and as peft write it."""
    configs = [(f"{name}-{i}", c) for name, m in own_methods() for i, c in enumerate(m.examples())]
    found = [seed for name, config in configs for seed in _first(name, config)]
    lora = LoRAConfig(r=2, targets="all-linear")
    for case in CASES:
        if case.name in ("conv2d", "embedding", "attention", "attention-three"):
            found += _on(f"lora-{case.name}", lora, case.name)
    rows = LoRAConfig(r=2, targets=["mid"], also_train={"embed": [3, 1]})
    found += _on("lora-rows", rows, "embedding") + _on(
        "lora-whole", LoRAConfig(r=2, targets="0", also_train=["2"]), "linear"
    )
    return tuple(found)


def _first(name: str, config: Any) -> list[Seed]:
    for case in CASES:
        if found := _on(name, config, case.name):
            return found
    return []


def _on(name: str, config: Any, where: str) -> list[Seed]:
    case = next(c for c in CASES if c.name == where)
    if not case.there():
        return []
    model = case.make()
    with_it = copy.deepcopy(model)
    if attach(with_it, fitted(config, case)) is not None:
        return []
    with torch.no_grad():
        for p in peftkit.parameters(with_it):
            p.add_(0.1)
    with tempfile.TemporaryDirectory() as folder:
        peftkit.save(with_it, folder)
        own = _files(Path(folder))
    base = _base(model)
    theirs = {**own, layout.TENSORS: save(load(own[layout.TENSORS]), {"format": "pt"})}
    return [Seed(f"{name}-{where}-{kind}", model, files, base) for kind, files in (("own", own), ("peft", theirs))]


def _files(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _base(model: nn.Module) -> Files:
    state = {k: v.clone().contiguous() for k, v in model.state_dict().items()}
    config: Any = getattr(model, "config", None)
    settings = {"model_type": "test"} if config is None else config.to_dict()
    return {"model.safetensors": save(state), "config.json": json.dumps(settings, default=str).encode()}


@functools.cache
def bases() -> tuple[Files, ...]:
    """Directories of weights: one file, and two with an index."""
    linear = next(c for c in CASES if c.name == "linear").make()
    one = _base(linear)
    state = load(one["model.safetensors"])
    half = len(state) // 2
    files = {"a.safetensors": dict(list(state.items())[:half]), "b.safetensors": dict(list(state.items())[half:])}
    index = {"metadata": {"total_size": 1}, "weight_map": {k: name for name, part in files.items() for k in part}}
    several: Files = {name: save(part) for name, part in files.items()}
    several |= {"model.safetensors.index.json": json.dumps(index).encode(), "config.json": one["config.json"]}
    return one, several


@functools.cache
def foreign() -> tuple[tuple[str, Files, Files], ...]:
    """Adapters of other programs: the file's name, the files, and those of the base."""
    torch.manual_seed(0)
    unet = nn.ModuleDict({"conv_in": nn.Conv2d(4, 8, 3), "mid_block": nn.ModuleDict({"to_q": nn.Linear(8, 12)})})
    base, d = _base(unet), torch.randn
    conv, mid = "lora_unet_conv_in", "lora_unet_mid_block_to_q"
    a, b = {f"{mid}.lora_down.weight": d(2, 8)}, {f"{mid}.lora_up.weight": d(12, 2), f"{mid}.alpha": torch.tensor(2.0)}
    decomposed = {
        f"{conv}.lora_down.weight": d(2, 4, 1, 1),
        f"{conv}.lora_mid.weight": d(2, 2, 3, 3),
        f"{conv}.lora_up.weight": d(8, 2, 1, 1),
    }
    loha = {f"{mid}.hada_w{i}_{s}": d(12, 2) if s == "a" else d(2, 8) for i in (1, 2) for s in "ab"}
    lokr = {f"{mid}.lokr_w1": d(3, 2), f"{mid}.lokr_w2_a": d(4, 2), f"{mid}.lokr_w2_b": d(2, 4)}
    kohya = [{**a, **b}, {**a, **b, **decomposed}, {**a, **b, f"{mid}.dora_scale": d(12, 1)}, loha, lokr]
    found = [("adapter.safetensors", {"adapter.safetensors": save(t)}, base) for t in kohya]
    return (*found, *_torchtune())


def _torchtune() -> list[tuple[str, Files, Files]]:
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
    projections = {"q_proj": (16, 16), "k_proj": (8, 16)}
    weights = {f"model.layers.0.self_attn.{n}.weight": torch.randn(s) for n, s in projections.items()}
    base: Files = {"model.safetensors": save(weights), "config.json": json.dumps(config).encode()}
    tensors: dict[str, Tensor] = {}
    for name, (out, cols) in projections.items():
        tensors[f"layers.0.attn.{name}.lora_a.weight"] = torch.randn(2, cols)
        tensors[f"layers.0.attn.{name}.lora_b.weight"] = torch.randn(out, 2)
    settings = json.dumps({"r": 2, "lora_alpha": 4}).encode()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("adapter_model.pt", "adapter_model.safetensors"):
            path = Path(folder) / name
            torch.save(tensors, path) if path.suffix == ".pt" else save_file(tensors, path)
            found.append((name, {name: path.read_bytes(), layout.CONFIG: settings}, base))
    return found
