"""The benchmarks run, in a size of no meaning, and have a row for every figure that is promised."""

import json
import math

import pytest

pytest.importorskip("peft")

from benchmarks.against_peft import attaching, calling, dora, files, importing, merging, prefix, switching
from benchmarks.against_peft.__main__ import GROUPS, figure, table
from benchmarks.against_peft.common import FULL, QUICK, TINY, Row

IN_PROCESS = {
    "attaching": (attaching.measure, 5),
    "calling": (calling.measure, 7),
    "merging": (merging.measure, 10),
    "dora": (dora.measure, 11),
    "switching": (switching.measure, 4),
    "files": (files.measure, 3),
    "prefix": (prefix.measure, 2),
}
IN_OTHERS = {"memory": (attaching.measure_memory, 2), "importing": (importing.measure, 2)}


def check(rows: list[Row], count: int) -> None:
    assert len(rows) == count
    assert len({row.what for row in rows}) == count
    for row in rows:
        assert math.isfinite(row.measured), row
        assert row.limit is None, row  # nothing is promised of a model this small
        if "resident memory" not in row.what:  # comes and goes by pages, more than a model this small takes
            assert all(value >= 0 for value in row.detail.values()), row
        assert row.unit != "weights" or row.measured == 0, row  # changed by merging and unmerging
    json.dumps([row.as_json() for row in rows])
    assert table(rows).row_count == count


@pytest.mark.parametrize("group", IN_PROCESS)
def test_every_group_has_its_rows(group):
    measure, count = IN_PROCESS[group]
    check(list(measure(TINY)), count)


@pytest.mark.slow
@pytest.mark.parametrize("group", IN_OTHERS)
def test_every_group_in_other_processes_has_its_rows(group):
    measure, count = IN_OTHERS[group]
    check(list(measure(TINY)), count)


def test_no_group_is_left_out():
    assert {name: measure for name, (measure, _) in {**IN_PROCESS, **IN_OTHERS}.items()} == GROUPS


@pytest.mark.parametrize("library", ["peftkit", "peft"])
def test_memory_left_behind_is_counted(library):
    assert attaching.left_behind("tracemalloc", library, 2) > 0


def test_a_hundred_adapters_are_promised_in_the_full_size_alone():
    assert FULL.limit(1 / 70, adapters=100) == 1 / 70
    assert QUICK.limit(1 / 70, adapters=100) is None
    assert QUICK.limit(1 / 7) == 1 / 7


def test_a_row_knows_whether_it_is_met():
    assert [Row("", value, "× peft", 0.5).met for value in (0.4, 0.5, 0.6)] == [True, True, False]
    assert Row("", 1.0, "ms").met is None
    assert [figure(v) for v in (0, 0.02, 0.6, 96.123)] == ["0", "1/50", "0.6", "96.1"]
