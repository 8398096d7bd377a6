"""The site builds without a warning, every link in it leads somewhere, and a reader's browser asks nobody else for anything."""

from __future__ import annotations

import runpy
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """What a page refers to, and the places in it that others may refer to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if value is None:
                continue
            if name in ("id", "name"):
                self.anchors.add(value)
            elif tag == "a" and name == "href":
                self.links.append(value)
            elif name in ("src", "srcset", "href", "data", "action", "poster"):
                self.loaded.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    runpy.run_path(str(ROOT / "docs" / "build_site.py"))["build_site"](folder / "source", folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    # The page for addresses that are not there has links from the root, of whatever server it is on.
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    wrong = []
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme:
                is_right = parts.scheme == "data" or (parts.scheme in ("http", "https") and "." in parts.netloc)
            else:
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                target = target / "index.html" if target.is_dir() else target
                anchor = unquote(parts.fragment)
                is_known = target not in pages or anchor in ("", "__skip") or anchor in pages[target].anchors
                is_right = target.is_file() and target.is_relative_to(site) and is_known
            if not is_right:
                wrong.append(f"{path.relative_to(site)}: {link}")
    assert wrong == []
    assert sum(len(page.links) for page in pages.values()) > 1000


def test_a_browser_asks_nobody_else(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        elsewhere = [
            link for link in page.loaded if urlsplit(link).scheme in ("http", "https") or link.startswith("//")
        ]
        assert elsewhere == [], path
        # Whatever the theme's scripts may name.
        assert "Content-Security-Policy" in path.read_text(encoding="utf-8")
    styles = list(site.rglob("*.css"))
    assert styles
    for style in styles:
        text = style.read_text(encoding="utf-8").replace(" ", "")
        assert "@import" not in text
        assert "url(http" not in text
        assert "url(//" not in text


def test_every_document_is_in_the_site(site: Path) -> None:
    for document in (ROOT / "docs").glob("*.md"):
        assert (site / "docs" / f"{document.stem}.html").is_file()
    first = (site / "index.html").read_text(encoding="utf-8")
    for part in ("images/curves.svg", "make demo", "make test", "start_laptop.html", "migrating.html"):
        assert part in first
