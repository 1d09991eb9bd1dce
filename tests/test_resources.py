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
ROWS = {(row["kernel"], row["chip"]): Row(**row) for row in STORED["rows"]}
VARIANTS = {(variant.name, chip): variant for chip in CHIPS for variant in variants(chip)}


def test_the_table_is_complete():
    assert ROWS.keys() == VARIANTS.keys()
    assert len(STORED["rows"]) == len(ROWS) > 100


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("key", VARIANTS, ids=lambda key: f"{key[0]} sm_{key[1]}")
def test_the_gate_holds_and_the_table_is_true(key):
    made = measure(VARIANTS[key], key[1])
    assert made.broken(matrix=needs_matrix(VARIANTS[key])) is None
    if triton.__version__ == STORED["triton"]:  # another compiler may need other registers
        assert made == ROWS[key], "run `python -m benchmarks.resources`"


def test_the_gate_sees_what_breaks_it():
    good = ROWS["expand forward, bf16, r 16", 90]
    assert good.broken(matrix=True) is None
    for change in ({"stack": 8}, {"shared": CHIPS[good.chip] + 1}, {"matrix_instructions": 0}):
        assert replace(good, **change).broken(matrix=True) is not None
    assert replace(good, matrix_instructions=0).broken(matrix=False) is None
    assert asdict(good)["registers"] > 0
