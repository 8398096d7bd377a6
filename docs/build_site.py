"""Build the documents as a site: python docs/build_site.py. It needs the packages of the extra `docs`, and no network.

Links to a page or a section that is not there, and all else that mkdocs warns of, end it with an error.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What pages link to, laid out as in the repository: a page has the same links here and on a code host.
PARTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "benchmarks",
    "docs",
    "launcher",
    "training",
)


def build_site(source: Path, site: Path) -> None:
    """Build it.

    Args:
        source: a folder for links to what the site is made of.
        site: the folder of the pages.

    Raises:
        mkdocs.exceptions.Abort: there is a fault, which was logged.
    """
    # Before the import: the theme's warning about a version of mkdocs that is not the pinned one.
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    source.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        link = source / part
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT / part)
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, docs_dir=str(source), site_dir=str(site)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    build_site(ROOT / "build" / "site-source", ROOT / "build" / "site")
    print(f"built {ROOT / 'build' / 'site' / 'index.html'}")
