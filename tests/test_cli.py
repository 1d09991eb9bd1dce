"""The command line, as it is typed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
import typer
from storage_helpers import llama, moved

import peftkit
from peftkit import LoRAConfig, PrefixTuningConfig
from peftkit.cli import app as commands

ROOT = Path(__file__).parents[1]
GROUP = typer.main.get_command(commands.app)
assert isinstance(GROUP, click.Group) or hasattr(GROUP, "commands")
NAMES = sorted(GROUP.commands)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base, and two adapters of it."""
    folder = tmp_path_factory.mktemp("cli")
    llama().save_pretrained(folder / "base")
    for seed, name in enumerate(("adapter", "other")):
        model = llama()
        peftkit.inject(model, LoRAConfig(r=2, alpha=3, targets="all-linear"))
        moved(model, peftkit.parameters(model), seed)
        peftkit.save(model, folder / name)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, line: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command; what leaves `main` in another way is a traceback."""
    argv, sys.argv = sys.argv, shlex.split(line)
    try:
        commands.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    return code, out, err


def test_every_command_is_documented_by_an_example_that_runs(here, capsys):
    examples = {}
    for name in NAMES:
        code, out, _ = run(capsys, f"peftkit {name} --help")
        found = re.search(r"Example: (peftkit .+)", out)
        assert code == 0 and found is not None and found[1].split()[1] == name, out
        examples[name] = found[1]
    assert NAMES == ["combine", "convert", "diff", "extract", "info", "inspect", "merge", "verify"]
    order = ["info", "inspect", "verify", "merge", "combine", "extract", "convert", "diff"]
    for name in order:
        code, out, err = run(capsys, examples[name])
        assert code == (1 if name == "diff" else 0) and out and not err, (examples[name], err)
    assert {"merged", "sum", "extracted", "adapter.gguf"} <= set(os.listdir(here))


def test_without_a_command_there_is_help(capsys):
    _, out, err = run(capsys, "peftkit")
    assert all(f" {name} " in out + err for name in NAMES)
    assert run(capsys, "peftkit -h")[0] == 0


def test_merge(here, capsys):
    code, out, err = run(capsys, "peftkit merge base adapter other=-0.5 out --dtype bfloat16")
    assert (code, err) == (0, "") and "changed 14 tensors" in out
    peftkit.merge_checkpoint("base", [("adapter", 1), ("other", -0.5)], "expected", dtype=torch.bfloat16)
    assert (here / "out/model.safetensors").read_bytes() == (here / "expected/model.safetensors").read_bytes()


def test_inspect(here, capsys):
    code, out, _ = run(capsys, "peftkit inspect adapter --json")
    found = json.loads(out)
    assert code == 0 and found["method"] == "lora" and found["settings"]["alpha"] == 3 and found["sealed"]
    model = llama()
    peftkit.load(model, "adapter")
    adapters = peftkit.ledger.require(model)[1].attachments["default"].adapters
    assert {p["name"] for p in found["parts"]} == set(adapters)
    for part in found["parts"]:
        made = adapters[part["name"]]
        assert part["norm"] == pytest.approx(float(made.delta("weight").norm()), rel=1e-5)
        assert part["rank"] == 2 and part["parameters"] == sum(p.numel() for p in made.parameters())
    code, out, _ = run(capsys, "peftkit inspect adapter")
    assert "model.layers.*.mlp.up_proj ×2" in out and f"{found['parameters']:,} parameters" in out


def test_verify(here, capsys):
    code, out, _ = run(capsys, "peftkit verify adapter --base base --json")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["sampled"] == 14 and found["sealed"] and len(found["sites"]) == 14
    llama(seed=5).save_pretrained(here / "wrong")
    code, out, err = run(capsys, "peftkit verify adapter --base wrong")
    assert code == 1 and not out and "saved from another base" in err
    assert json.loads(run(capsys, "peftkit verify adapter --base wrong --json")[1])["fits"] is False


@pytest.mark.parametrize("layers", [2, 3])
def test_verify_what_is_no_change_of_weights(here, capsys, layers):
    """A prefix needs the modules, and fits neither fewer layers nor another base."""
    model = llama()
    peftkit.inject(model, PrefixTuningConfig(length=2))
    peftkit.save(model, "prefix")
    llama(layers=layers, seed=0 if layers == 2 else 1).save_pretrained(here / "it")
    code, _, err = run(capsys, "peftkit verify prefix --base it")
    assert code == (layers != 2), err
    if layers == 2:
        llama(seed=5).save_pretrained(here / "wrong")
        assert "saved from another base" in run(capsys, "peftkit verify prefix --base wrong")[2]


def test_diff(here, capsys):
    assert run(capsys, "peftkit diff adapter adapter")[0] == 0
    code, out, _ = run(capsys, "peftkit diff adapter other --json")
    assert code == 1 and json.loads(out)["settings"] == {}
    assert run(capsys, "peftkit diff base base")[0] == 0


def test_what_was_combined_and_extracted(here, capsys):
    assert run(capsys, "peftkit combine adapter other=2 sum")[0] == 0
    assert run(capsys, "peftkit merge base adapter other=2 one")[0] == 0
    assert run(capsys, "peftkit merge base sum two --any-base")[0] == 0
    assert run(capsys, "peftkit extract base one back --rank 4")[0] == 0
    found = json.loads(run(capsys, "peftkit diff sum back --json")[1])
    assert all(c["distance"] < 1e-4 for c in found["common"])


MISTAKES = [
    ("inspect nowhere", "nowhere is no directory"),
    ("inspect base", "adapter_config.json is missing"),
    ("inspect /dev/null", "no directory"),
    ("merge nowhere adapter out", "nowhere is not there"),
    ("merge base adapter base", "itself is read"),
    ("merge base adapter=x out", "'adapter=x': expected a directory"),
    ("merge base adapter out --dtype float7", "'float7' is none"),
    ("merge base adapter out --dtype int8", "16 bits or more"),
    ("merge base adapter other", "is there already"),
    ("combine adapter sum --how average", "how: expected one of"),
    ("combine adapter sum --how svd --rank big", "rank: a number or 'full'"),
    ("extract base nowhere out", "nowhere is not there"),
    ("extract base base out", "do not differ at any of 14 targets"),
    ("convert nowhere out --base base", "nowhere"),
    ("convert adapter out --base base --to onnx", "'onnx'"),
    ("verify nowhere --base base", "nowhere is no directory"),
    ("verify adapter --base nowhere", "nowhere is no directory"),
    ("diff adapter base", "is an adapter"),
    ("diff adapter nowhere", "nowhere"),
    ("inspect", "Missing argument .adapter"),
    ("merge base out", "Missing argument .adapters"),
    ("verify adapter", "--base"),
    ("mrge base adapter out", "mrge"),
    ("merge base adapter out --dtyp float32", "dtyp"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=lambda v: v.split("|")[0])
def test_a_mistake_is_a_message(here, capsys, line, words):
    before = sorted(os.listdir(here))
    code, out, err = run(capsys, f"peftkit {line}")
    assert code == 2 and not out, (code, out)
    assert re.search(words, err) and "Traceback" not in err, err
    assert sorted(os.listdir(here)) == before


def test_it_is_installed(here):
    """By its own name and as a module, and a mistake is no traceback there."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "peftkit.cli", "inspect", "nowhere"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 2 and done.stderr.startswith("peftkit: ") and done.stderr.count("\n") == 1
    text = (ROOT / "pyproject.toml").read_text()
    assert 'peftkit = "peftkit.cli.app:main"' in text
