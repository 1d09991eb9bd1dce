"""Every kernel, compiled for chips that are not here: the gate holds, and the committed table is what the compiler says."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import pytest

if sys.platform != "linux":
    pytest.skip("there is no Triton", allow_module_level=True)

import triton

from benchmarks.resources import CHIPS, PATH, Row, measure, needs_matrix, variants

STORED = json.loads(PATH.read_text())
VARIANTS = {variant.name: variant for variant in variants()}


def stored(kernel: str) -> list[Row]:
    return [Row(**row) for row in STORED["rows"] if row["kernel"] == kernel]


def test_the_table_is_complete():
    assert {(row["kernel"], row["chip"]) for row in STORED["rows"]} == {(name, c) for name in VARIANTS for c in CHIPS}
    assert len(STORED["rows"]) == len(VARIANTS) * len(CHIPS) > 100


@pytest.mark.parametrize("row", [Row(**row) for row in STORED["rows"]], ids=lambda row: f"{row.kernel} sm_{row.chip}")
def test_the_gate_holds(row):
    assert row.broken(matrix=needs_matrix(VARIANTS[row.kernel])) is None


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_is_true(name):
    for row in stored(name):
        made = measure(VARIANTS[name], row.chip)
        assert made.broken(matrix=needs_matrix(VARIANTS[name])) is None
        if triton.__version__ == STORED["triton"]:  # another compiler may need other registers
            assert made == row, "run `python -m benchmarks.resources`"


def test_the_gate_sees_what_breaks_it():
    good = stored("expand forward, bf16, r 16")[0]
    assert good.broken(matrix=True) is None
    for change in ({"stack": 8}, {"shared": CHIPS[good.chip] + 1}, {"matrix_instructions": 0}):
        assert replace(good, **change).broken(matrix=True) is not None
    assert replace(good, matrix_instructions=0).broken(matrix=False) is None
    assert asdict(good)["registers"] > 0
