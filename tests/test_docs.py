"""The docs say what the tree has."""

from __future__ import annotations

import re

import pytest
from pages import PAGES, ROOT, name_of

import peftkit
from benchmarks.page import PAGE, page

DOCS = ROOT / "docs"
REFERENCE = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
each = pytest.mark.parametrize("path", PAGES, ids=name_of)


def anchors(text: str) -> set[str]:
    """Headings as GitHub and the site name them, and those in HTML."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h).lower() for h in headings]
    return {re.sub(r"[^\w\- ]", "", h).replace(" ", "-") for h in plain}


def test_the_page_of_figures_is_made_from_the_result_files():
    assert PAGE.read_text() == page(), "run `python -m benchmarks.page`"


@each
def test_links_lead_somewhere(path):
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]*))?\)", path.read_text()):
        if target.startswith("http"):
            continue
        other = path.parent / target if target else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other.read_text()), f"{target}#{anchor}"


def test_the_navigation_has_every_page_once():
    """Sphinx says so too, in `make docs`; this takes no time."""
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", (DOCS / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    entries = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    pages = [str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")]
    assert sorted([*entries, "index"]) == sorted(pages)


def test_the_reference_has_every_public_name_once():
    named = re.findall(r"^\.\. auto\w+:: peftkit\.(\w+)$", REFERENCE, re.MULTILINE)
    assert sorted(named) == sorted(peftkit.__all__)


def test_the_reference_has_what_the_integrations_offer():
    for module in ("transformers", "trl", "lightning"):
        source = (ROOT / "peftkit" / "integrations" / f"{module}.py").read_text()
        offered = re.findall(r'"(\w+)"', re.findall(r"^__all__ = \[(.*?)\]", source, re.MULTILINE | re.DOTALL)[0])
        part = REFERENCE.partition(f"module:: peftkit.integrations.{module}\n")[2].partition(".. module::")[0]
        assert sorted(offered) == sorted(re.findall(r"^\.\. auto\w+:: (\w+)$", part, re.MULTILINE))


def test_the_readme_names_every_verb():
    text = (ROOT / "README.md").read_text()
    verbs = [n for n in peftkit.__all__ if n[0].islower()]
    assert [v for v in verbs if f"`{v}(" not in text] == []
