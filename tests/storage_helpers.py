"""Models and measures that the storage tests share."""

from __future__ import annotations

import copy
import json
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig, StorageError

CONFIG, TENSORS, README = "adapter_config.json", "adapter_model.safetensors", "README.md"


def llama(seed: int = 0, layers: int = 2, hidden: int = 16, **kwargs: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, **kwargs,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def small(seed: int = 0) -> nn.Sequential:
    """A model that takes a millisecond; biases and all, no zeros."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).eval()


def tabled(seed: int = 0) -> nn.Sequential:
    """The same behind an embedding."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).eval()


def trained(model: nn.Module, config: LoRAConfig | None = None, *, name: str = "default", seed: int = 1) -> nn.Module:
    """`model` with an adapter whose every parameter was moved."""
    peftkit.inject(model, config or LoRAConfig(r=2, alpha=6, targets="all-linear"), name=name)
    return moved(model, peftkit.parameters(model, name), seed)


def moved(model: nn.Module, parameters: Any, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn(p.shape, generator=generator).to(p.dtype))
            p.view(-1)[-1] = -0.0  # equal to 0, but not its bits
    return model


def adapter_bits(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of every adapter, by path."""
    marker = ".peftkit."
    found = {k: v for k, v in model.state_dict().items() if marker in f".{k}"}
    return {k: v.detach().clone() for k, v in found.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Same keys, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(bits(a[k]), bits(b[k])) for k in a
    )


def bits(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All that a failed load must leave alone."""
    return (
        [(n, type(m), m.training) for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()],
        {k: bits(v).clone() for k, v in model.state_dict().items()},
        tuple(peftkit.adapters(model)),
        peftkit.active(model),
    )


def unchanged(before: tuple[Any, ...], model: nn.Module) -> bool:
    after = snapshot(model)
    return (
        before[:2] == after[:2]
        and before[3:] == after[3:]
        and before[2].keys() == after[2].keys()
        and all(torch.equal(before[2][k], after[2][k]) for k in before[2])
    )


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / TENSORS, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a mapping


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """As another program would write it: without our metadata."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / TENSORS, {"format": "pt"})


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def set_config(folder: Path, **changes: Any) -> None:
    (folder / CONFIG).write_text(json.dumps({**config_of(folder), **changes}, indent=2, sort_keys=True))


def header_length(file: Path) -> int:
    return struct.unpack("<Q", file.read_bytes()[:8])[0]


def peft_model(base: nn.Module, folder: Path, **kwargs: Any) -> nn.Module:
    """What peft reads; a warning that keys are missing or unused is an error."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return PeftModel.from_pretrained(base, folder, **kwargs).eval()


def refused(folder: str | Path, *words: str, model: nn.Module | None = None, **kwargs: Any) -> str:
    """Loading raises, says `words`, and leaves the model as it was: bare, and with another adapter on it."""
    message = ""
    for attached in (False, True):
        used = copy.deepcopy(model) if model is not None else small()
        if attached:
            peftkit.inject(used, LoRAConfig(r=1, targets="all-linear"), name="other")
        before = snapshot(used)
        with pytest.raises(StorageError) as caught:
            peftkit.load(used, folder, **kwargs)
        assert unchanged(before, used)
        message = str(caught.value)
        for word in words:
            assert word in message, message
    return message
