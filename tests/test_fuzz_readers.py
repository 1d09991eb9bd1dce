"""Damaged and hostile files, drawn: our own errors alone, nothing written elsewhere, little memory, little time.

What is drawn and what is asked is `benchmarks/fuzz`, which a coverage-guided fuzzer drives too.
"""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import targets
from benchmarks.fuzz.__main__ import NAMES
from benchmarks.fuzz.mutations import joined, parts
from benchmarks.fuzz.seeds import adapters, own_methods
from peftkit.storage import layout

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.fixture(scope="module", autouse=True)
def _warm():
    targets.warm_up()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, **QUIET)
@given(data=st.data())
def test_a_reader(name, data):
    targets.check(targets.TARGETS[name], lambda n: data.draw(st.integers(0, n - 1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=3000, **QUIET)
@given(data=st.data())
def test_a_reader_for_longer(name, data):
    targets.check(targets.TARGETS[name], lambda n: data.draw(st.integers(0, n - 1)))


def test_every_method_has_a_seed_and_every_seed_is_read():
    """Undamaged, or the rest would test refusals alone."""
    assert set(targets.TARGETS) == set(NAMES)
    assert {s.name.partition("-")[0] for s in adapters()} >= {n for n, _ in own_methods()}
    for seed in adapters():
        if seed.name.endswith("-own") or any(seed.name.startswith(n) for n, m in own_methods() if m.peft_reads):

            def whole(draw, folder, seed=seed):
                targets.lay(folder / "adapter", seed.adapter)
                model = copy.deepcopy(seed.model)
                return lambda: targets.peftkit.load(model, folder / "adapter", check_base=False)

            assert targets.check(whole, lambda n: 0) == "fine", seed.name


def test_sealing_anew_is_what_gets_past_the_checksum():
    seed = next(s for s in adapters() if s.name == "lora-0-linear-own")
    raw = seed.adapter[layout.TENSORS]
    header, data = parts(raw) or ({}, b"")
    assert parts(joined(header, data)) is not None
    header["__metadata__"]["more"] = "x"
    for seal, expected in ((True, "fine"), (False, "StorageError")):

        def one(draw, folder, seal=seal):
            made = {**seed.adapter, layout.TENSORS: joined(header, data, seal=seal)}
            targets.lay(folder / "adapter", made)
            return lambda: targets.storage.read(folder / "adapter")

        assert targets.check(one, lambda n: 0) == expected


# -- that the questions can be answered with no -------------------------------------------------------------------------


def _asking(run):
    def target(draw, folder):
        (folder / "a").write_bytes(b"x")
        return lambda: run(folder)

    return target


def _raising(error):
    def run(folder):
        raise error

    return run


def _holding(folder):
    assert len(torch.ones(80 << 20, dtype=torch.uint8)) == 80 << 20


BAD = {
    "KeyError": _raising(KeyError("x")),
    "RuntimeError": _raising(RuntimeError("x")),
    "ValueError": lambda folder: int("x"),
    "cannot be printed": _raising(targets.StorageError("\ud800")),
    "wrote": lambda folder: (folder.parent / "b").write_text("x"),
    "has changed": lambda folder: (folder / "secret" / "secret.json").write_text("x"),
    "of memory": _holding,
    "took": lambda folder: targets.time.sleep(0.2),
}


@pytest.mark.parametrize("says", BAD)
def test_what_must_not_happen_is_found(says, monkeypatch):
    monkeypatch.setattr(targets, "SECONDS", 0.1 if says == "took" else 10)
    monkeypatch.setattr(targets, "_alarm", targets.contextlib.nullcontext)
    with pytest.raises(targets.Finding, match=says):
        targets.check(_asking(BAD[says]), lambda n: 0)


def test_a_hang_is_found(monkeypatch):
    monkeypatch.setattr(targets, "SECONDS", 1 / 3)

    def wait(folder):
        os.mkfifo(folder / "pipe")
        (folder / "pipe").read_bytes()

    with pytest.raises(targets.Finding, match="hangs"):
        targets.check(_asking(wait), lambda n: 0)


def test_the_result_file_is_of_a_clean_run():
    from benchmarks.measure import RESULTS

    rows = json.loads((RESULTS / "fuzz.json").read_text())["rows"]
    assert sorted(row["target"] for row in rows) == sorted(NAMES)
    assert not any(row["findings"] for row in rows) and sum(row["seconds"] for row in rows) >= 590
    for row in rows:
        assert row["outcomes"]["fine"] and row["outcomes"]["StorageError"], row["target"]
