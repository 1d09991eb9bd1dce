"""torchtune's adapters: converting, then merging is merging in torchtune's own layout, then converting the weights."""

from __future__ import annotations

import functools
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from storage_helpers import config_of, llama, peft_model, tensors_of, trained
from torch import Tensor, nn

import peftkit
from peftkit import StorageError
from peftkit.formats.torchtune import _ROTATES_NEIGHBOURS

NAMES = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj",
}  # fmt: skip
IDS = torch.tensor([[1, 5, 9, 2], [30, 7, 7, 11]])


def neighbours(x: Tensor, angles: Tensor) -> Tensor:
    """torchtune's `RotaryPositionalEmbeddings` (`modules/position_embeddings.py`). x: `(… d)`, angles: `(d/2)`."""
    a, b = x[..., 0::2], x[..., 1::2]
    turned = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
    return torch.stack(turned, -1).flatten(-2)


def halves(x: Tensor, angles: Tensor) -> Tensor:
    """Its `Qwen2RotaryPositionalEmbeddings` (`models/qwen2/_positional_embeddings.py`)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


# what its `models/<family>/_component_builders.py` give to attention; for Llama, llama2 and llama3
ROTATIONS = {
    "llama": neighbours, "mistral": neighbours, "gemma": neighbours, "gemma2": neighbours, "qwen2": halves, "qwen3": halves
}  # fmt: skip


def family(kind: str) -> nn.Module:
    """Of a `model_type`, with heads that are not hidden/heads wide, where it can have such."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    wide = {} if kind == "qwen2" else {"head_dim": 8}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **wide)).eval()


@functools.cache
def head_order(kind: str) -> Tensor:
    """Row i of a head in torchtune is row `head_order[i]` in transformers, as follows from what each rotates how."""
    model: Any = family(kind).model
    d = model.layers[0].self_attn.head_dim
    unit = torch.eye(d)[None, :, None]  # as many heads as rows, each with a 1 in another one
    cos, sin = model.rotary_emb(unit, torch.ones(1, 1, dtype=torch.long))
    apply = sys.modules[type(model).__module__].apply_rotary_pos_emb
    theirs = apply(unit, unit, cos, sin)[0][0, :, 0].T
    tunes = ROTATIONS[kind](torch.eye(d), 10000 ** (-torch.arange(0, d, 2) / d)).T
    # a row is known by its angle's cosine, and its sine, which is negative in the first row of a pair
    mark = [torch.stack((m.diag(), m.sum(1) - m.diag()), 1) for m in (tunes, theirs)]
    found = torch.cdist(*mark).argmin(1)
    assert sorted(found.tolist()) == list(range(d))
    assert torch.allclose(theirs[found][:, found], tunes, atol=1e-6)
    return found


def order(model: nn.Module, name: str) -> Tensor | None:
    """Row i of torchtune's weight is row `order[i]` of transformers'; None for what is not rotated."""
    config: Any = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    if heads is None:
        return None
    of_one = head_order(config.model_type)
    return torch.cat([h * len(of_one) + of_one for h in range(heads)])


def made(model: nn.Module, r: int, *, dora: bool) -> dict[str, Tensor]:
    """An adapter on every Linear as torchtune keeps it."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for i in range(model.config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            weight: Any = model.get_submodule(f"model.layers.{i}.{ours}").weight
            stem = f"layers.{i}.{theirs}"
            found[f"{stem}.lora_a.weight"] = 0.3 * torch.randn(r, weight.shape[1], generator=generator)
            found[f"{stem}.lora_b.weight"] = 0.3 * torch.randn(weight.shape[0], r, generator=generator)
            if dora:
                found[f"{stem}.magnitude"] = 0.2 + torch.rand(weight.shape[0], generator=generator)
    return found


@torch.no_grad()
def merged_their_way(model: nn.Module, adapter: dict[str, Tensor], scale: float) -> nn.Module:
    """Every weight brought into torchtune's layout, merged there as its `LoRALinear` and `DoRALinear` compute, and back."""
    for i in range(model.config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            weight: Any = model.get_submodule(f"model.layers.{i}.{ours}").weight
            rows = order(model, ours)
            own = weight if rows is None else weight[rows]
            stem = f"layers.{i}.{theirs}"
            new = own + scale * adapter[f"{stem}.lora_b.weight"] @ adapter[f"{stem}.lora_a.weight"]
            if (m := adapter.get(f"{stem}.magnitude")) is not None:
                new = new * (m / new.norm(dim=1))[:, None]
            weight.copy_(new if rows is None else new[rows.argsort()])
    return model


def write(folder: Path, adapter: dict[str, Tensor], name: str = "adapter_model.pt", **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    if name.endswith(".pt"):
        torch.save(adapter, folder / name)
    else:
        save_file(adapter, folder / name)
    if settings:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


SETTINGS = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "peft_type": "LORA"}


def test_every_family_is_looked_at():
    assert set(_ROTATES_NEIGHBOURS) == set(ROTATIONS)
    straight = [kind for kind in ROTATIONS if head_order(kind).equal(torch.arange(len(head_order(kind))))]
    assert straight == ["qwen2", "qwen3"]


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("dora", [False, True])
def test_converting_then_merging_is_merging_then_converting(kind, dora, tmp_path):
    make = functools.partial(family, kind)
    adapter = made(make(), 3, dora=dora)
    write(tmp_path / "theirs", adapter, **SETTINGS)
    expected = merged_their_way(make(), adapter, 5 / 3)
    peftkit.convert(tmp_path / "theirs", tmp_path / "ours", base=make())
    model = make()
    peftkit.load(model, tmp_path / "ours")
    with torch.no_grad():
        logits = expected(IDS).logits
        assert torch.allclose(model(IDS).logits, logits, atol=2e-5)
        assert torch.allclose(peft_model(make(), tmp_path / "ours")(IDS).logits, logits, atol=2e-5)
        assert not torch.allclose(make()(IDS).logits, logits, atol=1e-2)
    peftkit.merge(model)
    for key, weight in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[key], weight, atol=1e-5), key
    # from directories alone, and from a safetensors file with the alpha given
    make().save_pretrained(tmp_path / "base")
    write(tmp_path, adapter, "adapter.safetensors")
    peftkit.convert(tmp_path / "adapter.safetensors", tmp_path / "again", base=tmp_path / "base", alpha=5.0)
    first, second = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert config_of(tmp_path / "again")["use_dora"] is dora


def test_its_own_tensors_go_before_those_it_wrote_for_peft(tmp_path):
    """torchtune permutes q and k for peft whatever the model, and has no place there for magnitudes."""
    adapter = made(llama(), 3, dora=False)
    write(tmp_path / "theirs", adapter, **SETTINGS)
    (tmp_path / "theirs" / "adapter_model.safetensors").write_bytes(b"not looked at")
    peftkit.convert(tmp_path / "theirs", tmp_path / "ours", base=llama())
    assert len(tensors_of(tmp_path / "ours")) == len(adapter)
    write(tmp_path / "theirs", adapter, "adapter_0.pt")
    with pytest.raises(StorageError, match=r"has adapter_0\.pt, adapter_model\.pt; name the one"):
        peftkit.convert(tmp_path / "theirs", tmp_path / "ours", base=llama())
    peftkit.convert(tmp_path / "theirs" / "adapter_0.pt", tmp_path / "ours", base=llama())


@pytest.mark.parametrize("name", ["adapter_optimizer.pt", "adapter_0.pt", "adapter_model.pt"])
def test_a_directory_of_peft_is_read_as_that_whatever_lies_beside_it(name, tmp_path):
    peftkit.save(trained(llama()), tmp_path / "a")
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    beside: tuple[Any, ...] = (optimizer.state_dict(), {"x.y": torch.ones(2)}, torch.ones(2), PAIR)
    # tensors in torchtune's names are torchtune's only under a name that it gives
    for found in beside if name == "adapter_optimizer.pt" else beside[:-1]:
        torch.save(found, tmp_path / "a" / name)
        peftkit.convert(tmp_path / "a", tmp_path / "b", base=llama())
        first, second = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_damaged_file_of_torchtune_is_not_passed_over(tmp_path):
    """Beside it may lie the same in peft's names, with rows in another order."""
    peftkit.save(trained(llama()), tmp_path / "a")
    torch.save(PAIR, tmp_path / "a" / "adapter_model.pt")
    whole = (tmp_path / "a" / "adapter_model.pt").read_bytes()
    (tmp_path / "a" / "adapter_model.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match=r"adapter_model\.pt cannot be read"):
        peftkit.convert(tmp_path / "a", tmp_path / "b", base=llama())


def test_the_output_head(tmp_path):
    adapter = {"output.lora_a.weight": torch.randn(2, 16), "output.lora_b.weight": torch.randn(32, 2)}
    write(tmp_path / "theirs", adapter, r=2, lora_alpha=2)
    peftkit.convert(tmp_path / "theirs", tmp_path / "ours", base=llama())
    assert set(tensors_of(tmp_path / "ours")) == {f"base_model.model.lm_head.lora_{e}.weight" for e in "AB"}


Q = "layers.0.attn.q_proj"
PAIR = {f"{Q}.lora_a.weight": torch.ones(2, 16), f"{Q}.lora_b.weight": torch.ones(16, 2)}
WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "module": ({**PAIR, "layers.1.attn.o_proj.lora_a.weight": torch.ones(2, 16)}, r"unexpected layers\.1\.attn\.o_proj"),
    "near": ({**PAIR, "layers.0.atn.q_proj.lora_a.weight": torch.ones(2, 16)}, r"did you mean 'layers\.0\.attn\.q_proj"),
    "far": ({**PAIR, "zzzz.lora_a.weight": torch.ones(2, 16)}, r"unexpected zzzz\.lora_a\.weight; (?!the model has)"),
    "embedding": ({**PAIR, "tok_embeddings.lora_a.weight": torch.ones(2, 16)}, r"unexpected tok_embeddings\.lora_a\.weight"),
    "layer": ({**PAIR, "layers.7.mlp.w1.lora_a.weight": torch.ones(2, 16)}, r"layers\.7\.mlp\.w1\.lora_a\.weight"),
    "no-a": ({**PAIR, "layers.0.mlp.w1.lora_b.weight": torch.ones(32, 2)}, r"'layers\.0\.mlp\.w1', has no lora_a"),
    "no-b": ({f"{Q}.lora_a.weight": torch.ones(2, 16)}, r"missing .*q_proj\.lora_B"),
    "heads": ({**PAIR, f"{Q}.lora_b.weight": torch.ones(12, 2)}, rf"{Q}\.lora_b\.weight is not of this base: 12 rows"),
    "shape": ({**PAIR, f"{Q}.lora_b.weight": torch.ones(32, 2)}, rf"{Q}\.lora_b\.weight has shape \(32, 2\), expected"),
    "nan": ({**PAIR, f"{Q}.lora_b.weight": torch.full((16, 2), torch.inf)}, rf"{Q}\.lora_b\.weight has values that are not"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name, tmp_path):
    adapter, match = WRONG[name]
    write(tmp_path / "theirs", adapter, r=2, lora_alpha=2)
    with pytest.raises(StorageError, match=match):
        peftkit.convert(tmp_path / "theirs", tmp_path / "ours", base=llama())
    assert not (tmp_path / "ours").exists()


class Harmful:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("harmed"),)


def test_no_other_pickle_is_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_0.pt").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(StorageError, match=r"adapter_0\.pt cannot be read as tensors alone"):
        peftkit.convert(tmp_path / "adapter_0.pt", tmp_path / "ours", base=llama(), alpha=1)
    assert not (tmp_path / "harmed").exists()
    torch.save({"model": PAIR}, tmp_path / "adapter_0.pt")
    with pytest.raises(StorageError, match="'model' is a dict; expected tensors"):
        peftkit.convert(tmp_path / "adapter_0.pt", tmp_path / "ours", base=llama(), alpha=1)
    torch.save([1], tmp_path / "adapter_0.pt")
    with pytest.raises(StorageError, match="holds a list; expected tensors"):
        peftkit.convert(tmp_path / "adapter_0.pt", tmp_path / "ours", base=llama(), alpha=1)


def test_what_it_does_not_say_is_asked(tmp_path):
    write(tmp_path / "theirs", PAIR)
    with pytest.raises(StorageError, match="no adapter_config.json beside it says lora_alpha; pass alpha="):
        peftkit.convert(tmp_path / "theirs", tmp_path / "ours", base=llama())
    model = llama()
    model.config = type("C", (), {"to_dict": lambda self: {"model_type": "phi3"}})()
    with pytest.raises(
        StorageError, match="model_type='phi3'; how torchtune orders the rows of q and k is known for llama"
    ):
        peftkit.convert(tmp_path / "theirs", tmp_path / "ours", base=model, alpha=2)
