"""The pages that have tables: where the markers are, what goes between them, and which are out of step."""

from __future__ import annotations

import re
from pathlib import Path

from fastvae._files import whole_file
from fastvae.benchmarks.errors import BenchmarkError

from .registry import TABLES, Results, render

MARKED = re.compile(r"(<!-- table: (?P<name>\S+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
OPENING = re.compile(r"<!-- table: (\S+) -->")


def pages(root: Path) -> list[Path]:
    """README.md and every page under docs/, those that are there."""
    return [path for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))) if path.is_file()]


def filled(text: str, results: Results) -> str:
    """A page with every table between its markers made anew.

    Raises:
        BenchmarkError: a marker has no end, or names no table.
    """
    if len(OPENING.findall(text)) != len(MARKED.findall(text)):
        raise BenchmarkError("a table's marker has no <!-- /table --> before the next one")
    return MARKED.sub(lambda found: f"{found[1]}{render(found['name'], results)}\n{found[4]}", text)


def update(root: Path, *, check: bool = False) -> list[str]:
    """Make the tables of all pages anew, or with `check` write nothing.

    Returns:
        The pages that were out of step, by name, with the tables that were.

    Raises:
        BenchmarkError: a page or a record is not what it should be; no page was written.
    """
    results, stale, changed = Results(root / "benchmarks" / "results"), [], {}
    for path in pages(root):
        old = path.read_text()
        try:
            new = filled(old, results)
        except BenchmarkError as error:
            raise BenchmarkError(f"{path.relative_to(root)}: {error}") from error
        if new != old:
            before, after = MARKED.finditer(old), MARKED.finditer(new)
            names = [a["name"] for a, b in zip(before, after, strict=True) if a["body"] != b["body"]]
            stale.append(f"{path.relative_to(root)}: {', '.join(names)}")
            changed[path] = new
    if not check:
        for path, text in changed.items():
            with whole_file(path) as file:
                file.write(text.encode())
    return stale


def nowhere(root: Path) -> list[str]:
    """The tables that no page has a marker for."""
    marked = {name for path in pages(root) for name in OPENING.findall(path.read_text())}
    return [name for name in TABLES if name not in marked]
