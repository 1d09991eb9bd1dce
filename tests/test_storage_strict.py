"""Law 9: what is damaged, incomplete or for another model is an error that names it; the model is bit for bit as before."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from storage_helpers import (
    CONFIG, TENSORS, adapter_bits, config_of, header_length, llama, rewrite, same, set_config, small, snapshot,
    tensors_of, trained, unchanged,
)  # fmt: skip
from torch import nn

import peftkit
from peftkit import LoRAConfig, StorageError

A0 = "base_model.model.0.lora_A.weight"
B0 = "base_model.model.0.lora_B.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("strict") / "saved"
    peftkit.save(trained(small()), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.fixture
def foreign(folder) -> Path:
    """The same, as another program writes it: without our checksum."""
    rewrite(folder, tensors_of(folder))
    return folder


def refused(folder: Path, *words: str, model: nn.Module | None = None, **kwargs: Any) -> str:
    """Loading raises, says `words`, and leaves the model as it was: bare, and with another adapter on it."""
    message = ""
    for attached in (False, True):
        used = copy.deepcopy(model) if model is not None else small()
        if attached:
            peftkit.inject(used, LoRAConfig(r=1, targets="all-linear"), name="other")
        before = snapshot(used)
        with pytest.raises(StorageError) as caught:
            peftkit.load(used, folder, **kwargs)
        assert unchanged(before, used)
        message = str(caught.value)
        for word in words:
            assert word in message, message
    return message


def test_whole_it_loads(folder):
    model = small()
    peftkit.load(model, folder)
    assert same(adapter_bits(model), adapter_bits(trained(small())))


def test_foreign_it_loads(foreign):
    model = small()
    peftkit.load(model, foreign)
    assert same(adapter_bits(model), adapter_bits(trained(small())))


# -- tensors ------------------------------------------------------------------------------------------------------------


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = tensors_of(folder)
    edit(tensors)
    rewrite(folder, tensors)


@pytest.mark.parametrize("key", [A0, B0])
def test_missing_tensor(foreign, key):
    change(foreign, lambda t: t.pop(key))
    refused(foreign, TENSORS, f"missing {key}")


def test_missing_pair(foreign):
    change(foreign, lambda t: [t.pop(A0), t.pop(B0)])
    refused(foreign, TENSORS, "no tensors for '0'", CONFIG)


@pytest.mark.parametrize("key", ["base_model.model.3.lora_A.weight", "base_model.model.1.lora_A.weight"])
def test_unexpected_module(foreign, key):
    change(foreign, lambda t: t.update({key: torch.ones(2, 6)}))
    refused(foreign, f"unexpected {key}")


@pytest.mark.parametrize(
    "key",
    ["base_model.model.0.bias", "base_model.model.0.lora_C.weight", "base_model.model.0.lora_magnitude_vector",
     "0.lora_A.weight", "base_model.model.classifier.weight", "base_model.model.0.lora_A"],
)  # fmt: skip
def test_unexpected_tensor(foreign, key):
    change(foreign, lambda t: t.update({key: torch.ones(2, 6)}))
    refused(foreign, f"unexpected {key}", TENSORS)


@pytest.mark.parametrize("shape", [(2, 7), (2,), (2, 6, 1), (6, 2), (2, 0)])
def test_misshapen_tensor(foreign, shape):
    change(foreign, lambda t: t.update({A0: torch.ones(shape)}))
    refused(foreign, "lora_A.weight", str(shape))


@pytest.mark.parametrize("shape", [(8, 3), (8,), (7, 2), ()])
def test_misshapen_second_tensor(foreign, shape):
    change(foreign, lambda t: t.update({B0: torch.ones(shape)}))
    refused(foreign, B0, str(shape), "(8, 2)", TENSORS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite(foreign, value, dtype):
    def edit(tensors):
        tensors[B0] = tensors[B0].to(dtype)
        tensors[B0][3, 1] = value

    change(foreign, edit)
    refused(foreign, TENSORS, f"{B0} has values that are not finite")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64])
def test_dtypes_that_are_no_weights(foreign, dtype):
    change(foreign, lambda t: t.update({A0: t[A0].to(dtype)}))
    refused(foreign, TENSORS, f"{A0} is {dtype}")


def test_no_tensors_at_all(foreign):
    rewrite(foreign, {})
    refused(foreign, "holds no tensors", TENSORS)


@pytest.mark.parametrize("edit", ["missing", "nan", "swapped"])
def test_another_program_that_keeps_our_metadata(folder, edit):
    from safetensors import safe_open

    with safe_open(folder / TENSORS, framework="pt") as file:
        metadata = file.metadata()
    tensors = tensors_of(folder)
    if edit == "missing":
        del tensors[A0]
    elif edit == "nan":
        tensors[A0][0, 0] = float("nan")
    else:
        tensors["base_model.model.0.lora_A.weight"] = tensors[A0].flip(0)
    save_file(tensors, folder / TENSORS, metadata)
    words = ["checksum", TENSORS] + ([f"{A0} has values that are not finite"] if edit == "nan" else [])
    refused(folder, *words)


def test_whole_modules_and_rows(tmp_path):
    class Net(nn.Module):
        def __init__(self, rows: int = 9):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.mid, self.head = nn.Embedding(rows, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    config = LoRAConfig(r=1, targets="mid", also_train={"head": None, "table": [2, 5]})
    peftkit.save(trained(Net(), config), tmp_path)
    prefix = "base_model.model."
    tensors = tensors_of(tmp_path)
    rewrite(tmp_path, {**tensors, f"{prefix}head.weight": tensors[f"{prefix}head.weight"].to(torch.int8)})
    refused(tmp_path, f"{prefix}head.weight is torch.int8, expected torch.float32", model=Net())
    rewrite(tmp_path, {k: v for k, v in tensors.items() if k != f"{prefix}head.bias"})
    refused(tmp_path, f"missing {prefix}head.bias", model=Net())
    rewrite(tmp_path, {**tensors, f"{prefix}head.extra": torch.ones(1)})
    refused(tmp_path, f"unexpected {prefix}head.extra", model=Net())
    delta = f"{prefix}table.token_adapter.trainable_tokens_delta"
    rewrite(tmp_path, {**tensors, delta: torch.ones(3, 4)})
    refused(tmp_path, f"{delta} has shape (3, 4), expected (2, 4)", model=Net())
    rewrite(tmp_path, tensors)
    refused(tmp_path, "token 5 lies beyond the 4 rows of 'table'", model=Net(rows=4))
    set_config(tmp_path, trainable_token_indices={"table": [2, -5]})
    refused(tmp_path, "trainable_token_indices", CONFIG, model=Net())
    set_config(tmp_path, trainable_token_indices={"tabel": [2, 5]})
    refused(tmp_path, "no module 'tabel'", "'table'", model=Net())


# -- bytes --------------------------------------------------------------------------------------------------------------


def test_truncated_anywhere(saved, tmp_path):
    whole = (saved / TENSORS).read_bytes()
    header = header_length(saved / TENSORS)
    places = {0, 1, 7, 8, 9, 8 + header // 2, 7 + header, 8 + header, 9 + header, len(whole) - 97, len(whole) - 4, len(whole) - 1}
    folder = Path(shutil.copytree(saved, tmp_path / "a"))
    for size in sorted(places):
        (folder / TENSORS).write_bytes(whole[:size])
        refused(folder, TENSORS, "truncated or damaged")
    for extra in (b"\0", b"x" * 64, whole):
        (folder / TENSORS).write_bytes(whole + extra)
        refused(folder, TENSORS, "truncated or damaged")


def test_truncated_config(saved, tmp_path):
    whole = (saved / CONFIG).read_bytes()
    folder = Path(shutil.copytree(saved, tmp_path / "a"))
    for size in (0, 1, len(whole) // 2, len(whole) - 3):
        (folder / CONFIG).write_bytes(whole[:size])
        refused(folder, CONFIG, "no JSON")


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.fixture(scope="module")
def scratch(saved, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("flips") / "a"))
    return folder, {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)}


def harmless_or_refused(scratch: tuple[Path, dict[str, bytes]], name: str, changed: bytes) -> bool:
    """Whether it was refused; if not, everything that was loaded is as it was saved."""
    folder, whole = scratch
    model, good = small(), trained(small())
    before = snapshot(model)
    try:
        (folder / name).write_bytes(changed)
        peftkit.load(model, folder)
    except StorageError as error:
        assert str(folder) in str(error)
        assert unchanged(before, model)
        return True
    finally:
        (folder / name).write_bytes(whole[name])
    assert same(adapter_bits(model), adapter_bits(good))
    assert peftkit.adapters(model) == peftkit.adapters(good)
    x = torch.linspace(-1, 1, 6)
    assert torch.equal(model(x), good(x))
    return False


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.floats(0, 1, exclude_max=True), part=st.sampled_from(["length", "header", "data"]))
def test_no_flipped_bit_of_the_tensors_goes_unseen(scratch, at, part):
    whole = scratch[1][TENSORS]
    header = struct.unpack("<Q", whole[:8])[0]
    begin, end = {"length": (0, 8), "header": (8, 8 + header), "data": (8 + header, len(whole))}[part]
    bit = 8 * begin + int(at * 8 * (end - begin))
    assert harmless_or_refused(scratch, TENSORS, flip(whole, bit))


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.floats(0, 1, exclude_max=True))
@example(0.0)
def test_a_flipped_bit_of_the_config_is_seen_or_harmless(scratch, at):
    whole = scratch[1][CONFIG]
    harmless_or_refused(scratch, CONFIG, flip(whole, int(at * 8 * len(whole))))


@pytest.mark.parametrize("word", [b"peftkit", b"peftkit_digest", b"__metadata__", b"digest", b'"version', b"alpha", b"samples"])
def test_every_bit_of_the_words_that_the_checks_hang_on(scratch, word):
    whole = scratch[1][TENSORS]
    at = whole.index(word)
    for bit in range(8 * at, 8 * (at + len(word))):
        assert harmless_or_refused(scratch, TENSORS, flip(whole, bit))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=64), length=st.integers(0, 2**64 - 1) | st.none())
def test_any_bytes_are_refused(scratch, data, length):
    raw = data if length is None else struct.pack("<Q", length) + data
    assert harmless_or_refused(scratch, TENSORS, raw)


def header_of(*entries: tuple[str, Any], metadata: Any = None) -> bytes:
    body = dict(entries) if metadata is None else {"__metadata__": metadata, **dict(entries)}
    raw = json.dumps(body).encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(dtype: Any = "F32", shape: Any = (1,), span: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (header_of((A0, entry(shape=(2, 6), span=(0, 4)))) + b"\0" * 4, "takes 4 bytes"),
        (header_of((A0, entry(span=(4, 8)))) + b"\0" * 8, "expected 0"),
        (header_of((A0, entry()), (B0, entry(span=(0, 4)))) + b"\0" * 4, "expected 4"),
        (header_of((A0, entry()), (B0, entry(span=(8, 12)))) + b"\0" * 12, "expected 4"),
        (header_of((A0, entry(shape=(-1,), span=(0, 4)))) + b"\0" * 4, "at least 0"),
        (header_of((A0, entry(shape=(-1, -1)))) + b"\0" * 4, "at least 0"),
        (header_of((A0, entry(shape=(True,)))) + b"\0" * 4, "at least 0"),
        (header_of((A0, entry(shape=(1.0,)))) + b"\0" * 4, "at least 0"),
        (header_of((A0, entry(shape="1"))) + b"\0" * 4, "shape"),
        (header_of((A0, entry(shape=(2**70, 0), span=(0, 0)))), "shape"),
        (header_of((A0, entry(span=(0,)))) + b"\0" * 4, "shape"),
        (header_of((A0, entry(dtype="F33"))) + b"\0" * 4, "unknown dtype"),
        (header_of((A0, entry(dtype=["F32"]))) + b"\0" * 4, "unknown dtype"),
        (header_of((A0, {"dtype": "F32"})) + b"\0" * 4, "data_offsets"),
        (header_of((A0, [1])) + b"\0" * 4, "data_offsets"),
        (header_of((A0, entry()), metadata=[1]) + b"\0" * 4, "metadata"),
        (header_of((A0, entry()), metadata={"a": 1}) + b"\0" * 4, "metadata"),
        (struct.pack("<Q", 2) + b"[]", "no JSON object"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "no JSON"),
        (struct.pack("<Q", 5_009) + b'{"a": ' + b"9" * 5_002 + b"}", "JSON"),
        (struct.pack("<Q", 2**63) + b"{}", "header"),
        (struct.pack("<Q", 3) + b"\xff\xfe{", "no JSON"),
    ],
)  # fmt: skip
def test_headers_that_make_no_sense(folder, raw, word):
    (folder / TENSORS).write_bytes(raw)
    refused(folder, TENSORS, word)


# -- config -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("r", 4), ("r", 0), ("lora_alpha", 7), ("lora_alpha", float("nan")), ("use_rslora", True), ("target_modules", ["0"]),
     ("rank_pattern", {"0": 1}), ("modules_to_save", ["2"]), ("peft_type", "VERA"), ("lora_dropout", 0.5)],
)  # fmt: skip
def test_a_config_that_was_edited(folder, key, value):
    set_config(folder, **{key: value})
    refused(folder, CONFIG, *([key] if key != "peft_type" else []))


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "use_rslora", "alpha_pattern"])
def test_a_config_that_lost_a_key(folder, key):
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config_of(folder).items() if k != key}))
    refused(folder, CONFIG, key)


def test_what_may_change_in_the_config(folder):
    found = config_of(folder)
    found |= {"base_model_name_or_path": "elsewhere", "task_type": "CAUSAL_LM", "revision": "main", "inference_mode": False}
    found |= {"peft_version": "9.9", "auto_mapping": {"a": "b"}, "lora_alpha": 6.0, "lora_dropout": 0, "something_new": [1]}
    (folder / CONFIG).write_text(json.dumps(dict(reversed(found.items()))))
    model = small()
    peftkit.load(model, folder)
    assert same(adapter_bits(model), adapter_bits(trained(small())))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("bias", "all"), ("lora_bias", True), ("use_qalora", True), ("use_bdlora", {"a": 1}),
     ("layer_replication", [[0, 4]]), ("megatron_config", {"a": 1}), ("alora_invocation_tokens", [1]),
     ("arrow_config", {"a": 1}), ("target_parameters", ["w"]), ("kasa_config", {"a": 1}), ("monteclora_config", {"a": 1}),
     ("velora_config", {"a": 1}), ("init_lora_weights", "loftq"), ("init_lora_weights", "corda"),
     ("init_lora_weights", "lora_ga"), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "tomorrow's")],
)  # fmt: skip
def test_flags_that_mean_something_else(folder, own, key, value):
    if not own:
        rewrite(folder, tensors_of(folder))
    set_config(folder, **{key: value})
    refused(folder, CONFIG, key)


@pytest.mark.parametrize(
    ("key", "value"),
    [("r", 0), ("r", 3), ("r", "2"), ("r", None), ("r", 2.5), ("r", [2]), ("lora_alpha", float("nan")), ("lora_alpha", 0),
     ("lora_alpha", "6"), ("lora_alpha", [6]), ("lora_alpha", float("inf")), ("lora_alpha", True), ("target_modules", 5),
     ("target_modules", {"0": 1}), ("target_modules", [1]), ("target_modules", "("), ("target_modules", ["0", "2", None]),
     ("rank_pattern", 5), ("rank_pattern", {"(": 1}), ("rank_pattern", {"0": 1}), ("rank_pattern", [1]),
     ("alpha_pattern", {"0": float("nan")}), ("alpha_pattern", {"0": "x"}), ("modules_to_save", "0"),
     ("modules_to_save", [1]), ("modules_to_save", {"a": 1}), ("lora_dropout", -0.1), ("lora_dropout", 1.0),
     ("lora_dropout", "x"), ("lora_dropout", float("nan")), ("layers_to_transform", "x"), ("layers_to_transform", {"a": 1}),
     ("trainable_token_indices", 5), ("trainable_token_indices", {"0": 5}), ("trainable_token_indices", {"0": []}),
     ("exclude_modules", 5), ("peft_type", None), ("peft_type", 5), ("peft_type", ["LORA"]), ("peft_type", "LORE")],
)  # fmt: skip
def test_kinds_and_values_that_make_no_sense(foreign, key, value):
    set_config(foreign, **{key: value})
    refused(foreign, CONFIG)


def test_an_unknown_method_names_the_nearest(foreign):
    set_config(foreign, peft_type="LORRA")
    refused(foreign, CONFIG, "'LORRA'", "'LORA'")


@pytest.mark.parametrize("text", ["", "[]", "null", "5", '"LORA"', "{}", "{", "[" * 100_000, '{"peft_type": ' * 50_000, "\0"])
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


# -- files --------------------------------------------------------------------------------------------------------------


def test_pickles_are_not_read(folder):
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nabort\n(tR.")  # a process that unpickles this is gone
    refused(folder, TENSORS, "adapter_model.bin is a pickle", "safetensors")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_file_that_is_not_there(folder, name):
    (folder / name).unlink()
    refused(folder, name, "missing")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_file_that_is_a_directory(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, name, "cannot be read")


def test_no_directory(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no directory")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "file")


def test_config_of_one_save_and_tensors_of_another(folder, tmp_path):
    peftkit.save(trained(small(), LoRAConfig(r=2, alpha=9, targets="all-linear")), tmp_path / "other")
    shutil.copy(tmp_path / "other" / CONFIG, folder / CONFIG)
    refused(folder, CONFIG, "lora_alpha is 9, but was 6")


# -- the base -----------------------------------------------------------------------------------------------------------


def test_another_base_of_the_same_shapes(folder):
    message = refused(folder, "another base", "'0'", "check_base=False", model=small(seed=3))
    assert "and 1 more" in message
    one = small()
    with torch.no_grad():
        one[2].weight.copy_(small(seed=3)[2].weight)
    assert "more" not in refused(folder, "another base", "'2'", model=one)


def test_more_and_fewer_layers(tmp_path):
    config = LoRAConfig(r=1, targets="q_proj")
    peftkit.save(trained(llama(layers=2), config), tmp_path / "two")
    peftkit.save(trained(llama(layers=1), config), tmp_path / "one")
    wide = llama(layers=2)
    with torch.no_grad():  # the first layer alone is no reason to take it
        for own, other in zip(wide.model.layers[0].parameters(), llama(layers=1).model.layers[0].parameters(), strict=True):
            own.copy_(other)
    for strict in (True, False):
        refused(tmp_path / "two", "unexpected", "layers.1.self_attn.q_proj.lora_A.weight", model=llama(layers=1), check_base=strict)
        refused(tmp_path / "one", "no tensors for 'model.layers.1.self_attn.q_proj'", model=wide, check_base=strict)
    for name, base in (("two", llama(layers=1)), ("one", wide)):
        rewrite(tmp_path / name, tensors_of(tmp_path / name))
        refused(tmp_path / name, "layers.1.self_attn.q_proj", model=base)


def test_a_base_of_other_sizes(tmp_path):
    peftkit.save(trained(llama(), LoRAConfig(r=2, targets="q_proj")), tmp_path)
    refused(tmp_path, "layers.0.self_attn.q_proj", model=llama(hidden=32))
    refused(tmp_path, "shape (2, 16), expected (2, 32)", model=llama(hidden=32), check_base=False)


def test_a_module_that_cannot_be_adapted(tmp_path, folder):
    refused(folder, "unexpected", "no module", model=nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Linear(8, 6)))
    wrapped = small()
    torch.nn.utils.parametrizations.weight_norm(wrapped[0])
    before = [n for n, _ in wrapped.named_parameters()]
    with pytest.raises(StorageError):
        peftkit.load(wrapped, folder)
    assert before == [n for n, _ in wrapped.named_parameters()] and not peftkit.adapters(wrapped)


# -- names --------------------------------------------------------------------------------------------------------------


def test_a_name_that_is_taken(folder):
    model = small()
    peftkit.load(model, folder)
    before = snapshot(model)
    with pytest.raises(ValueError, match="attached already"):
        peftkit.load(model, folder)
    with pytest.raises(ValueError, match="attached already"):
        peftkit.load(model, folder, name="default")
    assert unchanged(before, model)
    peftkit.load(model, folder, name="second")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a b", "a.b", "-x", "a:b", "a\n", "ä", "/etc", None, 5])
def test_names_that_would_leave_the_directory(folder, name):
    model = small()
    before = snapshot(model)
    with pytest.raises(ValueError, match="an adapter's name"):
        peftkit.load(model, folder, name=name)
    assert unchanged(before, model)


def test_a_failed_attach_leaves_the_model(folder, monkeypatch):
    """Whatever comes up after everything was read."""
    from peftkit.ledger import Ledger

    model = small()
    before = snapshot(model)

    def fail(*args: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(Ledger, "_graft_readers", fail)
    with pytest.raises(RuntimeError, match="boom"):
        peftkit.load(model, folder)
    assert unchanged(before, model)
