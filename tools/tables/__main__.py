"""Put tables made from benchmarks/results/ into README.md and docs/, or check them: python -m tools.tables [--check]"""

from __future__ import annotations

import sys
from pathlib import Path

from fastvae.benchmarks.errors import BenchmarkError

from . import (  # noqa: F401  register tables
    choice_table,
    cpu_tables,
    em_tables,
    gpu_tables,
    machine_code_tables,
    model_tables,
    mutation_table,
    status_table,
)
from .pages import nowhere, update

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str], root: Path = ROOT) -> str | int:
    """The command; a message is an error."""
    if arguments not in ([], ["--check"]):
        return "usage: python -m tools.tables [--check]"
    try:
        stale = update(root, check=bool(arguments))
    except BenchmarkError as error:
        return f"error: {error}"
    if not arguments:
        print("\n".join(f"wrote {name}" for name in stale) or "all tables are in step")
        return 0
    wrong = []
    if stale:
        listed = "\n  ".join(stale)
        wrong += [f"these tables are not what benchmarks/results/ gives; run python -m tools.tables:\n  {listed}"]
    if unused := nowhere(root):
        wrong += [f"these tables have no marker in README.md or docs/: {', '.join(unused)}"]
    if wrong:
        return "\n".join(wrong)
    print("all tables are in step")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
