"""The Python blocks of the documentation run as written: each page from top to bottom, in one namespace."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from pages import PAGES, ROOT, blocks, file_of, name_of, python_blocks

from peftkit import method

each = pytest.mark.parametrize("page", PAGES, ids=name_of)
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@each
@pytest.mark.filterwarnings("error:::page$")
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = python_blocks(page.read_text(encoding="utf-8"))
    if not found:
        pytest.skip("a page without Python blocks")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # for what a page starts
    monkeypatch.setattr(method, "_registry", method.registered())  # what a page registers goes with it
    modules = set(sys.modules)
    torch.manual_seed(0)
    namespace = {"__name__": "page"}
    files = {name for _, code in found if (name := file_of(code)) is not None}
    try:
        for line, code in found:
            if (name := file_of(code)) is not None:
                with Path(name).open("a", encoding="utf-8") as file:
                    file.write(code)
                continue
            # Blank lines before it make a traceback point into the page.
            exec(compile("\n" * line + code, page, "exec"), namespace)
        for name in files:
            importlib.import_module(name.removesuffix(".py"))
    finally:
        for name in set(sys.modules) - modules:
            if name + ".py" in files:
                del sys.modules[name]


def shell_lines(page: Path) -> list[str]:
    """What a reader may type in a shell: lines of blocks that are not Python, and `make …` in the text."""
    text = page.read_text(encoding="utf-8")
    typed = [line for _, language, code in blocks(text) if language != "python" for line in code.splitlines()]
    return [line.removeprefix("$ ") for line in typed] + re.findall(r"`(make [^`]+|python -m [^`]+)`", text)


def unknown(line: str) -> list[str]:
    """Targets of make and modules of ours that a line names and the tree has not."""
    words = line.partition("#")[0].split()
    if words[:1] == ["make"]:
        return [w for w in words[1:] if "=" not in w and w not in TARGETS]
    if words[:2] == ["python", "-m"] and words[2].partition(".")[0] in ("benchmarks", "peftkit"):
        path = ROOT / words[2].replace(".", "/")
        return [] if path.with_suffix(".py").exists() or (path / "__main__.py").exists() else [words[2]]
    return []


@each
def test_commands_exist(page: Path):
    assert [name for line in shell_lines(page) for name in unknown(line)] == []


def test_the_pages_show_code_and_commands():
    assert sum(len(python_blocks(page.read_text(encoding="utf-8"))) for page in PAGES) > 20
    assert {"demo", "test", "gpu", "docs"} <= TARGETS
    assert unknown("make tset MODEL=smollm2  # twice") == ["tset"] and unknown("python -m benchmarks.pages") != []
    assert "make demo MODEL=smollm2" in shell_lines(ROOT / "README.md")


def test_blocks_know_their_lines():
    page = "# Title\n\n```python\na = 1\n```\n\n```bash\nmake\n```\n\n```python\n# b.py\nb = 1\n```\n"
    assert blocks(page) == [(3, "python", "a = 1\n"), (7, "bash", "make\n"), (11, "python", "# b.py\nb = 1\n")]
    assert [file_of(code) for _, code in python_blocks(page)] == [None, "b.py"]
