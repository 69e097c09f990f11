"""Links that `make docs` does not see: those of the pages beside docs/, and mentions of pages in the code.

Links to other hosts are not followed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown import Markdown
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
BESIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
SOURCES = ("benchmarks", "csrc", "examples", "fastvae", "kernels", "tests", "tools", "Makefile", "setup.py")
SUFFIXES = {"", ".cpp", ".cu", ".cuh", ".h", ".py"}
MENTION = re.compile(r"\bdocs/[\w/-]+\.md(?:#[\w-]+)?")


def links(page: Path) -> list[str]:
    found = []
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        for child in token.children or ():
            found += [child.attrs[name] for name in ("href", "src") if name in child.attrs]
    return [str(link) for link in found]


def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as the site makes them."""
    converter = Markdown(extensions=["toc", "tables", "attr_list", "fenced_code"])
    return set(re.findall(r'<h\d id="([^"]+)"', converter.convert(page.read_text())))


def broken(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return not target.exists() or (anchor != "" and anchor not in anchors(target))


def sources() -> list[Path]:
    """Files that may mention a page; the tests of the tables make up pages of their own."""
    files = [path for top in SOURCES for path in (ROOT / top, *(ROOT / top).rglob("*")) if path.suffix in SUFFIXES]
    return [path for path in files if path.is_file() and path.parts[-3:-1] != ("tests", "bench")]


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("# Here\n\n## A part\n\n[x](#a-part) [y](#b-part) ![z](no.png) [w](a.md#here) [v](https://a.b)\n")
    local = [link for link in links(page) if "://" not in link]
    assert [link for link in local if broken(page, link)] == ["#b-part", "no.png"]


@pytest.mark.parametrize("page", BESIDE, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not [link for link in links(page) if "://" not in link and broken(page, link)]


def test_pages_that_the_code_mentions_exist() -> None:
    mentions = [(path, match[0]) for path in sources() for match in MENTION.finditer(path.read_text(errors="replace"))]
    assert len(mentions) > 5
    assert not [f"{path.relative_to(ROOT)}: {page}" for path, page in mentions if broken(ROOT / "README.md", page)]
