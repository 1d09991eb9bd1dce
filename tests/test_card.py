"""The model card: what it says is so, whatever a base is called, and nobody's own README is written over."""

from __future__ import annotations

import contextlib
import itertools
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_helpers import README, llama, small, trained
from torch import nn

import peftkit
from peftkit import LoRAConfig, PrefixTuningConfig
from peftkit.ledger import require
from peftkit.method import registered
from peftkit.storage import card, tensorfile
from peftkit.storage.writer import Origin, save

yaml = pytest.importorskip("yaml")


def parts(text: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """The metadata, the table, and the Python in it."""
    _, head, body = text.split("---\n", 2)
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (.*) \|$", body, re.MULTILINE))
    (code,) = re.findall(r"^```python\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
    return yaml.safe_load(head), rows, code


def card_of(model: nn.Module, folder: Path) -> tuple[dict[str, Any], dict[str, str], str]:
    peftkit.save(model, folder)
    return parts((folder / README).read_text("utf-8"))


def named(base: str, config: Any = None) -> nn.Module:
    model = llama()
    model.config._name_or_path = base
    peftkit.inject(model, config or LoRAConfig(r=2, alpha=6, targets=["q_proj", "down_proj"]))
    return model


def test_what_it_says_is_so(tmp_path):
    model = named("org/base-1.5")
    total = sum(p.numel() for n, p in model.named_parameters() if ".peftkit." not in n)
    head, rows, code = card_of(model, tmp_path / "a")
    assert head == {
        "library_name": "peft", "base_model": "org/base-1.5", "base_model_relation": "adapter", "tags": ["peftkit", "lora"],
    }  # fmt: skip
    stored = tensorfile.read(tmp_path / "a" / "adapter_model.safetensors").tensors
    count = sum(t.numel() for t in stored.values())
    assert rows["method"] == "`lora`" and {"`r=2`", "`alpha=6`"} <= set(rows["settings"].split(", "))
    assert rows["adapted modules"] == "4: `model.layers.*.self_attn.q_proj` ×2, `model.layers.*.mlp.down_proj` ×2"
    assert rows["parameters"] == f"{count:,}, {100 * count / total:.3g} % of the base's {total:,}"
    assert rows["bytes"] == f"{4 * count:,}" and rows["dtype"] == "`float32`"
    assert rows["base"].startswith("`org/base-1.5`, a `LlamaForCausalLM`; 4 of its weights are known by a sample")
    assert "trained whole" not in rows
    assert 'LlamaForCausalLM.from_pretrained("org/base-1.5")' in code and "peftkit.merge(model)" in code
    compile(code, "card", "exec")


def test_how_to_load_it_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = trained(small())
    _, rows, code = card_of(model, tmp_path / "path/to/this/directory")
    assert "model = ...  # the base" in code and rows["base"].startswith("of no known name, a `Sequential`")
    x = torch.randn(2, 6)
    space: dict[str, Any] = {"base": small()}
    exec(code.replace("model = ...", "model = base"), space)
    torch.testing.assert_close(space["base"](x), model(x))


def test_more_than_one_kind_of_tensor(tmp_path):
    model = small().bfloat16()
    peftkit.inject(model, LoRAConfig(r=1, targets="0", also_train=["2"]))
    _, rows, _ = card_of(model, tmp_path / "a")
    assert rows["adapted modules"] == "1: `0`" and rows["trained whole"] == "1: `2`"
    assert rows["dtype"] == "`bfloat16`, `float32`"
    assert rows["parameters"].startswith("68,") and rows["bytes"] == f"{14 * 4 + 54 * 2}"


def test_what_does_not_merge_says_why(tmp_path):
    head, _, code = card_of(named("org/base", PrefixTuningConfig(length=2)), tmp_path / "a")
    assert head["tags"] == ["peftkit", "prefix"] and "merge" not in code
    assert "It cannot be merged into the base's weights: a prefix is" in (tmp_path / "a" / README).read_text("utf-8")


@pytest.mark.parametrize("method", registered())
def test_every_method_has_one(method, tmp_path):
    attached = 0
    for config, make in itertools.product(registered()[method].examples(), (llama, small)):
        model = make()
        with contextlib.suppress(ValueError):  # an example for another model
            peftkit.inject(model, config)
            attached += 1
            head, rows, code = card_of(model, tmp_path / "a")
            compile(code, "card", "exec")
            assert method in head["tags"] and rows["method"] == f"`{method}`"
    assert attached


@settings(max_examples=40, deadline=None)
@given(base=st.text(min_size=1) | st.text("ab/.-\\|`\n:#'\"<>[]{}*_! ", min_size=1))
def test_no_name_breaks_it(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("card") / "a"
    model = trained(small())
    model.config = types.SimpleNamespace(_name_or_path=base)  # type: ignore[assignment]
    head, rows, code = card_of(model, folder)
    assert head["tags"] == ["peftkit", "lora"] and len(rows) == 7
    if "base_model" in head:
        assert head["base_model"] == base and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base, re.ASCII)
    compile(code, "card", "exec")
    text = (folder / README).read_text("utf-8")
    assert card.unedited(text) and text.count("<!--") == 1
    cells = rows["base"].replace("\\|", "")
    assert "|" not in cells and "\n" not in cells


@pytest.mark.parametrize("base", ["/home/me/secret/base", "C:\\work\\secret\\base", "./secret/base"])
def test_a_path_is_no_name_of_a_model(tmp_path, base):
    head, rows, _ = card_of(named(base), tmp_path / "a")
    assert "base_model" not in head and rows["base"].startswith("a local one, `base`")
    assert "secret" not in (tmp_path / "a" / README).read_text("utf-8")


def test_a_directory_here_is_no_name_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    head, _, code = card_of(named("runs/base"), tmp_path / "a")
    assert "base_model" not in head and "model = ..." in code


def test_of_a_skeleton_nothing_is_said(tmp_path):
    model = named("another/name")
    attachment = require(model)[1].attachments["default"]
    origin = Origin(name="org/base")
    save(model, attachment, tmp_path / "a", origin=origin)
    head, rows, code = parts((tmp_path / "a" / README).read_text("utf-8"))
    assert head["base_model"] == rows["base"].strip("`") == "org/base" and "%" not in rows["parameters"]
    assert "model = ..." in code


def test_its_own_is_replaced_and_others_are_not(tmp_path):
    folder = tmp_path / "a"
    first = card_of(trained(small()), folder)[1]
    model = trained(small(), LoRAConfig(r=1, targets="all-linear"))
    assert first["settings"] != card_of(model, folder)[1]["settings"]
    edited = (folder / README).read_text("utf-8").replace("# A `lora` adapter", "# Mine")
    for mine in (edited, edited.replace("\n", "\r\n"), "mine", "", (folder / README).read_text("utf-8") + "\nmore\n"):
        (folder / README).write_bytes(mine.encode())
        peftkit.save(trained(small()), folder)
        assert (folder / README).read_bytes() == mine.encode()
    (folder / README).write_bytes(b"\xff\xfe")
    peftkit.save(model, folder)
    assert (folder / README).read_bytes() == b"\xff\xfe"
    (folder / README).unlink()
    (folder / README).symlink_to("nowhere")
    peftkit.save(model, folder)
    assert (folder / README).is_symlink()
