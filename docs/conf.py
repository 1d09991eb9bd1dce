"""How Sphinx makes the site: `make docs`."""

from __future__ import annotations

import re
from typing import Any

import peftkit

project = "peftkit"
release = peftkit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"peftkit {release}"
html_show_copyright = False

myst_heading_anchors = 3  # a heading is an anchor by its name, as on GitHub

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_custom_sections = [("Class attributes a method sets", "params_style")]
napoleon_use_ivar = True
# What integrations derive from, and what runs the contract tests, is not needed to read their docstrings.
autodoc_mock_imports = ["lightning", "pytest", "transformers", "trl"]
# Docstrings mark code as Markdown does.
default_role = "code"


def as_meant(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Formulas stand indented in the docstrings of modules, which reStructuredText would set as quotations; and what
    stands before a colon in that of a property is no type, as napoleon takes that of the first line to be.
    """
    if what == "module":
        lines[:] = re.sub(r"(?<!:)\n\n(?= {4})", r"\n\n::\n\n", "\n".join(lines)).split("\n")
    elif what == "property":
        lines[:0] = ["..", ""]  # an empty comment


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", as_meant, priority=400)  # before napoleon
