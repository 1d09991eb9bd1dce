"""Prefixes in models of transformers, against the route through its own caches and against the plain model."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from storage_models import t5
from torch import Tensor, nn

import peftkit
from peftkit import LoRAConfig, PrefixTuningConfig
from peftkit.methods.prefix import start_from_tokens
from peftkit.testing import models

transformers = pytest.importorskip("transformers")

IDS = torch.randint(1, 31, (2, 7), generator=torch.Generator().manual_seed(3))
P = 3


def masked(side: str) -> Tensor:
    mask = torch.ones_like(IDS)
    if side == "left":
        mask[0, :2] = 0
    if side == "right":
        mask[0, -2:] = 0
    return mask


def prefixed(base: nn.Module, **settings: Any) -> nn.Module:
    """A copy with a drawn prefix."""
    model = copy.deepcopy(base)
    torch.manual_seed(7)
    peftkit.inject(model, PrefixTuningConfig(**{"length": P, **settings}))
    return model


def adapters(model: nn.Module, name: str = "default") -> Iterator[Any]:
    for module in model.modules():
        found = getattr(getattr(module, "peftkit", None), name, None)
        if hasattr(found, "key"):
            yield found


def family(name: str, **settings: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 31, "num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0, **settings}
    config_name = {"Gemma3": "Gemma3Text"}.get(name, name)
    config = getattr(transformers, f"{config_name}Config")(**sizes)
    return models.drawn(getattr(transformers, f"{name}ForCausalLM")(config))


def through_the_cache(base: nn.Module, model: nn.Module, mask: Tensor) -> Tensor:
    """The same prefix as transformers understands it: as what a cache holds already."""
    pairs = [(a.key.expand(2, -1, -1, -1), a.value.expand(2, -1, -1, -1)) for a in adapters(model)]
    wide = torch.cat([torch.ones(2, P, dtype=mask.dtype), mask], 1)
    at = (mask.cumsum(-1) - 1).clamp(min=0) + P
    cache = transformers.DynamicCache(pairs)
    return base(IDS, attention_mask=wide, position_ids=at, past_key_values=cache).logits


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [models.llama, models.gpt2])
def test_it_is_what_a_cache_with_the_prefix_in_it_gives(make, implementation, side):
    base = make().double().requires_grad_(False)
    base.set_attn_implementation(implementation)
    model, mask = prefixed(base), masked(side)
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    for logits in (through_the_cache(base, model, mask), model(IDS, attention_mask=mask, position_ids=at).logits):
        kept = logits[mask.bool()]
        found.append((kept, *torch.autograd.grad(kept.square().sum(), peftkit.parameters(model))))
    for expected, own in zip(*found, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        models.llama,
        models.gpt2,
        lambda: family("Mistral", sliding_window=4),
        lambda: family("Gemma3", sliding_window=4, head_dim=8, layer_types=["sliding_attention", "full_attention"]),
    ],
    ids=["llama", "gpt2", "sliding", "some-sliding"],
)
def test_generating_with_caches_is_generating_without(make):
    base = make()
    model, mask = prefixed(base), masked("left")
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    model.generation_config.eos_token_id = base.generation_config.eos_token_id = None
    plain = model.generate(IDS, use_cache=False, **how)
    assert torch.equal(model.generate(IDS, **how), plain)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **how), plain)
    beams = {"num_beams": 3, **how}
    assert torch.equal(model.generate(IDS, **beams), model.generate(IDS, use_cache=False, **beams))
    with peftkit.disabled(model):
        without = model.generate(IDS, **how)
    assert torch.equal(without, base.generate(IDS, **how)) and not torch.equal(without, plain)


def test_the_cache_counts_tokens_and_stays_the_users():
    model = prefixed(models.llama().double())
    cache = transformers.DynamicCache()
    model(IDS[:, :4], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 4
    late = model(IDS[:, 4:], past_key_values=cache, use_cache=True).logits
    assert cache.get_seq_length() == 7
    torch.testing.assert_close(late, model(IDS).logits[:, 4:])


def test_a_sliding_window_never_drops_the_prefix():
    model = prefixed(family("Mistral", sliding_window=3, num_hidden_layers=1).double())
    cache = transformers.DynamicCache(config=model.config)
    model(IDS, past_key_values=cache, use_cache=True)
    last = model(IDS[:, :1], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(last, model(torch.cat([IDS, IDS[:, :1]], 1)).logits[:, -1:])
    for gradient in torch.autograd.grad(last.square().sum(), peftkit.parameters(model)):
        assert gradient.abs().amin() > 0  # each number of each column, five tokens out of the window


def test_gradient_checkpointing_is_plain():
    found = []
    for reentrant in (None, True, False):
        model = prefixed(models.llama()).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([p.grad for p in peftkit.parameters(model)])
    for other in found[1:]:
        assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(found[0], other, strict=True))


def test_it_compiles_in_one_graph():
    model = prefixed(models.llama(layers=1))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for names in (("default",), ()):
            peftkit.activate(model, *names)
            torch.testing.assert_close(models.output(compiled, IDS), models.output(model, IDS))


def test_either_of_two_can_leave_and_the_config_is_as_it_was():
    for first, second in (("a", "b"), ("b", "a")):
        base = models.llama()
        model = copy.deepcopy(base)
        attention = model.model.layers[0].self_attn
        implementation = model.config._attn_implementation
        peftkit.inject(model, PrefixTuningConfig(length=2), name="a")
        peftkit.inject(model, PrefixTuningConfig(length=3, layers=0), name="b")
        assert model.config._attn_implementation == implementation
        peftkit.eject(model, first)
        peftkit.activate(model, second)
        assert not torch.allclose(model(IDS).logits, base(IDS).logits)
        peftkit.eject(model, second)
        assert attention.config is model.config
        assert torch.equal(model(IDS).logits, base(IDS).logits)


def test_two_act_as_one_of_both():
    model = prefixed(models.llama().double(), shift_positions=False)
    peftkit.inject(model, PrefixTuningConfig(length=2, shift_positions=False), name="b")
    peftkit.activate(model, "default", "b")
    both = prefixed(models.llama().double(), length=P + 2, shift_positions=False)
    with torch.no_grad():
        for one, a, b in zip(adapters(both), adapters(model), adapters(model, "b"), strict=True):
            one.key.copy_(torch.cat([a.key, b.key], 1))
            one.value.copy_(torch.cat([a.value, b.value], 1))
    torch.testing.assert_close(model(IDS).logits, both(IDS).logits)


def test_lora_acts_beside_it():
    model = prefixed(models.llama().double())
    peftkit.inject(model, LoRAConfig(r=2, targets="all-linear"), name="lora")
    with torch.no_grad():
        for p in peftkit.parameters(model, "lora"):
            p.normal_(std=0.3)
    peftkit.activate(model, "default", "lora")
    together = model(IDS).logits
    other = models.llama().double()
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(model.get_parameter(name))
        for name, module in model.named_modules():
            pair = getattr(getattr(module, "peftkit", None), "lora", None)
            if pair is not None:
                other.get_submodule(name).weight.add_(pair.lora_B @ pair.lora_A * pair.scale)
    alone = prefixed(other)
    torch.testing.assert_close(together, alone(IDS).logits)


def test_another_implementation_may_be_set_meanwhile_and_weights_are_of_tokens():
    base = models.llama().double()
    model = prefixed(base)
    base.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    out = model(IDS, output_attentions=True)
    assert torch.equal(out.logits, prefixed(base)(IDS).logits)
    assert out.attentions[0].shape == (2, 4, 7, 7)
    assert (out.attentions[0].sum(-1) < 1 - 1e-6).all()


def test_it_starts_from_real_tokens():
    for make in (models.llama, models.gpt2):
        base = make().double()
        model, first = prefixed(base), torch.tensor([4, 5, 6])
        start_from_tokens(model, first)
        expected = base(torch.cat([first.expand(2, -1), IDS], 1)).logits[:, P:]
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-10, atol=1e-10)
        with pytest.raises(ValueError, match="4 tokens, but 'default' is 3 long"):
            start_from_tokens(model, torch.tensor([1, 2, 3, 4]))


def test_explicit_positions_are_shifted_too_and_rotary_ones_only_by_choice():
    model, free = prefixed(models.llama().double()), prefixed(models.llama().double(), shift_positions=False)
    at = torch.arange(7).expand(2, -1)
    assert torch.equal(model(IDS, position_ids=at).logits, model(IDS).logits)
    assert torch.equal(free(IDS, position_ids=at + P).logits, model(IDS).logits)
    assert not torch.allclose(free(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("shift", [True, False])
def test_t5_has_three_sets_and_generates_alike_with_and_without_cache(shift):
    base = t5()
    with torch.no_grad():
        for p in base.parameters():
            p.mul_(3)
    model = prefixed(base, shift_positions=shift)
    assert len(list(adapters(model))) == 6
    model.generation_config.eos_token_id = None
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "decoder_start_token_id": 1, "output_logits": True}
    how["return_dict_in_generate"] = True
    for extra in ({}, {"cache_implementation": "static"}):
        cached, plain = model.generate(IDS, **how, **extra), model.generate(IDS, use_cache=False, **how)
        for a, b in zip(cached.logits, plain.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_copy_works_here_and_in_a_process_that_has_seen_no_prefix(tmp_path):
    model = prefixed(models.llama())
    expected = model(IDS).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, expected)
    peftkit.eject(twin)
    assert twin.model.layers[0].self_attn.config is twin.config
    assert torch.equal(model(IDS).logits, expected)
    (tmp_path / "model").write_bytes(pickle.dumps((model, IDS, expected)))
    code = f"""
import pickle, torch
model, ids, expected = pickle.load(open({str(tmp_path / "model")!r}, 'rb'))
assert torch.equal(model(ids).logits, expected)
import peftkit
peftkit.eject(model)
assert model.model.layers[0].self_attn.config is model.config
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_saved_base_knows_nothing_of_it(tmp_path):
    model = prefixed(models.llama())
    model.save_pretrained(tmp_path)
    assert "peftkit" not in (tmp_path / "config.json").read_text()
