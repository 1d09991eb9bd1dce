"""The Python blocks of the documentation run as written: each page from top to bottom, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[int, str]]:
    """Each block and the line of the page that it begins on."""
    return [(page[: block.start(1)].count("\n"), block[1]) for block in FENCE.finditer(page)]


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = blocks(page.read_text(encoding="utf-8"))
    if not found:
        pytest.skip("a page without Python blocks")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "readme"}
    for line, code in found:
        # Blank lines before it make a traceback point into the page.
        exec(compile("\n" * line + code, page, "exec"), namespace)


def test_the_readme_shows_code():
    assert blocks((ROOT / "README.md").read_text(encoding="utf-8"))


def test_blocks_know_their_lines():
    page = "# Title\n\n```python\na = 1\n```\n\n```bash\nmake\n```\n\n```python\nb = a\n```\n"
    assert blocks(page) == [(3, "a = 1\n"), (11, "b = a\n")]
