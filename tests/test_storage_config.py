"""Law 9 for `adapter_config.json`: edited, of the wrong kind, or with flags that change what the tensors mean."""

from __future__ import annotations

import json

import pytest
from storage_helpers import (
    CONFIG,
    TENSORS,
    adapter_bits,
    config_of,
    refused,
    rewrite,
    same,
    set_config,
    small,
    tensors_of,
    trained,
)

import peftkit


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 4),
        ("r", 0),
        ("lora_alpha", 7),
        ("lora_alpha", float("nan")),
        ("use_rslora", True),
        ("target_modules", ["0"]),
        ("rank_pattern", {"0": 1}),
        ("modules_to_save", ["2"]),
        ("peft_type", "VERA"),
        ("lora_dropout", 0.5),
    ],
)
def test_a_config_that_was_edited(folder, key, value):
    set_config(folder, **{key: value})
    refused(folder, CONFIG, *([key] if key != "peft_type" else []))


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "use_rslora", "alpha_pattern"])
def test_a_config_that_lost_a_key(folder, key):
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config_of(folder).items() if k != key}))
    refused(folder, CONFIG, key)


def test_what_may_change_in_the_config(folder):
    found = config_of(folder)
    found |= {
        "base_model_name_or_path": "elsewhere",
        "task_type": "CAUSAL_LM",
        "revision": "main",
        "inference_mode": False,
    }
    found |= {
        "peft_version": "9.9",
        "auto_mapping": {"a": "b"},
        "lora_alpha": 6.0,
        "lora_dropout": 0,
        "something_new": [1],
    }
    (folder / CONFIG).write_text(json.dumps(dict(reversed(found.items()))))
    model = small()
    peftkit.load(model, folder)
    assert same(adapter_bits(model), adapter_bits(trained(small())))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("use_qalora", True),
        ("use_bdlora", {"a": 1}),
        ("layer_replication", [[0, 4]]),
        ("megatron_config", {"a": 1}),
        ("alora_invocation_tokens", [1]),
        ("arrow_config", {"a": 1}),
        ("target_parameters", ["w"]),
        ("kasa_config", {"a": 1}),
        ("monteclora_config", {"a": 1}),
        ("velora_config", {"a": 1}),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "tomorrow's"),
    ],
)
def test_flags_that_mean_something_else(folder, own, key, value):
    if not own:
        rewrite(folder, tensors_of(folder))
    set_config(folder, **{key: value})
    refused(folder, CONFIG, key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", 3),
        ("r", "2"),
        ("r", None),
        ("r", 2.5),
        ("r", [2]),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 0),
        ("lora_alpha", "6"),
        ("lora_alpha", [6]),
        ("lora_alpha", float("inf")),
        ("lora_alpha", True),
        ("target_modules", 5),
        ("target_modules", {"0": 1}),
        ("target_modules", [1]),
        ("target_modules", "("),
        ("target_modules", ["0", "2", None]),
        ("rank_pattern", 5),
        ("rank_pattern", {"(": 1}),
        ("rank_pattern", {"0": 1}),
        ("rank_pattern", [1]),
        ("alpha_pattern", {"0": float("nan")}),
        ("alpha_pattern", {"0": "x"}),
        ("modules_to_save", "0"),
        ("modules_to_save", [1]),
        ("modules_to_save", {"a": 1}),
        ("lora_dropout", -0.1),
        ("lora_dropout", 1.0),
        ("lora_dropout", "x"),
        ("lora_dropout", float("nan")),
        ("layers_to_transform", "x"),
        ("layers_to_transform", {"a": 1}),
        ("trainable_token_indices", 5),
        ("trainable_token_indices", {"0": 5}),
        ("trainable_token_indices", {"0": []}),
        ("exclude_modules", 5),
        ("peft_type", None),
        ("peft_type", 5),
        ("peft_type", ["LORA"]),
        ("peft_type", "LORE"),
    ],
)
def test_kinds_and_values_that_make_no_sense(foreign, key, value):
    set_config(foreign, **{key: value})
    refused(foreign, CONFIG)


def test_an_unknown_method_names_the_nearest(foreign):
    set_config(foreign, peft_type="LORRA")
    refused(foreign, CONFIG, "'LORRA'", "LORA")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "5", '"LORA"', "{}", "{", "[" * 100_000, '{"peft_type": ' * 50_000, "\0"]
)
def test_config_that_is_none(folder, text):
    (folder / CONFIG).write_text(text)
    refused(folder, CONFIG)


def test_config_in_another_encoding(folder):
    (folder / CONFIG).write_bytes((folder / CONFIG).read_text().encode("utf-16"))
    refused(folder, CONFIG)


def test_a_huge_config(folder, monkeypatch):
    with (folder / CONFIG).open("r+b") as file:
        file.truncate(200_000_000)  # sparse
    refused(folder, CONFIG, "200,000,000 bytes")


def test_a_later_version(folder):
    whole = (folder / TENSORS).read_bytes()
    raw = whole.replace(b'\\"version\\":1', b'\\"version\\":2', 1)
    assert raw != whole
    digest = raw[raw.index(b"peftkit_digest") + 17 :][:32]
    import hashlib

    blank = raw.replace(digest, b"0" * 32, 1)[8:]
    (folder / TENSORS).write_bytes(raw.replace(digest, hashlib.blake2b(blank, digest_size=16).hexdigest().encode(), 1))
    refused(folder, "later peftkit", "version 2")
