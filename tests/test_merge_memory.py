"""A merge takes a few tensors' memory, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killing import ROOT
from safetensors.torch import save_file
from torch import nn

import peftkit
from peftkit import DoRAConfig, LoHaConfig, LoRAConfig

SIDE, LAYERS = 1536, 16  # 9.4 MB each in fp32, 151 MB in all

CODE = """
import sys
sys.path.insert(0, {root!r})
import torch, peftkit
torch.set_num_threads(1)
def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024
one = torch.randn(64, 64); one @ one; torch.addmm(one, one, one)  # what a first product loads
peftkit.merge_checkpoint({small!r}, {small_adapter!r}, {out!r} + "-small")
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
peftkit.merge_checkpoint({base!r}, {adapters!r}, {out!r}, dtype={dtype})
print(status("VmHWM") - before)
"""


def checkpoint(folder: Path, side: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(layers)))
    folder.mkdir()
    where = {}
    for i, layer in enumerate(model):
        name = f"model-{i // 4 + 1:05}-of-{(layers + 3) // 4:05}.safetensors"
        where[f"{i}.weight"] = name
        if i % 4 == 3 or i == layers - 1:
            names = [k for k, v in where.items() if v == name]
            save_file({k: model.get_parameter(k).detach() for k in names}, folder / name)
        del layer
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return model


@pytest.mark.parametrize(
    ("config", "dtype", "weight"),
    [
        (LoRAConfig(r=4, targets="all-linear"), "torch.bfloat16", 1),
        (LoHaConfig(r=4, targets="all-linear"), "None", 0.5),
        (DoRAConfig(r=4, targets="all-linear"), "None", 0.5),
    ],
    ids=["lora to bf16", "loha, weighted", "dora, weighted"],
)
def test_it_is_bounded_by_the_largest_tensor(tmp_path, config, dtype, weight):
    for name, side, layers in (("small", 32, 2), ("base", SIDE, LAYERS)):
        model = checkpoint(tmp_path / name, side, layers)
        peftkit.inject(model, config)
        peftkit.save(model, tmp_path / f"{name}-adapter")
    own = sum(f.stat().st_size for f in (tmp_path / "base-adapter").iterdir())
    paths = {
        "root": str(ROOT), "base": str(tmp_path / "base"), "out": str(tmp_path / "out"),
        "small": str(tmp_path / "small"), "small_adapter": str(tmp_path / "small-adapter"),
        "adapters": [(str(tmp_path / "base-adapter"), weight)],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(**paths, dtype=dtype)], capture_output=True, text=True, check=True
    )
    tensor = SIDE * SIDE * 4
    assert tensor < int(done.stdout) < 8 * tensor + 4 * own, f"{int(done.stdout) / tensor:.2f} tensors"
