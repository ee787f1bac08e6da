"""The pages as a site: built without a warning, whole in itself, and opened in a real browser."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.real_browser import chromium

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.e2e


def build(pages: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """As `scripts/docs.sh` does; an attempt to reach the network ends in a refused connection."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(out.with_name("doctrees"))]
    away = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    env = {**os.environ, **away}
    return subprocess.run([*command, str(pages), str(out)], env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    done = build(DOCS, out)
    assert done.returncode == 0, done.stderr
    return out


class Wanted(HTMLParser):
    """What a page fetches when it is opened, and where it leads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.fetched, self.links = list[str](), list[str]()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "a":
            self.links += [found.get("href") or ""]
        else:
            self.fetched += [found[name] or "" for name in ("src", "href", "srcset", "data") if name in found]


def test_the_site_is_whole_in_itself(site: Path) -> None:
    """Every page of docs/ is there and in the bar at the side; no font, script or picture comes from elsewhere."""
    pages = {page.stem for page in DOCS.glob("*.md")}
    assert {page.stem for page in site.glob("*.html")} == pages | {"genindex", "search"}
    contents = Wanted(site / "index.html").links
    assert pages - {link.partition(".html")[0].partition("#")[0] for link in contents} <= {"index"}
    for page in pages:
        for wanted in Wanted(site / f"{page}.html").fetched:
            file = unquote(wanted.partition("?")[0].partition("#")[0])
            assert not re.match(r"\w+:|//", wanted) or wanted.startswith("data:"), wanted
            assert not file or (site / file).is_file(), f"{page}: {wanted}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_a_broken_link_ends_the_build(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "conf.py").write_text((DOCS / "conf.py").read_text(encoding="utf-8"))
    (pages / "index.md").write_text("# Home\n\n## Start\n\n- [A page](page.md)\n")
    (pages / "page.md").write_text("# A page\n\n## Of data\n\n[right](#of-data), [home](index.md#start)\n")
    assert build(pages, tmp_path / "right").returncode == 0
    with (pages / "page.md").open("a") as page:
        page.write("\n[wrong](nowhere.md), [wrong](index.md#nothing), ![wrong](none.png)\n")
    (pages / "forgotten.md").write_text("# In no list\n")
    done = build(pages, tmp_path / "wrong")
    assert done.returncode != 0
    assert all(word in done.stderr for word in ("nowhere.md", "nothing", "none.png", "forgotten.md")), done.stderr


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")], ids=["desktop", "phone"])
def test_in_a_browser(site: Path, browser: Any, width: int, scheme: str) -> None:
    """Pages open without an error, nothing leaves the disk, nothing sticks out, and words are found."""
    context, wrong = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme), list[str]()
    page = context.new_page()
    page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith((site.as_uri(), "data:")) or wrong.append(asked.url))
    for name in ("index", "quickstart_sdxl", "recipes", "troubleshooting", "config", "benchmarks"):
        page.goto((site / f"{name}.html").as_uri())
        assert page.locator("h1").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
    page.goto((site / "index.html").as_uri())
    assert page.locator(".sidebar-tree a[href='recipes.html']").count() == 1
    page.goto((site / "search.html").as_uri() + "?q=terminal")
    page.locator("#search-results li a", has_text="Objectives").first.wait_for(timeout=60_000)
    page.locator("#search-results li a", has_text="Objectives").first.click()
    assert "objectives.html" in page.url
    assert wrong == []
    context.close()
