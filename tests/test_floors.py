"""Imports go down: never up, and never sideways between two methods."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "peftkit"

# what a room may know; the first prefix that fits counts
FLOORS = {
    "peftkit.kernels": 0,
    "peftkit.sites": 0,
    "peftkit.targets": 0,
    "peftkit.holder": 0,
    "peftkit.dtypes": 0,
    "peftkit.eval_mode": 0,
    "peftkit.graft": 0,
    "peftkit.printing": 0,
    "peftkit.reading": 0,
    "peftkit.hosts": 1,
    "peftkit.method": 1,
    "peftkit.attention": 1,
    "peftkit.blocks": 1,
    "peftkit.bottleneck": 1,
    "peftkit.bottleneck_config": 1,
    "peftkit.running_order": 1,
    "peftkit.leading": 1,
    "peftkit.stacks": 1,
    "peftkit.row_blocks": 1,
    "peftkit.pairs": 1,
    "peftkit.kept_norms": 1,
    "peftkit.bodies": 1,
    "peftkit.prepending": 1,
    "peftkit.peft_tasks": 1,
    "peftkit.peft_patterns": 1,
    "peftkit.peft_lora": 1,
    "peftkit.weight_change": 1,
    "peftkit.lycoris": 1,
    "peftkit.peft_prefix": 1,
    "peftkit.also_train": 2,
    "peftkit.methods": 2,
    "peftkit.schedules": 2,
    "peftkit.ledger": 2,
    "peftkit.building": 3,
    "peftkit.loading": 3,
    "peftkit.checkpoints": 4,
    "peftkit.formats": 4,
    "peftkit.storage": 3,
    "peftkit.hub": 3,
    "peftkit.merging": 3,
    "peftkit.report": 3,
    "peftkit.api": 4,
    "peftkit.distillation": 4,
    "peftkit.costs": 5,
    "peftkit.cli": 7,
    "peftkit.integrations": 5,
    "peftkit.testing": 5,
}
TOP = 6  # the package itself; the command line is above it


def floor(module: str) -> int:
    found = [level for name, level in FLOORS.items() if module == name or module.startswith(name + ".")]
    return found[0] if found else TOP


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative import"
            modules = {f"{node.module}.{a.name}" for a in node.names}
            found |= {m if exists(m) else node.module for m in modules}
    return found


def exists(module: str) -> bool:
    path = ROOT.parent / module.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


FILES = sorted([*ROOT.rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def test_the_files_are_there():
    assert len(FILES) > 15 and any(p.parts[-2] == "kernels" for p in FILES)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    module = name_of(path)
    for other in imported(path):
        if not other.startswith("peftkit"):
            continue
        assert floor(other) <= floor(module), f"{module} is below {other}"
        if module.startswith("peftkit.methods.") and other.startswith("peftkit.methods."):
            assert module == other, f"{module} knows the method {other}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[-2] == "kernels"], ids=name_of)
def test_kernels_know_torch_and_triton_alone(path):
    import sys

    for other in imported(path):
        top = other.partition(".")[0]
        known = {"torch", "triton"} | set(sys.stdlib_module_names)
        assert top in known or other.startswith("peftkit.kernels"), f"{path.name} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_imports_in_a_circle(path):
    graph = {name_of(p): imported(p) for p in FILES}
    start = name_of(path)
    seen, left = set(), [m for m in graph[start] if m in graph]
    while left:
        module = left.pop()
        assert module != start or module == "peftkit", f"{start} reaches itself"
        if module not in seen:
            seen.add(module)
            left += [m for m in graph[module] if m in graph]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_fits_in_a_head(path):
    assert len(path.read_text().splitlines()) <= 360
