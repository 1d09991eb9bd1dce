"""What the benchmark of the LoRA kernels writes: result files, the table of ways, the page; and its commands."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from kernel_rows import measured, row_of

from benchmarks import page
from benchmarks.kernels import __main__ as command
from benchmarks.kernels import measure, report
from benchmarks.kernels.candidates import BASE
from benchmarks.kernels.cases import GPU, SMALL, SMALL_OTHERS
from benchmarks.kernels.norms import NormRow
from peftkit.kernels import choice

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def rows():
    return list(measured())


# -- what is written ------------------------------------------------------------------------------------------------------


def test_the_result_file_has_what_the_figures_depend_on(rows, tmp_path):
    path = tmp_path / "some" / "result.json"
    report.write(rows, report.environment(CPU), path)
    found = json.loads(path.read_text())
    assert found["benchmark"] == "lora_kernels"
    assert {"device", "driver", "torch", "triton", "cuda", "commit"} <= set(found["machine"])
    assert found["rows"] == [dataclasses.asdict(row) for row in rows]


def test_files_are_named_after_the_device():
    assert report.result_path("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"


def test_facts_that_are_not_there_are_left_open(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = report.environment(CPU)
    assert found["driver"] is None and found["commit"] is None


def test_the_fastest_way_that_is_right_is_chosen():
    found = [
        row_of(BASE, 1.0),
        row_of("lora_linear, addmm", 1.3, way="addmm"),
        row_of("lora_linear, epilogue", 1.2, way="epilogue"),
        row_of("lora_linear, augmented", 1.1, way="augmented", errors=0.5),
        row_of("lora_linear, torch", 1.05, way="torch", errors=math.nan),
        row_of("lora_linear, augmented, base with room", 1.01),
        row_of("peft", 1.02),
    ]
    measure.compare(found, "CUDA events")
    shape = dict(tokens=8, fan_in=4, fan_out=4, r=2, dropout=0.0)
    assert report.chosen(found) == [{**shape, "way": "epilogue"}]
    assert report.chosen(found[:1]) == []


def test_what_is_chosen_is_what_choice_reads(rows, tmp_path, monkeypatch):
    path = tmp_path / "ways.json"
    path.write_text('{"another": [], "This": [{"way": "old"}]}')
    report.choose(rows, "This", path)
    monkeypatch.setattr(choice, "TABLE", path)
    monkeypatch.setattr(choice, "WAYS", ("torch",))  # the only one that a CPU measured
    choice.table.cache_clear()
    choice._nearest.cache_clear()
    try:
        assert set(choice.table()) == {"another", "This"}
        assert len(choice.table()["This"]) == len(SMALL)
        assert {choice._nearest("This", (100, 50, 50, 4), dropout) for dropout in (False, True)} == {"torch"}
    finally:
        choice.table.cache_clear()
        choice._nearest.cache_clear()


# -- the page and the commands --------------------------------------------------------------------------------------------


def test_the_page_says_that_nothing_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    (tmp_path / "x-pytest.json").write_text('{"benchmarks": []}')
    text = page.page()
    lines = [line for line in text.splitlines() if "T 8192" in line]
    assert page.NO_GPU in text
    assert [line.count(page.NOT_MEASURED) for line in lines] == [8] * len(GPU)
    assert [line.split(" | ")[3] for line in lines[:7]] == ["10.0", "15.0", "6.0", "14.0", "12.0", "10.0", ""]
    assert [line.split(" | ")[1] for line in lines[3:6]] == ["lora_linear", "dora_linear", "peftkit"]
    assert not any(character.isdigit() for line in lines for character in line.split(" | ", 4)[4])


def test_the_page_has_the_figures_of_every_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    found = [
        row_of(BASE, 1.0),
        row_of("lora_linear, addmm", 1.3, way="addmm", target=0.1),
        row_of("lora_linear, epilogue", 1.05, way="epilogue", target=0.1),
        row_of("peft", 2.0),
        row_of("broken", 2.0, failed="RuntimeError"),
    ]
    measure.compare(found, "CUDA events")
    report.write(found, {"device": "Chip", "driver": "5", "torch": "2", "commit": "0123456789"}, tmp_path / "chip.json")
    text = page.page()
    assert page.NO_GPU not in text and page.NOT_MEASURED not in text
    assert "Chip, driver 5, torch 2, commit 0123456:" in text
    assert "| one | F.linear, frozen | 0.0 |  |  |" in text
    assert "|  | lora_linear, addmm | 30.0 | 10.0 | **missed** | 1.0e-03 |" in text
    assert "|  | lora_linear, epilogue | 5.0 | 10.0 | met |" in text
    assert "|  | peft | 100.0 |  |  |" in text
    assert "|  | broken | failed |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    before = choice.TABLE.read_bytes()
    assert command.main(["--choose"]) == 0
    assert choice.TABLE.read_bytes() == before and not list(tmp_path.iterdir())
    assert "nothing was written" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no GPU"):
        command.main(["--name"])


@pytest.mark.parametrize("broken", [False, True])
def test_with_a_gpu_figures_and_ways_are_written(rows, broken, tmp_path, monkeypatch):
    if broken:
        rows = [*rows, row_of("lora_linear, epilogue", 1.0, way="epilogue", failed="RuntimeError")]
    by_case = {str(case): [row for row in rows if row.case in (str(case), "one")] for case in SMALL}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "for_device", lambda _: SMALL)
    monkeypatch.setattr(command, "measure", lambda case, *_: by_case[str(case)])
    monkeypatch.setattr(command.norms, "measure", lambda *_: [NormRow("peftkit", 8, 2, ms=1.0)])
    monkeypatch.setattr(report, "environment", lambda _: {"device": "Chip 9"})
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(choice, "TABLE", tmp_path / "ways.json")
    assert command.main([]) == int(broken)
    assert [path.name for path in tmp_path.iterdir()] == ["chip-9.json"]
    assert {row["case"] for row in json.loads((tmp_path / "chip-9.json").read_text())["rows"]} >= set(by_case)
    assert [row["by"] for row in json.loads((tmp_path / "chip-9.json").read_text())["norms"]] == ["peftkit"]
    command.main(["--choose"])
    assert [entry["way"] for entry in json.loads((tmp_path / "ways.json").read_text())["Chip 9"]] == ["torch", "torch"]


def test_pytest_benchmark_has_a_group_for_each_case(tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "found.json"
    flags = "-q", "-p", "no:cacheprovider", "--benchmark-only", "--benchmark-max-time=0.01", f"--benchmark-json={path}"
    # with xdist above it, it would measure nothing
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(ROOT)}
    only = [] if torch.cuda.is_available() else ["-k", "48"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, *only, str(ROOT / "benchmarks")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = json.loads(path.read_text())
    assert "node" not in found["machine_info"] and all("data" not in b["stats"] for b in found["benchmarks"])
    groups = {}
    for benchmark in found["benchmarks"]:
        groups.setdefault(benchmark["group"], []).append(benchmark["name"])
    if not torch.cuda.is_available():
        ours = "lora_linear, torch", "peft, fp32 adapters (its default)"
        dora = "dora_linear, torch", "dora_linear, torch, norm kept", ours[1]
        assert groups == {
            **{str(case): [BASE, *ours] for case in SMALL},
            **{str(case): [BASE, *dora] for case in SMALL_OTHERS[:2]},
        }
