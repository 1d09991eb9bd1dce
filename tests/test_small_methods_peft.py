"""peft 0.21 reads what we write of (IA)³, VeRA, LoHa and LoKr, and we read what it wrote, with equal outputs.

What peft cannot do is not here: LoHa and LoKr on transformers' Conv1D (GPT-2) and on Conv3d, VeRA on convolutions,
(IA)³ on nn.Conv1d, any of them on nn.MultiheadAttention; and it has no BitFit.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_helpers import config_of, llama, moved, peft_model, refused, rewrite, set_config, tensors_of, trained
from storage_models import bert, call, close, conv, gpt2, t5
from torch import nn

import peftkit
from peftkit import IA3Config, LoHaConfig, LoKrConfig, StorageError, VeRAConfig
from peftkit.methods.lokr import factorization

peft = pytest.importorskip("peft")

MODELS = {"llama": llama, "llama-bf16": lambda: llama().bfloat16(), "bert": bert, "gpt2": gpt2, "t5": t5, "conv": conv}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "output.dense"], "gpt2": ["c_attn", "mlp.c_proj"],
           "t5": ["q", "v", "wo"], "conv": ["0", "2"]}  # fmt: skip
INWARD = {"llama": "down_proj", "bert": "output.dense", "gpt2": "mlp.c_proj", "t5": "wo", "conv": "2"}
# ours; peft's type and fields
METHODS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "ia3": (IA3Config(), "IA3Config", {}),
    "vera": (VeRAConfig(r=4, seed=3), "VeraConfig", {"r": 4, "projection_prng_key": 3}),
    "vera-seed": (VeRAConfig(r=4, save_projection=False), "VeraConfig", {"r": 4, "save_projection": False}),
    "loha": (LoHaConfig(r=2, alpha=5), "LoHaConfig", {"r": 2, "alpha": 5}),
    "loha-dense": (LoHaConfig(r=6, alpha=5), "LoHaConfig", {"r": 6, "alpha": 5, "init_weights": False}),
    "lokr": (LoKrConfig(r=1, alpha=5), "LoKrConfig", {"r": 1, "alpha": 5}),
    "lokr-both": (LoKrConfig(r=1, factor=4, decompose_both=True), "LoKrConfig",
                  {"r": 1, "alpha": 1, "decompose_factor": 4, "decompose_both": True}),
    "lokr-lycoris": (LoKrConfig(r=2, alpha=3, init="lycoris"), "LoKrConfig",
                     {"r": 2, "alpha": 3, "init_weights": "lycoris"}),
}  # fmt: skip
PAIRS = [
    (method, model)
    for method in METHODS
    for model in MODELS
    if not (model == "gpt2" and method[:4] in ("loha", "lokr")) and not (model == "conv" and method[:4] == "vera")
]


def made_by_peft(model: str, method: str, folder: Path, **more: Any) -> nn.Module:
    """A peft model that was trained a little and saved to `folder`."""
    _, kind, fields = METHODS[method]
    name = model.partition("-")[0]
    fields = {"target_modules": TARGETS[name], **fields, **more}
    if method == "ia3":
        fields |= {"feedforward_modules": [INWARD[name]]}
    if name == "gpt2":
        fields |= {"fan_in_fan_out": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(MODELS[model](), getattr(peft, kind)(**fields)).eval()
        moved(theirs, [p for p in theirs.parameters() if p.requires_grad])
        theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_load_reads_what_peft_wrote(method, model, tmp_path):
    theirs = made_by_peft(model, method, tmp_path / "a")
    mine = MODELS[model]()
    peftkit.load(mine, tmp_path / "a")
    assert not torch.equal(call(mine), call(MODELS[model]()))
    assert close(call(mine), call(theirs), 4)
    peftkit.save(mine, tmp_path / "b")
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_peft_reads_what_save_writes(method, model, tmp_path):
    config, name = METHODS[method][0], model.partition("-")[0]
    config = dataclasses.replace(config, targets=TARGETS[name])
    if method == "ia3":
        config = dataclasses.replace(config, feedforward=INWARD[name])
    mine = trained(MODELS[model](), config)
    assert not torch.equal(call(mine), call(MODELS[model]()))
    peftkit.save(mine, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*PRNG.*|.*unknown.*")
        theirs = peft_model(MODELS[model](), tmp_path / "a")
    assert close(call(theirs), call(mine), 4)


@pytest.mark.parametrize("method", METHODS)
def test_every_field_we_write_is_one_that_peft_knows(method, tmp_path):
    config, kind, _ = METHODS[method]
    mine = trained(llama(), config)
    peftkit.save(mine, tmp_path / "a")
    written = config_of(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*vera_A and vera_B.*")  # of the seed
        read = getattr(peft, kind).from_pretrained(tmp_path / "a")
    read.save_pretrained(tmp_path / "b")
    theirs = config_of(tmp_path / "b")
    for key, value in written.items():
        if isinstance(value, list):
            assert sorted(theirs[key]) == sorted(value), key
        else:
            assert theirs[key] == value, key
    rewritten = {**theirs, "base_model_name_or_path": "elsewhere"}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(rewritten))
    other = llama()
    peftkit.load(other, tmp_path / "a")
    assert torch.equal(call(other), call(mine))


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_ranks_and_alphas_by_pattern(method, tmp_path):
    more = {
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 3, "v_proj": 1},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 7},
    }
    theirs = made_by_peft("llama", method, tmp_path / "a", **more)
    mine = llama()
    peftkit.load(mine, tmp_path / "a")
    assert close(call(mine), call(theirs), 4)
    peftkit.save(mine, tmp_path / "b")
    assert close(call(peft_model(llama(), tmp_path / "b")), call(mine), 4)


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_a_kernel_decomposed_as_well_is_refused_and_a_linear_has_none(method, tmp_path):
    made_by_peft("conv", method, tmp_path / "a", use_effective_conv2d=True)
    with pytest.raises(StorageError, match=r"use_effective_conv2d=True has decomposed the kernel of '0'"):
        peftkit.load(conv(), tmp_path / "a")
    theirs = made_by_peft("llama", method, tmp_path / "b", use_effective_conv2d=True)
    mine = llama()
    peftkit.load(mine, tmp_path / "b")
    assert close(call(mine), call(theirs), 4)


def test_dropouts_of_ranks_and_modules_act_in_training_alone(tmp_path):
    theirs = made_by_peft("llama", "loha", tmp_path / "a", rank_dropout=0.5, module_dropout=0.5)
    mine = llama()
    peftkit.load(mine, tmp_path / "a")
    assert close(call(mine), call(theirs), 4)


def test_a_missing_or_misshapen_projection_is_an_error(tmp_path):
    made_by_peft("llama", "vera", tmp_path / "a")
    whole = tensors_of(tmp_path / "a")
    for key in ("base_model.vera_A", "base_model.vera_B"):
        rewrite(tmp_path / "a", {k: v for k, v in whole.items() if k != key})
        refused(tmp_path / "a", f"missing {key}", model=llama())
        rewrite(tmp_path / "a", {**whole, key: whole[key][:-1, :-1]})
        refused(tmp_path / "a", key, "expected at least", model=llama())
    rewrite(tmp_path / "a", {k: v for k, v in whole.items() if "lambda" in k})
    refused(tmp_path / "a", "missing base_model.vera_A", model=llama())
    set_config(tmp_path / "a", save_projection=False)  # and from the seed it is the same
    first, second = llama(), llama()
    peftkit.load(first, tmp_path / "a")
    rewrite(tmp_path / "a", whole)
    peftkit.load(second, tmp_path / "a")
    assert torch.equal(call(first), call(second))


def test_a_projection_larger_than_needed_is_used_in_part(tmp_path):
    """As peft leaves it where a second adapter took over the matrices of the first."""
    theirs = made_by_peft("llama", "vera", tmp_path / "a")
    whole = tensors_of(tmp_path / "a")
    whole["base_model.vera_A"] = torch.cat([whole["base_model.vera_A"], torch.ones(4, 5)], 1)
    whole["base_model.vera_B"] = torch.cat([whole["base_model.vera_B"], torch.ones(3, 4)])
    rewrite(tmp_path / "a", whole)
    mine = llama()
    peftkit.load(mine, tmp_path / "a")
    assert close(call(mine), call(theirs), 4)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.one_of(st.just(-1), st.integers(1, 200)))
def test_sizes_are_factored_as_peft_factors_them(size, factor):
    from peft.tuners.lokr.layer import factorization as theirs

    assert factorization(size, factor) == theirs(size, factor)
