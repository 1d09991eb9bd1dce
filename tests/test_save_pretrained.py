"""`save_pretrained` and `from_pretrained`, with adapters: what our function writes, and what the plain calls do."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from adapting import draw
from trainers import adapted, equal, states
from transformers import AutoModelForCausalLM

import peftkit
from peftkit import LoRAConfig, NotMergeable
from peftkit.integrations.transformers import save_pretrained
from peftkit.method import registered
from peftkit.testing import examples
from peftkit.testing.models import evaluated, ids, llama

ATTACHED = {"lora", "ia3", "loha", "lokr"}
METHODS = [(n, c) for n, c in examples(*registered().values()) if not n.startswith("sketch")]
each = pytest.mark.parametrize("config", [pytest.param(c, id=n) for n, c in METHODS])


def read(path):
    return evaluated(AutoModelForCausalLM.from_pretrained(path).eval(), ids())


def drawn(*configs, **kwargs):
    model = adapted(*configs, **kwargs).eval()
    draw(model, 1)
    return model


@each
def test_base_and_adapter_come_back_as_the_same_function(config, tmp_path):
    model = drawn(config)
    before, expected = model.state_dict(), evaluated(model, ids())
    if config.method not in ATTACHED:
        with pytest.raises(ValueError, match="from_pretrained does not attach"):
            save_pretrained(model, tmp_path / "m")
        assert not (tmp_path / "m").exists()
        return
    save_pretrained(model, tmp_path / "m")
    torch.testing.assert_close(read(tmp_path / "m"), expected, rtol=1e-5, atol=1e-5)
    assert equal(model.state_dict(), before)


@each
def test_merged_weights_are_the_same_function(config, tmp_path):
    model = drawn(config)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    expected = evaluated(model, ids())
    try:
        save_pretrained(model, tmp_path / "m", merged=True)
    except NotMergeable:
        assert not list(tmp_path.iterdir())
    else:
        torch.testing.assert_close(read(tmp_path / "m"), expected, rtol=1e-4, atol=1e-5)
        assert {f.name for f in (tmp_path / "m").iterdir()} == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
        }
    assert equal(model.state_dict(), before) and torch.equal(evaluated(model, ids()), expected)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("also", [["lm_head"], {"embed_tokens": [3, 5]}, ["*.input_layernorm"]], ids=str)
def test_what_is_trained_beside_comes_back(also, merged, tmp_path):
    model = drawn(LoRAConfig(r=2, also_train=also), tie_word_embeddings=False)
    save_pretrained(model, tmp_path / "m", merged=merged)
    torch.testing.assert_close(read(tmp_path / "m"), evaluated(model, ids()), rtol=1e-4, atol=1e-5)


def test_which_adapters_are_written(tmp_path):
    model = drawn(LoRAConfig(r=2), LoRAConfig(r=1), names=("a", "b"))
    with pytest.raises(ValueError, match="2 adapters are active"):
        save_pretrained(model, tmp_path / "m")
    save_pretrained(model, tmp_path / "both", merged=True)
    torch.testing.assert_close(read(tmp_path / "both"), evaluated(model, ids()), rtol=1e-4, atol=1e-5)
    peftkit.activate(model, "b")
    save_pretrained(model, tmp_path / "b")
    torch.testing.assert_close(read(tmp_path / "b"), evaluated(model, ids()), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="holds an adapter"):
        save_pretrained(model, tmp_path / "b", merged=True)
    peftkit.merge(model)
    with pytest.raises(ValueError, match="'b' is merged"):
        save_pretrained(model, tmp_path / "c")
    save_pretrained(model, tmp_path / "c", merged=True)
    torch.testing.assert_close(read(tmp_path / "c"), evaluated(model, ids()), rtol=1e-5, atol=1e-6)
    assert not any("lora" in k for k in AutoModelForCausalLM.from_pretrained(tmp_path / "c").state_dict())
    with pytest.raises(ValueError, match="no adapter is attached"):
        save_pretrained(llama(), tmp_path / "d")


# -- what the plain calls do, as docs/integrations.md says ------------------------------------------------------------------


def test_from_pretrained_reads_what_peftkit_saved(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    peftkit.inject(model, LoRAConfig(r=2))
    draw(model, 1)
    peftkit.save(model, tmp_path / "adapter")
    torch.testing.assert_close(read(tmp_path / "adapter"), evaluated(model, ids()), rtol=1e-5, atol=1e-6)


def test_the_plain_save_pretrained_keeps_an_adapter_that_from_pretrained_drops(tmp_path):
    model = drawn(LoRAConfig(r=2))
    model.save_pretrained(tmp_path)
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(told["unexpected_keys"]) == set(states(model, True)) and not told["missing_keys"]
    with peftkit.disabled(model):
        assert torch.equal(evaluated(again.eval(), ids()), evaluated(model, ids()))
    peftkit.inject(again, LoRAConfig(r=2))  # nothing is lost: the tensors are in the file under their own names
    from safetensors.torch import load_file

    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(evaluated(again, ids()), evaluated(model, ids()))


def test_transformers_loses_the_magnitudes_of_peft_s_own_dora(tmp_path):
    """Why DoRA is refused. Once this fails, transformers reads it, and it can be written."""
    base = llama()
    base.save_pretrained(tmp_path / "m")
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora" in name:
                p.add_(0.3 * torch.randn_like(p))
    expected = evaluated(wrapped, ids())
    wrapped.save_pretrained(tmp_path / "m")
    assert not torch.allclose(read(tmp_path / "m"), expected, atol=1e-2)


def test_a_method_that_peft_does_not_know_says_what_to_call():
    from peftkit import BitFitConfig

    model = drawn(dataclasses.replace(BitFitConfig()))
    with pytest.raises(ValueError, match=r"merged=True .* peftkit.save"):
        save_pretrained(model, "nowhere")


@pytest.mark.parametrize("config", [pytest.param(c, id=n) for n, c in METHODS if c.method not in {*ATTACHED, "dora"}])
def test_from_pretrained_refuses_what_it_cannot_attach(config, tmp_path):
    llama().save_pretrained(tmp_path)
    model = drawn(config)
    peftkit.save(model, tmp_path)
    with pytest.raises((ValueError, KeyError, TypeError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)
