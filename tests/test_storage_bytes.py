"""Law 9, byte by byte: truncated files, flipped bits, headers that make no sense."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from storage_helpers import (
    CONFIG,
    TENSORS,
    adapter_bits,
    header_length,
    refused,
    same,
    small,
    snapshot,
    trained,
    unchanged,
)  # fmt: skip

import peftkit
from peftkit import StorageError

A0 = "base_model.model.0.lora_A.weight"
B0 = "base_model.model.0.lora_B.weight"


def test_truncated_anywhere(saved, tmp_path):
    whole = (saved / TENSORS).read_bytes()
    header = header_length(saved / TENSORS)
    places = {
        0,
        1,
        7,
        8,
        9,
        8 + header // 2,
        7 + header,
        8 + header,
        9 + header,
        len(whole) - 97,
        len(whole) - 4,
        len(whole) - 1,
    }
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
    before, refusal = snapshot(model), ""
    try:
        (folder / name).write_bytes(changed)
        peftkit.load(model, folder)
    except StorageError as error:
        refusal = str(error)
    finally:
        (folder / name).write_bytes(whole[name])
    if refusal:
        assert str(folder) in refusal
        assert unchanged(before, model)
        return True
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


@pytest.mark.parametrize(
    "word", [b"peftkit", b"peftkit_digest", b"__metadata__", b"digest", b'"version', b"alpha", b"samples"]
)
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
