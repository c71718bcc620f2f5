"""The documentation site: `make docs`."""

import os

import tokensel

project = "tokensel"
author = "the tokensel authors"
release = version = tokensel.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"tokensel {release}"
default_role = "code"  # what docstrings put between single backticks

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them, and every docstring says shapes and dtypes
napoleon_use_rtype = False
napoleon_use_ivar = True

# Fetching what other projects document needs a network, which a build does not ask for by itself.
if os.environ.get("DOCS_INTERSPHINX"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
    }
