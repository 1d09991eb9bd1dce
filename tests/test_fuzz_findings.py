"""What fuzzing has found, each by its smallest input: an error of ours that says what is wrong, in little memory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from storage_helpers import CONFIG, TENSORS, refused, rewrite, set_config, small, tensors_of, trained
from torch import nn

import peftkit
from benchmarks.fuzz.mutations import joined, parts
from benchmarks.fuzz.seeds import adapters
from benchmarks.fuzz.targets import lay
from peftkit import LoRAConfig, StorageError, VeRAConfig, storage
from peftkit.checkpoints import lowrank
from peftkit.checkpoints.files import open_checkpoint
from peftkit.checkpoints.inspection import inspect
from peftkit.checkpoints.verification import verify
from peftkit.storage import allowance

ROOT = Path(__file__).parents[1]
A = "base_model.model.0.lora_A.weight"


@pytest.fixture
def adapter(tmp_path) -> Path:
    peftkit.save(trained(small()), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def base(tmp_path) -> Path:
    (tmp_path / "base").mkdir()
    save_file(small().state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    return tmp_path / "base"


def lie(file: Path, **entries: object) -> None:
    """Put entries of no bytes into a header; what they say of themselves stays."""
    header, data = parts(file.read_bytes()) or ({}, b"")
    none = {"dtype": "F32", "data_offsets": [len(data)] * 2}
    file.write_bytes(joined(header | {k: {**none, "shape": v} for k, v in entries.items()}, data))


def own(folder: Path, **changes: object) -> None:
    """Change what peftkit keeps beside the tensors, and seal it anew."""
    header, data = parts((folder / TENSORS).read_bytes()) or ({}, b"")
    said = json.loads(header["__metadata__"]["peftkit"])
    for key, value in changes.items():
        said[key] = {**said[key], **value} if isinstance(value, dict) and isinstance(said[key], dict) else value
    header["__metadata__"]["peftkit"] = json.dumps(said)
    (folder / TENSORS).write_bytes(joined(header, data))


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(adapter, name, kind):
    (adapter / name).unlink()
    make = {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": Path.mkdir}
    make[kind](adapter / name)
    refused(
        adapter,
        name,
        "cannot be read: it is a directory" if kind == "folder" else "cannot be read: it is no regular file",
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_nor_in_a_checkpoint(base, name):
    (base / ("config.json" if name == "config.json" else "model.safetensors")).unlink()
    os.mkfifo(base / name)
    with pytest.raises(StorageError, match="no regular file|has no safetensors"):
        open_checkpoint(base)


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [2**62, 0], [0] * 65])
def test_a_tensor_of_nothing_with_an_endless_shape(adapter, base, shape):
    rewrite(adapter, tensors_of(adapter))
    lie(adapter / TENSORS, x=shape)
    refused(adapter, "x has")
    lie(base / "model.safetensors", x=shape)
    with pytest.raises(StorageError, match="x has"):
        open_checkpoint(base)


def test_half_a_pair_of_surrogates(adapter):
    rewrite(adapter, tensors_of(adapter))
    lie(adapter / TENSORS, **{"\ud800": [0]})
    refused(adapter, "surrogates").encode()
    set_config(adapter, peft_type="\ud800")
    refused(adapter, CONFIG, "surrogates").encode()


def test_a_tensor_without_dimensions_is_inspected(adapter):
    rewrite(adapter, {**tensors_of(adapter), "base_model.model.x": torch.tensor(3.0)})
    (part,) = (p for p in inspect(adapter).parts if not p.name)
    assert part.norm == 3.0 and part.parameters == 1


@pytest.mark.parametrize(
    "sample",
    [None, [], {"names": None}, {"names": ["0"]}, {"samples": []}, {"samples": "x"}, {"dtypes": "nn"}, {"dtypes": 3}],
    ids=str,
)
def test_a_sample_of_the_base_that_is_none(adapter, sample):
    own(adapter, base=sample)
    refused(adapter, "sample of the base's weights")


@pytest.mark.parametrize(
    "setting",
    [{"dtype": {"dtype": "nn"}}, {"targets": {"regex": "x", "flags": 10**12}}, {"dtype": {"dtype": 3}}],
    ids=str,
)
def test_a_setting_that_is_none(adapter, setting):
    own(adapter, config=setting)
    refused(adapter, CONFIG)


@pytest.mark.parametrize("seed", [{"items": []}, 2**64, 0.5, True], ids=str)
def test_a_seed_that_no_generator_takes(tmp_path, seed):
    model = small()
    peftkit.inject(model, VeRAConfig(r=2, targets="all-linear", save_projection=False))
    peftkit.save(model, tmp_path)
    own(tmp_path, config={"seed": seed})
    refused(tmp_path, "an integer that fits 64 bits")


def test_numbers_whose_change_cannot_be_decomposed():
    with pytest.raises(StorageError, match="no singular values that can be computed"):
        lowrank.of_matrix(torch.full((3, 3), float("inf")), 1)


@pytest.mark.parametrize("alpha", [10**400, float("inf"), float("nan"), True, None])
def test_an_alpha_that_is_no_number(tmp_path, base, alpha):
    torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 6)}, tmp_path / "adapter_0.pt")
    (tmp_path / CONFIG).write_text(json.dumps({"lora_alpha": alpha}))
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 2}))
    with pytest.raises(StorageError, match="lora_alpha"):
        peftkit.convert(tmp_path / "adapter_0.pt", tmp_path / "out", base=base)


@pytest.mark.parametrize("sites", [3, [3], "0", []])
def test_sites_that_are_no_names(adapter, sites):
    own(adapter, sites=sites)
    refused(adapter, "expected names of modules")


@pytest.mark.parametrize("r", [10**9, 10**12, 2**63, 10**30, {"items": [["^0", 10**10], ["^2", 2]]}], ids=str)
def test_a_rank_that_no_tensor_has(adapter, base, r):
    own(adapter, config={"r": r})
    refused(adapter, "far larger than all that the file holds")
    with pytest.raises(StorageError, match="far larger"):
        verify(adapter, base)


def test_a_rank_of_matrices_that_are_not_stored(tmp_path):
    model = small()
    peftkit.inject(model, VeRAConfig(r=2, targets="all-linear", save_projection=False))
    peftkit.save(model, tmp_path / "a")
    rewrite(tmp_path / "a", tensors_of(tmp_path / "a"))
    set_config(tmp_path / "a", r=10**9)
    refused(tmp_path / "a", "far larger than all that the file holds")


def test_no_rank_that_is_there_is_too_large(tmp_path, monkeypatch):
    """Even where nothing is granted beyond a multiple of what the file and the weights hold."""
    monkeypatch.setattr(allowance, "_ALWAYS", 0)
    for seed in adapters():
        lay(tmp_path / seed.name, seed.adapter)
        peftkit.load(copy.deepcopy(seed.model), tmp_path / seed.name, check_base=False)


def test_names_that_python_keeps_or_that_nest_without_end(adapter, base):
    weights = load_file(base / "model.safetensors")
    for key, says in (("__class__.weight", "two underscores"), ("a." * 3000 + "weight", "3000 dots")):
        save_file({**weights, key: torch.ones(2, 2)}, base / "model.safetensors")
        with pytest.raises(StorageError, match=says):
            verify(adapter, base)


@pytest.mark.parametrize("key", ["0.weight.weight", "0.bias.x", "0.weight.a.b"])
def test_a_tensor_with_tensors_in_it(adapter, base, key):
    save_file({**load_file(base / "model.safetensors"), key: torch.ones(2, 2)}, base / "model.safetensors")
    with pytest.raises(StorageError, match="is a tensor and has tensors in it"):
        verify(adapter, base)


@pytest.mark.parametrize("name", ["../x", "/x", "x/../x", "x\0", "x" * 300, "."], ids=lambda n: n[:8])
def test_an_index_that_names_no_file_beside_it(base, name):
    file = f"{name}.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"0.weight": file}}))
    (base / "model.safetensors").rename(base.parent / "x.safetensors")
    with pytest.raises(StorageError, match="is no safetensors file beside it|is not there"):
        open_checkpoint(base)


def test_weights_of_no_rows(tmp_path, base):
    model = nn.Sequential(nn.Conv2d(2, 4, 3))
    peftkit.save(trained(model, LoRAConfig(r=2, targets="0")), tmp_path / "a")
    save_file({"0.weight": torch.ones(0, 2, 3, 3)}, base / "model.safetensors")
    with pytest.raises(StorageError):
        verify(tmp_path / "a", base)


@pytest.mark.parametrize("kind", [[], {}, 3, None])
def test_a_model_type_that_is_no_text(adapter, base, kind):
    (base / "config.json").write_text(json.dumps({"model_type": kind}))
    assert verify(adapter, base).sites == ["0", "2"]


def test_a_base_that_is_named_by_a_list(adapter, tmp_path):
    set_config(adapter, base_model_name_or_path=[])
    peftkit.combine({adapter: 0.5}, tmp_path / "sum")
    assert storage.read(tmp_path / "sum").peft["base_model_name_or_path"] is None


@pytest.mark.parametrize("heads", [{}, 0, -1, True, "4", 0.5])
@pytest.mark.parametrize("which", ["num_attention_heads", "num_key_value_heads"])
def test_heads_that_are_no_number(tmp_path, base, heads, which):
    torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 6)}, tmp_path / "adapter_0.pt")
    config = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2, which: heads}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(StorageError, match=f"{which}=.*expected a number of heads"):
        peftkit.convert(tmp_path / "adapter_0.pt", tmp_path / "out", base=base, alpha=1.0)


@pytest.mark.parametrize("name", ["lora_down.weight", "alpha", "dora_scale", "lokr_w1", "hada_w1_a"])
@pytest.mark.parametrize(
    "t", [torch.tensor(1j), torch.ones(0, 2), torch.tensor(1.0)], ids=["complex", "none", "scalar"]
)
def test_tensors_of_kohya_that_are_no_matrices(tmp_path, base, name, t):
    whole = {"lora_unet_0.lora_down.weight": torch.ones(2, 6), "lora_unet_0.lora_up.weight": torch.ones(8, 2)}
    save_file({**whole, f"lora_unet_0.{name}": t}, tmp_path / "k.safetensors")
    if name == "alpha" and not t.is_complex() and t.numel():
        peftkit.convert(tmp_path / "k.safetensors", tmp_path / "out", base=base)
        return
    with pytest.raises(StorageError, match=f"which no {name} has"):
        peftkit.convert(tmp_path / "k.safetensors", tmp_path / "out", base=base)


# -- memory: of a process that may have little more than it has -----------------------------------------------------------

_BOMBS = """
import sys, zipfile
sys.path[:0] = [{root!r}, {tests!r}]
import json, torch
from pathlib import Path
from safetensors.torch import save_file
torch.set_num_threads(1)
import peftkit
from benchmarks.fuzz import targets
from peftkit.checkpoints.files import open_checkpoint
folder = Path({folder!r})
base = folder / "base"

def archive(packed):
    torch.save({{"layers.0.attn.q_proj.lora_a.weight": torch.zeros(1 << 22)}}, folder / "whole.pt")
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(folder / "whole.pt") as old, zipfile.ZipFile(folder / "packed.pt", "w", kind) as new:
        for part in old.namelist():
            new.writestr(part, old.read(part))
    (folder / "whole.pt").unlink()
    return folder / "packed.pt"

def views(t):
    torch.save({{"layers.0.attn.q_proj.lora_a.weight": t}}, folder / "views.pt")
    return folder / "views.pt"

def kernels():
    n = 1 << 17
    mid = {{"lora_down": torch.ones(1, n, 1, 1), "lora_mid": torch.ones(n, 1, 1, 1), "lora_up": torch.ones(8, n, 1, 1)}}
    save_file({{f"lora_unet_conv.{{k}}.weight": t for k, t in mid.items()}}, folder / "kernels.safetensors")
    return folder / "kernels.safetensors"

def text(name, raw):
    (folder / "read").mkdir(exist_ok=True)
    (folder / "read" / name).write_bytes(raw)

def header(raw):
    text("adapter_config.json", json.dumps({{"peft_type": "LORA"}}).encode())
    text("adapter_model.safetensors", len(raw).to_bytes(8, "little") + raw)

convert = lambda path: lambda: peftkit.convert(path, folder / "out", base=base, alpha=1.0)
read = lambda: peftkit.storage.read(folder / "read")
cases = [
    ("packed", 8, lambda: convert(archive(True))),
    ("does not hold", 8, lambda: convert(views(torch.zeros(1).expand(1 << 40)))),
    ("plain tensor", 8, lambda: convert(views(torch.empty(1 << 40, device="meta")))),
    ("plain tensor", 8, lambda: convert(views(torch.sparse_coo_tensor([[0], [0]], [1.0], (1 << 20, 1 << 20))))),
    ("does not fit", 8, lambda: convert(kernels())),
    ("expected a JSON object", 40, lambda: text("adapter_config.json", b"[" + b"{{}}," * (1 << 20) + b"0]") or read),
    ("no JSON object", 40, lambda: header(b"[" + b"[]," * (1 << 20) + b"0]") or read),
    ("cannot have a header", 8, lambda: header(b"") or text("adapter_model.safetensors", b"\\xff" * (8 << 20)) or read),
]
targets.limit_addresses()
for says, times, make in cases:
    run = make()
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    error, peak, seconds = targets._measured(run)
    print(says, type(error).__name__, peak, size)
    assert isinstance(error, peftkit.StorageError) and says in str(error), error
    assert peak <= times * size + (32 << 20), (says, peak, size)
    [p.unlink() for p in folder.rglob("*") if p.is_file() and p.parent != base]
"""


def test_files_that_unfold_to_far_more_than_they_are(tmp_path):
    (tmp_path / "base").mkdir()
    save_file({"conv.weight": torch.ones(8, 4, 1, 1)}, tmp_path / "base" / "model.safetensors")
    config = {"model_type": "llama", "num_attention_heads": 2}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    code = textwrap.dedent(_BOMBS).format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr


def test_an_archive_that_torch_writes_is_not_packed(tmp_path):
    torch.save({"a": torch.ones(100, 100)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert sum(i.file_size for i in archive.infolist()) <= (tmp_path / "a.pt").stat().st_size
