"""The docs say what the tree has."""

import re
from pathlib import Path

import pytest

from benchmarks.page import PAGE, page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_page_of_figures_is_made_from_the_result_files():
    assert PAGE.read_text() == page(), "run `python -m benchmarks.page`"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target


def test_the_readme_names_every_verb():
    import peftkit

    text = (ROOT / "README.md").read_text()
    verbs = [n for n in peftkit.__all__ if n[0].islower()]
    assert [v for v in verbs if f"`{v}(" not in text] == []
