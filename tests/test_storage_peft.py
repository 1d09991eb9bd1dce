"""peft 0.21 is the oracle, both ways: it reads what `save` writes, and `load` reads what it wrote."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from storage_helpers import CONFIG, config_of, llama, moved, peft_model, tensors_of, trained
from storage_models import Attending, Suffixes, albert, bert, call, close, conv, distilbert, gpt2, t5
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig, StorageError

peft = pytest.importorskip("peft")


@dataclass(frozen=True)
class Case:
    """A model and one adapter on it, in peft's terms and in ours."""

    name: str
    make: Callable[[], nn.Module]
    theirs: dict[str, Any]
    ours: dict[str, Any]
    factor: float = 1.0


CASES = [
    Case("llama", llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]},
         {"targets": ["q_proj", "v_proj", "down_proj"]}),
    Case("llama-bf16", lambda: llama().bfloat16(), {"target_modules": ["q_proj", "up_proj"]},
         {"targets": ["q_proj", "up_proj"]}),
    Case("bert", bert, {"target_modules": ["query", "dense"]}, {"targets": ["query", "dense"]}),
    Case("gpt2", gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, {"targets": ["c_attn", "c_fc"]}),
    Case("t5", t5, {"target_modules": ["q", "v", "wo"]}, {"targets": ["q", "v", "wo"]}),
    Case("albert", albert, {"target_modules": ["query", "ffn"]}, {"targets": ["query", "ffn"]}),
    Case("conv", conv, {"target_modules": ["0", "2"]}, {"targets": ["0", "2"]}),
    Case("embedding", Attending, {"target_modules": ["table", "out"]}, {"targets": ["table", "out"]}),
    Case("attention", Attending, {"target_modules": ["attn", "out"]}, {"targets": ["attn", "out"]}),
    Case("embed_tokens", llama, {"target_modules": ["embed_tokens", "q_proj"]},
         {"targets": ["embed_tokens", "q_proj"]}),
    Case(
        "patterns", llama,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"model.layers.0.self_attn.q_proj": 3, "v_proj": 1},
         "alpha_pattern": {"layers.1.self_attn.q_proj": 7}},
        {"targets": ["q_proj", "v_proj"], "r": {"*": 2, "v_proj": 1, "^model.layers.0.self_attn.q_proj": 3},
         "alpha": {"*": 5, "layers.1.self_attn.q_proj": 7}},
    ),
    Case("rslora", llama, {"target_modules": ["o_proj"], "use_rslora": True, "r": 4},
         {"targets": ["o_proj"], "rank_stabilized": True, "r": 4}),
    Case("layers", llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]},
         {"targets": ["q_proj"], "layers": [1]}),
    Case("regex", llama, {"target_modules": r".*\.1\..*(q|k)_proj"}, {"targets": re.compile(r".*\.1\..*(q|k)_proj")}),
    Case("exclude", llama, {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.0\..*"},
         {"targets": ["q_proj", "k_proj"], "exclude": "layers.0"}),
    Case("head", bert, {"target_modules": ["query"], "modules_to_save": ["classifier"]},
         {"targets": ["query"], "also_train": ["classifier"]}),
    Case("tokens", llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7]}},
         {"targets": ["q_proj"], "also_train": {"embed_tokens": [3, 7]}}),
    Case("tokens-tied", lambda: llama(tie_word_embeddings=True),
         {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7]}},
         {"targets": ["q_proj"], "also_train": {"embed_tokens": [3, 7]}}),
    Case("suffix-0", Suffixes, {"target_modules": r"0"}, {"targets": "^0"}),
    Case("suffix-a0", Suffixes, {"target_modules": ["a.0"]}, {"targets": "^a.0"}),
    Case("suffix-ranks", Suffixes, {"target_modules": r"0|a\.0|h\.1\.0|h\.110", "r": 3,
                                    "rank_pattern": {r"^0": 1, r"^h\.1\.0": 2, r"^h\.110": 4}},
         {"targets": ["^0", "^a.0", "^h.1.0", "^h.110"], "r": {"^0": 1, "^a.0": 3, "^h.1.0": 2, "^h.110": 4}}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_peft_reads_what_save_writes(case, tmp_path):
    config = LoRAConfig(**{"r": 2, "alpha": 5.0, **case.ours})
    model = trained(case.make(), config)
    assert not torch.equal(call(model), call(case.make()))
    peftkit.save(model, tmp_path / "a")
    assert close(call(peft_model(case.make(), tmp_path / "a")), call(model), case.factor)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_load_reads_what_peft_wrote(case, tmp_path):
    theirs = made_by_peft(case.make(), tmp_path / "a", **{"r": 2, "lora_alpha": 5, **case.theirs})
    model = case.make()
    peftkit.load(model, tmp_path / "a")
    assert not torch.equal(call(model), call(case.make()))
    assert close(call(model), call(theirs), case.factor)
    peftkit.save(model, tmp_path / "again")
    again = tensors_of(tmp_path / "again")
    for key, value in tensors_of(tmp_path / "a").items():
        if not key.endswith("base_layer.weight"):
            assert torch.equal(again[key], value) and again[key].dtype == value.dtype, key


def made_by_peft(base: nn.Module, folder: Path, name: str = "default", **config: Any) -> nn.Module:
    """A peft model that was trained a little and saved to `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(**config), adapter_name=name).eval()
        moved(model, [p for p in model.parameters() if p.requires_grad])
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["tuned", "default"])
def test_named_adapters_lie_in_a_directory_of_their_own(name, tmp_path):
    theirs = made_by_peft(llama(), tmp_path, name=name, r=2, target_modules=["q_proj"])
    assert (tmp_path / name).is_dir() == (name != "default")
    model = llama()
    peftkit.load(model, tmp_path, name=name)
    assert close(call(model), call(theirs))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_started_from_the_base(init, tmp_path):
    theirs = made_by_peft(llama(), tmp_path / "a", r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=init)
    model = llama()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    peftkit.load(model, tmp_path / "a")
    assert close(call(model), call(theirs), 10)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in base.items())
    # and from here on it is a plain adapter of twice the rank, which needs no base to be understood
    peftkit.save(model, tmp_path / "b")
    assert config_of(tmp_path / "b")["init_lora_weights"] is True and config_of(tmp_path / "b")["r"] == 4
    assert close(call(peft_model(llama(), tmp_path / "b")), call(model), 10)


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_our_start_from_the_base_is_plain_lora_to_peft(init, stabilized, tmp_path):
    model = trained(
        llama(), LoRAConfig(r=3, alpha=4, init=init, rank_stabilized=stabilized, targets=["q_proj", "down_proj"])
    )
    peftkit.save(model, tmp_path / "a")
    assert close(call(peft_model(llama(), tmp_path / "a")), call(model), 10)
    # bit for bit, and without the base to start from
    other = llama().to("meta")
    peftkit.load(other, tmp_path / "a")
    peftkit.save(other, tmp_path / "b")
    first, second = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("stabilized", [False, True])
def test_row_blocks_are_plain_lora_to_peft(stabilized, tmp_path):
    rows = {"q_proj": [(0, 4), (6, 11)], "gate_proj": [(3, 9)]}
    config = LoRAConfig(r=2, alpha=3, rows=rows, rank_stabilized=stabilized, targets=["q_proj", "gate_proj", "o_proj"])
    model = trained(llama(), config)
    peftkit.save(model, tmp_path / "a")
    assert config_of(tmp_path / "a")["rank_pattern"]
    assert close(call(peft_model(llama(), tmp_path / "a")), call(model))
    other = llama()
    peftkit.load(other, tmp_path / "a")
    assert torch.equal(call(other), call(model))
    assert peftkit.adapters(other)["default"].rows.keys() == rows.keys()


@pytest.mark.parametrize("target", ["attn.in_proj", "attn.out_proj"])
def test_one_part_of_attention_alone(target, tmp_path):
    model = trained(Attending(), LoRAConfig(r=2, targets=target))
    peftkit.save(model, tmp_path / "a")
    other = Attending()
    peftkit.load(other, tmp_path / "a")
    assert torch.equal(call(other), call(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft adapts both parts, and says that it found no tensors for the other
        theirs = peft.PeftModel.from_pretrained(Attending(), tmp_path / "a").eval()
    assert close(call(theirs), call(model))


def test_attention_with_its_own_rank(tmp_path):
    theirs = made_by_peft(Attending(), tmp_path / "a", r=2, target_modules=["attn", "out"], rank_pattern={"attn": 3},
                          alpha_pattern={"attn": 9})  # fmt: skip
    model = Attending()
    peftkit.load(model, tmp_path / "a")
    assert close(call(model), call(theirs))
    peftkit.save(model, tmp_path / "b")
    assert close(call(peft_model(Attending(), tmp_path / "b")), call(model))


def test_the_heads_that_peft_adds_for_a_task(tmp_path):
    theirs = made_by_peft(bert(), tmp_path / "a", r=2, target_modules=["query"], task_type="SEQ_CLS")
    assert config_of(tmp_path / "a")["modules_to_save"] == ["classifier", "score"]  # and BERT has no `score`
    model = bert()
    peftkit.load(model, tmp_path / "a")
    assert close(call(model), call(theirs))


def test_peft_means_ends_of_names_by_modules_to_save(tmp_path):
    theirs = made_by_peft(distilbert(), tmp_path / "a", r=2, target_modules=["q_lin"], modules_to_save=["classifier"])
    assert any("pre_classifier" in k for k in tensors_of(tmp_path / "a"))
    model = distilbert()
    peftkit.load(model, tmp_path / "a")
    assert close(call(model), call(theirs))


def test_tied_modules_that_peft_trained_apart(tmp_path):
    base = llama(tie_word_embeddings=True)
    theirs = made_by_peft(
        base, tmp_path / "a", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    stored = tensors_of(tmp_path / "a")
    assert not torch.equal(
        stored["base_model.model.model.embed_tokens.weight"], stored["base_model.model.lm_head.weight"]
    )
    model = llama(tie_word_embeddings=True)
    peftkit.load(model, tmp_path / "a")
    assert close(call(model), call(theirs))


def test_embeddings_that_peft_saved_unasked(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
        moved(theirs, [p for n, p in theirs.named_parameters() if "lora" in n or "embed_tokens" in n or "lm_head" in n])
        theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    model = llama()
    peftkit.load(model, tmp_path / "a")
    assert close(call(model), call(theirs))


def test_a_targeted_embedding_of_another_base(tmp_path):
    made_by_peft(llama(), tmp_path / "a", r=2, target_modules=["embed_tokens"])
    assert any(k.endswith("embed_tokens.base_layer.weight") for k in tensors_of(tmp_path / "a"))
    with pytest.raises(StorageError, match=r"embed_tokens\.base_layer\.weight is not the weight"):
        peftkit.load(llama(seed=1), tmp_path / "a")


@pytest.mark.parametrize("indices", [{"embed_tokens": [7, 3, 11]}, [7, 3, 11]], ids=["named", "list"])
def test_token_rows_in_any_order(indices, tmp_path):
    theirs = made_by_peft(llama(), tmp_path / "a", r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    model = llama()
    peftkit.load(model, tmp_path / "a")
    assert close(call(model), call(theirs))


@pytest.mark.parametrize("peft_key", ["target_modules", "modules_to_save"])
def test_what_peft_rewrites_in_our_config_is_accepted(peft_key, tmp_path):
    """peft adds all its own keys, and writes sets in any order."""
    model = trained(bert(), LoRAConfig(r=2, targets=["query", "key", "value"], also_train=["classifier", "pooler"]))
    peftkit.save(model, tmp_path / "a")
    peft.LoraConfig.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    rewritten = config_of(tmp_path / "b")
    assert len(rewritten) > 35
    rewritten[peft_key] = rewritten[peft_key][::-1]
    rewritten["base_model_name_or_path"] = "somewhere/else"
    (tmp_path / "a" / CONFIG).write_text(json.dumps(rewritten))
    other = bert()
    peftkit.load(other, tmp_path / "a")
    assert torch.equal(call(other), call(model))


def test_the_tensors_of_both_are_named_alike(tmp_path):
    """Beside what peft can compute, vLLM and others look at the keys."""
    made_by_peft(llama(), tmp_path / "theirs", r=2, target_modules=["q_proj", "down_proj"])
    peftkit.save(trained(llama(), LoRAConfig(r=2, targets=["q_proj", "down_proj"])), tmp_path / "ours")
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    for key in ("peft_type", "r", "target_modules", "bias", "use_rslora", "modules_to_save"):
        mine, other = config_of(tmp_path / "ours")[key], config_of(tmp_path / "theirs")[key]
        assert mine == other or sorted(mine) == sorted(other), key


def test_aliases_are_stored_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(6, 6)
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.first(x).tanh())

    x = torch.linspace(-1, 1, 6)
    model = trained(Twice(), LoRAConfig(r=2, targets="all-linear"))
    peftkit.save(model, tmp_path / "a")
    assert len(tensors_of(tmp_path / "a")) == 2
    other = Twice()
    peftkit.load(other, tmp_path / "a")
    assert torch.equal(other(x), model(x))
    # a file that knows the module by its other name
    renamed = {k.replace("first", "again"): v for k, v in tensors_of(tmp_path / "a").items()}
    from storage_helpers import rewrite, set_config

    rewrite(tmp_path / "a", renamed)
    set_config(tmp_path / "a", target_modules=["again"])
    third = copy.deepcopy(Twice())
    peftkit.load(third, tmp_path / "a")
    assert torch.equal(third(x), model(x))
