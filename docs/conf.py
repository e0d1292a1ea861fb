"""Sphinx: `make site` builds the documentation to site/ from the Markdown of this folder."""

import logging
import os
import re
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

project, author = "tract_transfer", "the tract_transfer authors"
release = version_of("tract_transfer")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.mermaid",
]
exclude_patterns = ["*.py", "README.md"]  # README.md is the index of the folder in a clone
html_theme = "furo"
html_title = f"tract_transfer {release}"
nb_execution_mode = "off"  # the tests execute the notebooks
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"

ROOT = Path(__file__).parents[1]
REPOSITORY = os.environ.get("REPOSITORY_URL", "").rstrip("/")
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<path>[^)#:\s]+)(?:#[^)]*)?\)")
logger = logging.getLogger("sphinx.links")


def link_to_repository(app: Any, name: str, source: list[str]) -> None:
    """Change a page's links to files outside docs/, which the site does not have.

    They link to the repository if REPOSITORY_URL names it, and are plain text otherwise.
    """
    folder = Path(app.env.doc2path(name)).parent

    def change(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / link["path"]))
        if not target.exists():
            logger.warning("%s links to %s, which does not exist.", name, link["path"])
        if target.is_relative_to(app.srcdir):
            return link[0]
        path = target.relative_to(ROOT).as_posix()
        return f"[{link['text']}]({REPOSITORY}/blob/main/{path})" if REPOSITORY else link["text"]

    source[0] = _LINK.sub(change, source[0])


def setup(app: Any) -> None:
    """Register what Sphinx calls while it reads a page."""
    app.connect("source-read", link_to_repository)
