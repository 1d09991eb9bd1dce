"""A real decoder in the real llama.cpp: the same next tokens as in torch; what the docs say of it was measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.measure import RESULTS

FIGURES = RESULTS / "gguf-smollm2.json"


def check(rows: list[dict[str, Any]]) -> None:
    assert rows[0]["adapter"] == "none" and len(rows) == 4
    for row in rows:
        assert row["prompts"] == row["same first"] == row["same ten"] == 6
        assert row["largest difference"] < 3e-4
    for row in rows[1:]:
        assert row["without the adapter"]["same ten"] == 0
        assert row["rows of q and k not reordered"]["same ten"] <= 1


def test_what_is_said_of_it_was_measured():
    check(json.loads(FIGURES.read_text())["rows"]["adapters"])


@pytest.mark.slow
def test_smollm2_in_llama_cpp(tmp_path):
    pytest.importorskip("xllamacpp")
    from benchmarks.llama_cpp.__main__ import BASE, measured

    if not BASE.exists():
        pytest.skip(f"{BASE.name} is not there; `make demo MODEL=smollm2` unpacks it")
    check(measured(BASE, tmp_path))
