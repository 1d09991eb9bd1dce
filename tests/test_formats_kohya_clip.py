"""A kohya file's text encoder on transformers' CLIP, whose modules have lost the prefix that the file's names have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from storage_helpers import tensors_of
from torch import Tensor, nn

import peftkit
from peftkit import StorageError

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 8, "projection_dim": 12, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.tensor([[1, 5, 9, 2], [1, 7, 11, 2]])
ENDS = ["self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"]
HEAD = "lora_te_text_model_encoder_layers_{}_{}"


def clip(kind: str = "CLIPTextModel") -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**SIZES)).eval()


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)[0]


def theirs(head: str = HEAD) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for i in range(2):
        for end in ENDS:
            rows, cols = (24, 16) if end == "mlp.fc1" else (16, 16)
            stem = head.format(i, end.replace(".", "_"))
            made[f"{stem}.lora_down.weight"] = torch.randn(3, cols, generator=generator)
            made[f"{stem}.lora_up.weight"] = torch.randn(rows, 3, generator=generator)
            made[f"{stem}.alpha"] = torch.tensor(1.5)
    return made


@torch.no_grad()
def merged(model: nn.Module, adapter: dict[str, Tensor], under: str) -> nn.Module:
    for i in range(2):
        for end in ENDS:
            stem = HEAD.format(i, end.replace(".", "_"))
            weight: Any = model.get_submodule(f"{under}encoder.layers.{i}.{end}").weight
            weight += 0.5 * adapter[f"{stem}.lora_up.weight"] @ adapter[f"{stem}.lora_down.weight"]
    return model


def old_layout(folder: Path) -> None:
    """As transformers 4 saved it, and as it lies beside most diffusion models."""
    clip().save_pretrained(folder)
    old = {f"text_model.{key}": t for key, t in load_file(folder / "model.safetensors").items()}
    save_file(old, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("given", ["module", "saved", "old"])
@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_what_it_writes_loads_on_what_from_pretrained_makes(given, kind, tmp_path):
    save_file(theirs(), tmp_path / "theirs.safetensors")
    folder, bare = tmp_path / "base", kind == "CLIPTextModel"
    if given == "old" and bare:
        old_layout(folder)
    else:
        clip(kind).save_pretrained(folder)
    base = clip(kind) if given == "module" else folder
    peftkit.convert(tmp_path / "theirs.safetensors", tmp_path / "ours", base=base)
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    peftkit.load(model.eval(), tmp_path / "ours")
    expected = out(merged(clip(kind), theirs(), "" if bare else "text_model."))
    assert torch.allclose(out(model), expected, atol=1e-5)
    assert not torch.allclose(out(clip(kind)), expected, atol=1e-2)


def test_a_file_without_the_prefix_for_a_base_with_it(tmp_path):
    bare = HEAD.replace("text_model_", "")
    for name, head in (("with", HEAD), ("without", bare)):
        save_file(theirs(head), tmp_path / f"{name}.safetensors")
        peftkit.convert(tmp_path / f"{name}.safetensors", tmp_path / name, base=clip("CLIPTextModelWithProjection"))
    first, second = tensors_of(tmp_path / "with"), tensors_of(tmp_path / "without")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    save_file({**theirs(), **theirs(bare)}, tmp_path / "both.safetensors")
    q = r"encoder\.layers\.\d\.\w+\.\w+'"
    with pytest.raises(StorageError, match=rf"lora_te_\w+ and lora_te_\w+ both mean 'text_model\.{q}"):
        peftkit.convert(tmp_path / "both.safetensors", tmp_path / "o", base=clip("CLIPTextModelWithProjection"))


def test_the_name_itself_goes_before_the_one_without_the_prefix(tmp_path):
    base = nn.Module()
    base.text_model = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    base.fc = nn.Linear(4, 4)
    for head, path in (("lora_te_text_model_fc", "text_model.fc"), ("lora_te_fc", "fc")):
        save_file(
            {f"{head}.lora_down.weight": torch.ones(2, 4), f"{head}.lora_up.weight": torch.ones(4, 2)},
            tmp_path / "t.safetensors",
        )
        peftkit.convert(tmp_path / "t.safetensors", tmp_path / path, base=base)
        assert set(tensors_of(tmp_path / path)) == {f"base_model.model.{path}.lora_{e}.weight" for e in "AB"}
