"""The pages of the documentation and the blocks of code in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\w+\.py)\n")


def blocks(page: str) -> list[tuple[int, str, str]]:
    """Each block: the line of the page that it begins on, its language, its text."""
    return [(page[: b.start(2)].count("\n"), b[1].strip(), b[2]) for b in _FENCE.finditer(page)]


def python_blocks(page: str) -> list[tuple[int, str]]:
    """Those that are run."""
    return [(line, code) for line, language, code in blocks(page) if language == "python"]


def file_of(code: str) -> str | None:
    """The reader's file that a block is part of, which its first line names; None for what is typed."""
    found = _FILE.match(code)
    return found[1] if found else None


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))
