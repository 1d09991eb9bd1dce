"""How two stored adapters differ, against their changes in fp64; and two checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from arithmetic_helpers import changes, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from storage_helpers import rewrite, set_config, small, tensors_of
from storage_models import Attending, bert, conv, gpt2
from torch import nn

import peftkit
from peftkit import DoRAConfig, IA3Config, LoRAConfig, StorageError, VeRAConfig
from peftkit.checkpoints import blockwise


@settings(max_examples=8, deadline=None)
@given(
    r=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    alpha=st.floats(0.1, 30),
    stabilized=st.booleans(),
    seeds=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_distance_and_cosine_are_those_of_the_changes(r, alpha, stabilized, seeds, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("difference"), small()
    a = saved(model, folder / "a", LoRAConfig(r=r[0], alpha=alpha, targets="all-linear"), seed=seeds[0])
    b = saved(model, folder / "b", LoRAConfig(r=r[1], rank_stabilized=stabilized, targets="all-linear"), seed=seeds[1])
    found = peftkit.difference(a, b)
    one, other = changes(model, a), changes(model, b)
    assert [c.name for c in found.common] == ["0", "2"] and not found.only_a and not found.only_b and not found.bases
    for c in found.common:
        x, y = one[f"{c.name}.weight"], other[f"{c.name}.weight"]
        assert c.distance == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-9, abs=1e-9)
        assert c.cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-9)
        assert math.isnan(c.largest)


@pytest.mark.parametrize(
    ("make", "targets"), [(conv, ["0", "2"]), (Attending, ["attn", "table"]), (gpt2, ["c_attn", "wte"])]
)
def test_on_every_kind_of_module(make, targets, tmp_path):
    model = make()
    a = saved(model, tmp_path / "a", LoRAConfig(r=2, targets=targets))
    b = saved(model, tmp_path / "b", LoRAConfig(r=4, alpha=3, targets=targets), seed=2)
    one, other = changes(model, a), changes(model, b)
    found = peftkit.difference(a, b)
    assert len(found.common) == len(one)
    for c in found.common:
        (name,) = (
            n for n in one if n.startswith(c.name) or (n.endswith("in_proj_weight") and c.name.endswith("in_proj"))
        )
        assert c.distance == pytest.approx(float((one[name] - other[name]).norm() / one[name].norm()), rel=1e-9)


def test_the_same_is_the_same(tmp_path):
    """To the bit where the numbers are, and to rounding where other factors make the same change."""
    model = small()
    a = saved(model, tmp_path / "a", LoRAConfig(r=2, alpha=3, targets="all-linear"))
    found = peftkit.difference(a, a)
    assert found.same and all(c.distance == 0 and c.cosine == 1 for c in found.common)
    assert str(found) == "2 of 2 sites and tensors in common are the same"
    peftkit.combine([(a, 1.0)], tmp_path / "b", how="svd", r=2)
    found = peftkit.difference(a, tmp_path / "b")
    assert not found.same and all(0 < c.distance < 1e-6 and c.cosine > 1 - 1e-12 for c in found.common)
    assert found.settings == {"lora_alpha": (3, 2)}
    peftkit.combine([(a, 3.0)], tmp_path / "c")  # the same factors, of another alpha
    assert all(c.distance == pytest.approx(2) for c in peftkit.difference(a, tmp_path / "c").common)


def test_what_else_differs(tmp_path):
    model = bert()
    a = saved(model, tmp_path / "a", LoRAConfig(r=2, targets=["query", "key"], also_train=["classifier"]))
    b = saved(
        model, tmp_path / "b", LoRAConfig(r=2, targets=["query", "value"], also_train=["classifier"], dropout=0.1)
    )
    found = peftkit.difference(a, b)
    assert found.settings["lora_dropout"] == (0.0, 0.1) and found.settings["target_modules"]
    assert set(found.settings) == {"lora_dropout", "target_modules"}
    assert {n.rpartition(".")[2] for n in found.only_a} == {"key"} and len(found.only_b) == 2
    heads = {c.name: c for c in found.common if "classifier" in c.name}
    before, after = tensors_of(a), tensors_of(b)
    for name, c in heads.items():
        x, y = before[f"base_model.model.{name}"], after[f"base_model.model.{name}"]
        assert c.largest == pytest.approx(float((x - y).abs().max()))
    assert len(heads) == 2
    text = str(found)
    assert "lora_dropout" in text and f"2 in {a} alone" in text.replace("\n", "")


def test_another_base(tmp_path):
    a = saved(small(0), tmp_path / "a", LoRAConfig(r=1, targets="0"))
    b = saved(small(1), tmp_path / "b", LoRAConfig(r=1, targets="0"))
    found = peftkit.difference(a, b)
    assert list(found.bases) == ["0"] and not found.same and "different bases" in found.summary()


def test_a_model_of_another_size(tmp_path):
    a = saved(small(), tmp_path / "a", LoRAConfig(r=1, targets="0"))
    b = saved(nn.Sequential(nn.Linear(6, 9)), tmp_path / "b", LoRAConfig(r=1, targets="0"))
    (c,) = peftkit.difference(a, b).common
    assert math.isnan(c.distance) and not c.same


def test_other_methods_by_their_tensors(tmp_path):
    model = small()
    a = saved(model, tmp_path / "a", IA3Config(targets="0"))
    b = saved(model, tmp_path / "b", IA3Config(targets="0"), seed=2)
    (c,) = peftkit.difference(a, b).common
    x, y = (next(iter(tensors_of(p).values())).double() for p in (a, b))
    assert c.name == "0.ia3_l" and c.largest == pytest.approx(float((x - y).abs().max()))
    assert c.distance == pytest.approx(float((x - y).norm() / x.norm()))
    d = saved(model, tmp_path / "d", DoRAConfig(r=2, targets="0"))
    e = saved(model, tmp_path / "e", LoRAConfig(r=2, targets="0"))
    found = peftkit.difference(d, e)
    assert [n for n in found.only_a if "magnitude" in n] and found.settings["use_dora"] == (True, False)
    v = saved(model, tmp_path / "v", VeRAConfig(r=2, targets="0"))
    assert len(peftkit.difference(v, v).common) == 4 and peftkit.difference(v, v).same


def test_files_of_others(tmp_path):
    """Without our metadata, and with fields spelt out that others leave away."""
    model = small()
    a = saved(model, tmp_path / "a", LoRAConfig(r=2, targets="all-linear"))
    b = Path(shutil.copytree(a, tmp_path / "b"))
    rewrite(b, tensors_of(b))
    set_config(b, lora_bias=False, megatron_config=None, peft_version="0.0", exclude_modules=[])
    assert peftkit.difference(a, b).same


# -- checkpoints ---------------------------------------------------------------------------------------------------------


def written(path: Path, **tensors: torch.Tensor) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return path


def test_checkpoints(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    y = x.clone()
    y[1, 2] += 0.5
    a = written(tmp_path / "a", w=x, same=torch.ones(3), gone=x.clone(), ids=torch.arange(4), z=torch.zeros(2))
    b = written(tmp_path / "b", w=y, same=torch.ones(3).bfloat16(), new=x, ids=torch.arange(4), z=torch.ones(2))
    found = peftkit.difference(a, b)
    assert (found.kind, found.only_a, found.only_b) == ("checkpoints", ["gone"], ["new"])
    by_name = {c.name: c for c in found.common}
    assert by_name["w"].largest == 0.5 and by_name["w"].distance == pytest.approx(0.5 / float(x.norm()))
    assert by_name["ids"].same and by_name["z"].distance == math.inf
    same = by_name["same"]  # in its numbers alone
    assert not same.same and same.distance == same.largest == 0 and same.dtypes == ("float32", "bfloat16")
    assert "1 of 4 tensors in common are the same" in str(found) and "float32 → bfloat16" in str(found)
    assert "float32 → float32" not in str(found) and "gone" in str(found)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["common"][-1]["distance"] is None and plain["only_a"] == ["gone"] and not plain["same"]


def test_numbers_that_are_not_finite(tmp_path):
    """Equal where their bits are, and nothing that hides a difference."""
    x = torch.tensor([1.0, math.nan, math.inf, -2.0])
    y, z = x.clone(), x.clone()
    y[0], z[1] = 5, 3
    tensors = {
        **{name: x.clone() for name in ("same", "beside", "there")},
        "big": torch.tensor([1e200, 1.0], dtype=torch.float64),
    }
    a = written(tmp_path / "a", **tensors, small=torch.zeros(2).double(), long=torch.tensor([2**53]))
    changed = {"beside": y, "there": z, "big": tensors["big"] + torch.tensor([0.0, 1.0])}
    tiny = torch.tensor([0.0, 1e-200], dtype=torch.float64)
    b = written(tmp_path / "b", **{**tensors, **changed}, small=tiny, long=torch.tensor([2**53 + 1]))
    assert peftkit.difference(a, a).same and all(c.largest == c.distance == 0 for c in peftkit.difference(a, a).common)
    found = peftkit.difference(a, b)
    assert [c.name for c in found.common if c.same] == ["same"]
    by_name = {c.name: c for c in found.common}
    assert all(math.isnan(by_name[name].largest) and math.isnan(by_name[name].distance) for name in ("beside", "there"))
    assert by_name["big"].largest == 1 and by_name["small"].largest == 1e-200
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {c["name"]: c["largest"] for c in plain["common"]}["there"] is None


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 5), cols=st.integers(0, 7), block=st.integers(1, 9), turned=st.booleans())
def test_sums_by_blocks(rows, cols, block, turned):
    torch.manual_seed(rows)
    a, b = torch.randn(2, rows, cols, dtype=torch.float64)
    a, b = (a.mT, b.mT.clone()) if turned else (a, b)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blockwise, "_BLOCK", block)
        found, norm = blockwise.compared(a, b), blockwise.square_norm(a)
    expected = (a - b).square().sum(), a.square().sum(), b.square().sum(), (a * b).sum()
    assert found[:4] == pytest.approx(tuple(map(float, expected))) and norm == pytest.approx(float(expected[1]))
    assert found.largest == max([0.0, *(a - b).abs().flatten().tolist()]) and found.equal == (not a.numel())


def test_mistakes_are_named(tmp_path):
    a = saved(small(), tmp_path / "a", LoRAConfig(r=1, targets="0"))
    b = written(tmp_path / "b", w=torch.ones(2))
    for pair in ((a, b), (b, a)):
        with pytest.raises(ValueError, match=r"a is an adapter, and .*b is none"):
            peftkit.difference(*pair)
    with pytest.raises(StorageError, match="not there"):
        peftkit.difference(b, tmp_path / "nowhere")
    assert load_file(b / "model.safetensors").keys() == {"w"}
