"""A LoRA from the difference of two checkpoints: against singular values of the difference, and in the model."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from storage_helpers import config_of, folder_bytes, llama, moved, peft_model, tensors_of
from storage_models import Attending, bert, call, close, gpt2
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig, StorageError, TargetError


def written(model: nn.Module, path: Path, **kwargs: Any) -> Path:
    """As transformers writes it, or as one file."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(path, **kwargs)  # type: ignore[operator]
    else:
        path.mkdir()
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path / "model.safetensors")
    return path


def tuned(model: nn.Module, targets: Any, r: int = 3) -> nn.Module:
    """A copy whose targets have a change of rank r."""
    model = copy.deepcopy(model)
    peftkit.inject(model, LoRAConfig(r=r, targets=targets))
    moved(model, peftkit.parameters(model))
    peftkit.merge(model, keep_base=False)
    return model


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (llama, "all-linear"),
        (gpt2, ["c_attn", "mlp.c_proj"]),
        (bert, "all-linear"),
        (Attending, ["attn", "out"]),
    ],
)
def test_a_change_of_that_rank_is_found_whole(make, targets, tmp_path):
    base = make()
    other = tuned(base, targets)
    one, two = written(base, tmp_path / "base"), written(other, tmp_path / "tuned")
    if make is not Attending:
        written(other, two, max_shard_size="20KB")
        assert len(list(two.glob("*.safetensors"))) > 1
        (two / "model.safetensors").unlink()
    report = peftkit.extract(one, two, tmp_path / "out", r=3, targets=targets)
    assert report.kept > 1 - 1e-10 and not report.left_out and not report.unchanged
    loaded = copy.deepcopy(base)
    assert set(peftkit.load(loaded, report.path).sites) == {s.site for s in report.sites}
    assert (call(other) - call(base)).abs().max() > 1e-2
    assert close(call(loaded), call(other), 8)
    assert close(call(peft_model(copy.deepcopy(base), tmp_path / "out")), call(other), 8)
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == str(one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("r", [1, 5, 16, {"*": 2, "down_proj": 4}])
def test_what_is_kept_is_what_singular_values_say(dtype, r, tmp_path):
    base, other = llama(layers=1).to(dtype), llama(seed=1, layers=1).to(dtype)
    one, two = written(base, tmp_path / "base"), written(other, tmp_path / "tuned")
    report = peftkit.extract(one, two, tmp_path / "out", r=r)
    before, after, out = base.state_dict(), other.state_dict(), tensors_of(tmp_path / "out")
    assert {t.dtype for t in out.values()} == {torch.promote_types(dtype, torch.float32)}
    assert len(report.sites) == 7
    for site in report.sites:
        d = after[f"{site.site}.weight"].double() - before[f"{site.site}.weight"].double()
        rank = r if isinstance(r, int) else r["down_proj" if "down_proj" in site.site else "*"]
        rank = min(rank, *d.shape)
        sigma = torch.linalg.svdvals(d)
        a, b = (out[f"base_model.model.{site.site}.lora_{x}.weight"].double() for x in "AB")
        assert site.r == rank == len(a)
        assert float((d - b @ a).norm()) == pytest.approx(float(sigma[rank:].norm()), rel=1e-4, abs=1e-5)
        assert site.kept == pytest.approx(1 - float(sigma[rank:].square().sum() / sigma.square().sum()), abs=1e-5)
    assert {t.tensor for t in report.left_out} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert "2 tensors differ and are not in the adapter: " in report.summary()
    assert json.loads(json.dumps(report.to_dict()))["sites"][0]["kept"] == report.sites[0].kept


def test_the_randomised_way_is_near_and_says_how_near(tmp_path):
    base, other = llama(layers=1, hidden=64), llama(seed=1, layers=1, hidden=64)
    one, two = written(base, tmp_path / "base"), written(other, tmp_path / "tuned")
    exact = peftkit.extract(one, two, tmp_path / "out", r=4)
    near = peftkit.extract(one, two, tmp_path / "near", r=4, iterations=6)
    out = tensors_of(tmp_path / "near")
    for best, site in zip(exact.sites, near.sites, strict=True):
        d = other.state_dict()[f"{site.site}.weight"] - base.state_dict()[f"{site.site}.weight"]
        a, b = (out[f"base_model.model.{site.site}.lora_{x}.weight"] for x in "AB")
        assert site.lost == pytest.approx(float((d - b @ a).square().sum()), rel=1e-4)
        assert best.lost * (1 - 1e-6) <= site.lost <= best.lost * 1.02


def test_what_lies_outside_is_kept_whole_or_said(tmp_path):
    base = bert()
    other = tuned(base, "attention.self.query")
    with torch.no_grad():
        other.bert.encoder.layer[1].attention.self.query.bias.add_(0.5)  # of a target
        other.bert.embeddings.LayerNorm.weight.mul_(1.5)
        other.classifier.bias.sub_(0.25)
    one, two = written(base, tmp_path / "base"), written(other, tmp_path / "tuned")
    report = peftkit.extract(one, two, tmp_path / "out", r=3, targets="query")
    query = "bert.encoder.layer.1.attention.self.query.bias"
    assert {t.tensor: t.largest for t in report.left_out} == {
        query: pytest.approx(0.5, rel=1e-5),
        "bert.embeddings.LayerNorm.weight": pytest.approx(0.5, rel=1e-5),
        "classifier.bias": pytest.approx(0.25, rel=1e-5),
    }
    kept = peftkit.extract(one, two, tmp_path / "whole", r=3, targets="query", also_train=["LayerNorm", "classifier"])
    assert [t.tensor for t in kept.left_out] == [query]
    loaded = copy.deepcopy(base)
    peftkit.load(loaded, tmp_path / "whole")
    with torch.no_grad():
        loaded.bert.encoder.layer[1].attention.self.query.bias.add_(0.5)
    assert close(call(loaded), call(other), 8)


def test_what_lies_outside_and_is_not_finite(tmp_path):
    base = nn.Sequential(nn.Linear(3, 4))
    one, two = written(base, tmp_path / "base"), written(tuned(base, "0", r=1), tmp_path / "tuned")
    _change(one, **{"0.bias": torch.tensor([0.0, 0.0, math.nan, 0.0])})
    _change(two, **{"0.bias": torch.tensor([0.0, math.nan, math.nan, 0.5])})
    (left,) = (report := peftkit.extract(one, two, tmp_path / "out", r=1)).left_out
    assert math.isnan(left.largest) and math.isnan(left.whole)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["left_out"] == [{"tensor": "0.bias", "largest": None, "whole": None}]
    _change(two, **{"0.bias": torch.tensor([0.0, 0.0, math.nan, 0.0])})
    assert not peftkit.extract(one, two, tmp_path / "out", r=1).left_out


def test_a_new_head(tmp_path):
    base, other = bert(labels=3), tuned(bert(labels=5), "query")
    one, two = written(base.bert, tmp_path / "base"), written(other.bert, tmp_path / "tuned")
    more = {**load_file(two / "model.safetensors"), "head.weight": torch.ones(5, 16), "head.bias": torch.ones(5)}
    save_file(more, two / "model.safetensors")
    with pytest.raises(
        StorageError, match=r"the base, .* has no head\.(bias|weight).*also_train='head' stores it whole"
    ):
        peftkit.extract(one, two, tmp_path / "out", r=3)
    assert not (tmp_path / "out").exists()
    peftkit.extract(one, two, tmp_path / "out", r=3, also_train="head")
    assert torch.equal(tensors_of(tmp_path / "out")["base_model.model.head.weight"], torch.ones(5, 16))
    report = peftkit.extract(one, two, tmp_path / "bare", r=3, ignore="head", targets="query")
    assert not report.left_out and not any("head" in k for k in tensors_of(tmp_path / "bare"))


def test_targets_that_do_not_differ(tmp_path):
    base = llama()
    one, two = written(base, tmp_path / "base"), written(tuned(base, "q_proj"), tmp_path / "tuned")
    report = peftkit.extract(one, two, tmp_path / "out", r=3)
    assert [s.site for s in report.sites] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert len(report.unchanged) == 12
    with pytest.raises(ValueError, match="do not differ at any of 2 targets"):
        peftkit.extract(one, two, tmp_path / "none", r=3, targets="k_proj")


def test_on_its_base_alone(tmp_path):
    base = llama()
    one, two = written(base, tmp_path / "base"), written(tuned(base, "q_proj"), tmp_path / "tuned")
    peftkit.extract(one, two, tmp_path / "out", r=3)
    with pytest.raises(StorageError, match="another base"):
        peftkit.load(llama(seed=1), tmp_path / "out")


class Named(nn.Module):
    """A Linear and embeddings of names that say nothing, or too much."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.x_embedder = nn.Linear(6, 8)
        self.e, self.embed = nn.Embedding(7, 8), nn.Embedding(5, 8)
        self.convolution = nn.Conv1d(8, 8, 3, groups=4)


def test_what_is_an_embedding_may_be_said(tmp_path):
    base = Named()
    other = tuned(base, ["x_embedder", "e", "embed"])
    one, two = written(base, tmp_path / "base"), written(other, tmp_path / "tuned")

    def found(*targets: str, **kwargs: Any) -> nn.Module:
        peftkit.extract(one, two, tmp_path / "out", r=3, targets=targets, **kwargs)
        peftkit.load(loaded := copy.deepcopy(base), tmp_path / "out")
        peftkit.merge(loaded, keep_base=False)
        return loaded

    for names, kwargs in (
        (["x_embedder", "embed"], {}),
        (["x_embedder", "e", "embed"], {"embeddings": ["e", "embed"]}),
        (["x_embedder"], {"embeddings": ()}),
        (["e"], {"embeddings": "e"}),
    ):
        loaded = found(*names, **kwargs)
        for name in names:
            weights = (model.get_submodule(name).weight for model in (loaded, other, base))
            ours, expected, before = weights
            assert torch.allclose(ours, expected, atol=1e-5) and not torch.allclose(before, expected, atol=1e-2)
    for name, kwargs, missing in (
        ("e", {}, "lora_embedding_A"),
        ("x_embedder", {"embeddings": "x_embedder"}, r"lora_A\.weight"),
    ):
        with pytest.raises(StorageError, match=rf"missing base_model\.model\.{name}\.{missing}"):
            found(name, **kwargs)
    with pytest.raises(TargetError, match="embeddings: 'tok' matches no module"):
        found("e", embeddings="tok")


def test_a_grouped_convolution_is_refused_when_loaded(tmp_path):
    base = Named()
    one, two = written(base, tmp_path / "base"), written(tuned(base, ["convolution"], r=4), tmp_path / "tuned")
    peftkit.extract(one, two, tmp_path / "out", r=4, targets="convolution")
    with pytest.raises(StorageError, match=r"convolution\.lora_A\.weight has shape \(4, 2, 3\), expected \(4, 8, 3\)"):
        peftkit.load(base, tmp_path / "out")


def _change(path: Path, **tensors: Tensor | None) -> None:
    found = {**load_file(path / "model.safetensors"), **tensors}
    save_file({k: t for k, t in found.items() if t is not None}, path / "model.safetensors")


@pytest.mark.parametrize(
    ("error", "words", "tensors", "kwargs"),
    [
        (StorageError, r"tuned.*has no 0\.weight", {"0.weight": None}, {}),
        (StorageError, r"0\.weight is \(8, 6\) in .*and \(8, 7\)", {"0.weight": torch.ones(8, 7)}, {}),
        (StorageError, r"0\.weight: .* no finite difference", {"0.weight": torch.full((8, 6), torch.nan)}, {}),
        (StorageError, r"0\.weight is packed torch.int8", {"0.weight": torch.ones(8, 6, dtype=torch.int8)}, {}),
        (TargetError, "did you mean", {}, {"targets": "00"}),
        (TargetError, "also_train: 'none' matches no module", {}, {"also_train": "none"}),
        (TargetError, "ignore: 'none' matches no module", {}, {"ignore": "none"}),
        (TargetError, "exclude='2'", {"2.weight": torch.ones(6, 8)}, {"also_train": "2", "targets": ["0", "2"]}),
        (ValueError, "at least 1", {}, {"r": 0}),
        (ValueError, "iterations", {}, {"iterations": -1}),
        (ValueError, "matches none", {}, {"r": {"*": 1, "nothing": 2}}),
    ],
)
def test_mistakes_are_named(error, words, tensors, kwargs, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    one, two = written(base, tmp_path / "base"), written(tuned(base, ["0", "2"]), tmp_path / "tuned")
    _change(two, **tensors)
    before = folder_bytes(tmp_path)
    with pytest.raises(error, match=words):
        peftkit.extract(one, two, tmp_path / "out", **{"r": 2, "targets": ["0", "2"], **kwargs})
    assert folder_bytes(tmp_path) == before


PEAK = """
import re, sys
from pathlib import Path
import torch, peftkit
from peftkit.checkpoints import lowrank
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
torch.set_num_threads(1)
torch.linalg.svd(torch.randn(8, 8)); lowrank.of_matrix(torch.randn(32, 32), 2, iterations=1)
before = peak()
peftkit.extract(*sys.argv[1:4], r=4, targets="all-linear", iterations=eval(sys.argv[4]))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("iterations", "size", "layers", "times"), [(None, 512, 12, 24), (1, 768, 24, 16)])
def test_memory_is_a_few_times_the_largest_matrix(iterations, size, layers, times, tmp_path):
    """However many there are: here both checkpoints together are as large as `layers` matrices in fp32."""
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        torch.manual_seed(len(name))
        save_file(
            {f"h.{i}.fc.weight": torch.randn(size, size).bfloat16() for i in range(layers)},
            tmp_path / name / "model.safetensors",
        )
    arguments = [*(str(tmp_path / name) for name in ("base", "tuned", "out")), repr(iterations)]
    out = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
    assert int(out.stdout) < times * 4 * size * size, int(out.stdout) / (4 * size * size)
