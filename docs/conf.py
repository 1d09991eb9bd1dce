"""How Sphinx makes the site: `make docs`."""

import peftkit

project = "peftkit"
copyright = "the peftkit authors, Apache-2.0"  # noqa: A001 - Sphinx reads this name
release = peftkit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

html_theme = "furo"
html_title = f"peftkit {release}"

myst_heading_anchors = 3
myst_url_schemes = ("http", "https")

# Docstrings mark code as Markdown does.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# What integrations derive from is not needed to read their docstrings.
autodoc_mock_imports = ["lightning", "transformers", "trl"]
