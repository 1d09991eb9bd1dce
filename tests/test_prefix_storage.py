"""Files of prefixes, peft's and our own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from storage_helpers import rewrite
from storage_models import bert, close, gpt2, t5
from torch import Tensor, nn

import peftkit
from peftkit import PrefixTuningConfig, StorageError
from peftkit.testing import models

peft = pytest.importorskip("peft")
load_file = pytest.importorskip("safetensors.torch").load_file

IDS = torch.arange(12).reshape(2, 6) % 29 + 1
MASK = torch.ones_like(IDS)
MASK[0, :2] = 0
P = 4


def made(name: str, kind: str, **sizes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(vocab_size=32, max_position_embeddings=40, pad_token_id=1, **sizes)
    return models.drawn(getattr(transformers, f"{name}{kind}")(config))


def roberta() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return made("Roberta", "ForTokenClassification", **sizes)


def opt() -> nn.Module:
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return made("OPT", "ForCausalLM", word_embed_proj_dim=16, **sizes)


def bart() -> nn.Module:
    of = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
          (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    return made("Bart", "ForConditionalGeneration", d_model=16, **of)


SHAPES = {
    "llama": (models.llama, "CAUSAL_LM"),
    "gpt2": (gpt2, "CAUSAL_LM"),
    "bert": (bert, "SEQ_CLS"),
    "t5": (t5, "SEQ_2_SEQ_LM"),
    "bart": (bart, "SEQ_2_SEQ_LM"),
    "opt": (opt, "CAUSAL_LM"),
    "roberta": (roberta, "TOKEN_CLS"),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


@torch.no_grad()
def call(model: nn.Module) -> Tensor:
    inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = IDS
    return model(**inputs).logits


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "adapter_config.json").read_text())


@every_shape
@pytest.mark.parametrize("projected", [False, True])
def test_what_peft_wrote_computes_the_same_and_goes_back(shape, projected, tmp_path):
    make, task = SHAPES[shape]
    base = make().eval()
    torch.manual_seed(1)
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P, prefix_projection=projected)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    peftkit.load(ours, tmp_path / "theirs")
    expected = call(theirs)
    assert close(call(ours), expected) and not close(call(base), expected, 100)
    peftkit.save(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert type(back) is type(theirs) and close(call(back), expected)
    written, stored = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    assert set(stored) - set(written) == {"peft_version"} and set(written) <= set(stored)
    again, first = (
        load_file(tmp_path / "ours" / "adapter_model.safetensors"),
        load_file(tmp_path / "theirs" / "adapter_model.safetensors"),
    )
    assert again.keys() == first.keys()


@pytest.mark.parametrize("shape", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("settings", [{}, {"reparametrize": 5}])
def test_peft_computes_the_same_with_what_we_trained(shape, settings, tmp_path):
    base = SHAPES[shape][0]().eval()
    ours = copy.deepcopy(base)
    torch.manual_seed(2)
    also = {"also_train": ["classifier"]} if shape == "bert" else {}
    peftkit.inject(ours, PrefixTuningConfig(length=P, **settings, **also))
    with torch.no_grad():
        for p in peftkit.parameters(ours):
            p.add_(0.1 * torch.randn_like(p))
    peftkit.save(ours, tmp_path / "a")
    assert config_of(tmp_path / "a")["peft_type"] == "PREFIX_TUNING"
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    assert close(call(back), call(ours))
    again = copy.deepcopy(base)
    peftkit.load(again, tmp_path / "a")
    assert torch.equal(call(again), call(ours))
    assert not any("source" in name for name, _ in again.named_parameters())  # the MLP is folded away


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ("llama", {"layers": 1}),
        ("llama", {"shift_positions": False}),
        ("t5", {}),
        ("t5", {"targets": "EncDecAttention"}),
        ("t5", {"targets": "decoder.**.SelfAttention"}),  # peft gives both layers one pair
    ],
)
def test_what_peft_would_misread_it_refuses(shape, settings, tmp_path):
    base = SHAPES[shape][0]().eval()
    ours = copy.deepcopy(base)
    peftkit.inject(ours, PrefixTuningConfig(length=P, **settings))
    peftkit.save(ours, tmp_path / "a")
    assert config_of(tmp_path / "a")["peft_type"] == "PEFTKIT_PREFIX"
    assert "peft reads it" not in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    again = copy.deepcopy(base)
    peftkit.load(again, tmp_path / "a")
    assert torch.equal(call(again), call(ours))


def test_a_decoder_with_an_odd_number_of_layers_is_what_peft_can_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2}
    base = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    ours = copy.deepcopy(base)
    peftkit.inject(ours, PrefixTuningConfig(length=P, targets="decoder.**.SelfAttention"))
    peftkit.save(ours, tmp_path / "a")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    assert close(call(back), call(ours))
    again = copy.deepcopy(base)
    peftkit.load(again, tmp_path / "a")
    assert torch.equal(call(again), call(ours))


def test_a_table_that_counts_positions_itself_counts_behind_the_prefix():
    model = bart()
    peftkit.inject(model, PrefixTuningConfig(length=P, targets="encoder.**.self_attn"))
    encoder, decoder = model.model.encoder.embed_positions, model.model.decoder.embed_positions
    assert torch.equal(encoder(IDS)[0], encoder.weight[2 + P : 8 + P])
    assert torch.equal(encoder(IDS, 3)[0], encoder.weight[5 + P : 11 + P])
    assert torch.equal(decoder(IDS)[0], decoder.weight[2:8])  # whose attention has no prefix


def test_a_tensor_of_another_model_is_named_and_the_model_stays(tmp_path):
    model = models.llama()
    peftkit.inject(model, PrefixTuningConfig(length=P))
    peftkit.save(model, tmp_path / "a")
    deeper = models.llama(layers=3)
    before = {k: v.clone() for k, v in deeper.state_dict().items()}
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    rewrite(tmp_path / "a", tensors)  # without what says that it is ours, as peft would have written it
    with pytest.raises(StorageError, match=r"prompt_embeddings has shape \(4, 32\), expected \(4, 48\).* 3 attentions"):
        peftkit.load(deeper, tmp_path / "a")
    assert peftkit.adapters(deeper) == {}
    assert all(layer.self_attn.config is deeper.config for layer in deeper.model.layers)
    assert all(torch.equal(v, before[k]) for k, v in deeper.state_dict().items())
    for broken in (tensors["prompt_embeddings"][:-1], tensors["prompt_embeddings"] * float("nan")):
        rewrite(tmp_path / "a", {"prompt_embeddings": broken})
        with pytest.raises(StorageError, match="prompt_embeddings"):
            peftkit.load(models.llama(), tmp_path / "a")
    rewrite(tmp_path / "a", {"prompt_embeddings": tensors["prompt_embeddings"], "base_model.extra": torch.ones(2)})
    with pytest.raises(StorageError, match="unexpected"):
        peftkit.load(models.llama(), tmp_path / "a")
