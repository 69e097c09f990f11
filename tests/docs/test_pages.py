"""Every block of Python on the pages runs, from the top of a page to its end."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt

from .names import names

DOCS = Path(__file__).parents[2] / "docs"
ELSEWHERE = {DOCS / "guides" / "benchmarking.md"}  # a peer's file, which tests/bench/test_peers.py runs


def blocks(page: Path) -> list[tuple[int, str]]:
    """The blocks that are marked `python`, each with the line it begins at; those marked `py` are only shown."""
    tokens = MarkdownIt().parse(page.read_text())
    return [(t.map[0] + 1, t.content) for t in tokens if t.type == "fence" and t.map and t.info.strip() == "python"]


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if page not in ELSEWHERE and blocks(page)]


def test_there_are_pages_with_code() -> None:
    assert {"tutorial.md", "with-pytorch.md", "own-prior.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Traced whole, but not compiled to machine code: that takes a minute, and is not what the page shows.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    namespace = names()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # an example must not show what the library warns of
        for line, source in blocks(page):
            exec(compile("\n" * line + source, page.as_posix(), "exec"), namespace)
