"""How Sphinx builds the pages: `make docs`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import paramkit  # noqa: E402  the tree that the pages are of

project = "paramkit"
version = release = paramkit.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["pictures/*.py"]

# Headings are targets, as on the usual hosts of repositories: the pages are read there too.
myst_heading_anchors = 3

# Docstrings are Google's form, with single backticks around code.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 110
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"paramkit {release}"
html_static_path = ["_static"]
html_css_files = ["paramkit.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s#]*)(#[^)\s]*)?\)")
# What lies outside of this folder and is a page here.
_PAGES = {"../README.md": "index.md", "../benchmarks/results/README.md": "results.md"}
_MAYBE = ("composing", "packaging", "patch_torch", "trust")


def _inside(app: Any, name: str, text: list[str]) -> None:
    """Links out of this folder, which a reader of the repository can follow: a page has no such file beside it."""

    def replaced(link: re.Match[str]) -> str:
        label, target, anchor = link[1], link[2], link[3] or ""
        if target.rstrip("/") == "../benchmarks/results":
            target = "../benchmarks/results/README.md"
        if target in _PAGES:
            return f"[{label}]({_PAGES[target]}{anchor})"
        if (DOCS / target).is_dir() or target.endswith(".md"):
            path = target.removeprefix("../")
            return f"`{path}`" if label.strip("`") == path else f"{label} (`{path}`)"
        return link[0]  # a file: it becomes a download

    text[0] = _LINK.sub(replaced, text[0])
    if name == "index":
        # Pages that come with a feature may not be there yet.
        lines = text[0].splitlines(keepends=True)
        missing = {f"{page}\n" for page in _MAYBE if not (DOCS / f"{page}.md").exists()}
        text[0] = "".join(line for line in lines if line not in missing)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _inside)
