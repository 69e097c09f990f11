"""Every table by its name, and how one is made from the records."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvae.benchmarks.errors import BenchmarkError
from fastvae.benchmarks.record import Record, read_record


@dataclass(frozen=True)
class Results:
    """The folder of recorded runs."""

    folder: Path

    def bench(self, name: str) -> Record:
        """What `fastvae bench` recorded as NAME.json."""
        return read_record(self.folder / f"{name}.json")

    def read(self, name: str) -> Any:
        """Any other JSON file."""
        try:
            return json.loads((self.folder / name).read_text())
        except ValueError as error:
            raise BenchmarkError(f"{self.folder / name} is not JSON ({error})") from error


Table = Callable[[Results], str]
TABLES: dict[str, tuple[str, Table]] = {}


def table(name: str, source: str) -> Callable[[Table], Table]:
    """Register a table under a name, with the file (or pattern of files) it is made from."""

    def register(make: Table) -> Table:
        TABLES[name] = (source, make)
        return make

    return register


def render(name: str, results: Results) -> str:
    """The Markdown of a table; a sentence that it is not recorded, where its source is not there.

    Raises:
        BenchmarkError: there is no such table, or its record is not what it should be.
    """
    if name not in TABLES:
        raise BenchmarkError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
    source, make = TABLES[name]
    if not any(results.folder.glob(source)):
        return f"*Not recorded yet: benchmarks/results/{source}.*"
    try:
        return make(results)
    except (KeyError, TypeError, IndexError) as error:
        raise BenchmarkError(f"table {name}: {source} lacks something it should have ({error!r})") from error
