"""The command line of an experiment whose figures are kept: what it measures is written and printed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvae._files import write_json
from fastvae.app.user_errors import AppError
from fastvae.benchmarks.errors import BenchmarkError


def run(
    module: str, about: str | None, measure: Callable[[], dict[str, Any]], markdown: Callable[[dict[str, Any]], str]
) -> int:
    """0 if all was measured, 2 if it cannot be.

    Args:
        module: the experiment's name; about: its docstring, of which the first line is shown.
        measure: makes the content of the record; markdown: what is printed of it.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m tools.experiments.{module}", description=(about or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there too")
    options = parser.parse_args()
    return keep(measure, markdown, options.out)


def keep(measure: Callable[[], dict[str, Any]], markdown: Callable[[dict[str, Any]], str], out: Path | None) -> int:
    """Measure, write the record to `out` unless it is None, and print it; 0 if all was measured, 2 if it cannot be."""
    try:
        content = measure()
    except (ImportError, RuntimeError, BenchmarkError, AppError) as error:  # a package is missing, or a file is wrong
        print(error, file=sys.stderr)
        return 2
    if out is not None:
        write_json(out, content)
    print(markdown(content))
    return 0
