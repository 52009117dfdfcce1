"""Sphinx: `make docs` builds the pages and the Python API, with warnings as errors."""

project = "NM-Lightning"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "Smaller image classifiers without retraining", "page_width": "1060px"}
myst_heading_anchors = 2
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say it
default_role = "code"
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository, which tests/test_docs.py checks
