"""The pages as a site: `sphinx-build -W docs build/site`. They are plain Markdown, and readable without it.

What stands beside a page, and in which order, follows from the lists of links in index.md, so that it is said once.
"""

import re

from sphinx.application import Sphinx

project = "sdxl-train"
author = "the authors of sdxl-train"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4  # `page.md#a-heading`, as GitHub makes them
highlight_language = "none"  # of indented blocks: commands, and what they print
html_theme = "furo"
html_title = "sdxl-train"
html_show_copyright = False
html_show_search_summary = False  # it would fetch each page found, which a site opened from the disk may not
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}

_SECTION = re.compile(r"^## (?P<caption>.+)\n\n(?P<links>(?:- .*\n)+)", re.MULTILINE)
_PAGE = re.compile(r"^- \[[^\]]+\]\((\w[\w-]*)\.md\)", re.MULTILINE)


def _with_contents(_app: Sphinx, page: str, source: list[str]) -> None:
    """Behind index.md, the contents that its lists make, for the bar at the side."""
    if page == "index":
        for section in _SECTION.finditer(source[0] + "\n"):
            pages = "\n".join(_PAGE.findall(section["links"]))
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {section['caption']}\n\n{pages}\n```\n"


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _with_contents)
