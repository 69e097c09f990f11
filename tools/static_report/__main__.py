"""Compile every GPU kernel for every architecture and print what the machine code holds.

python -m tools.static_report [--family triton,cuda] [--arch 80,90,100] [--match REGEX] [--out FILE.json] [--record DIR]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastvae._files import write_json
from fastvae.benchmarks.errors import BenchmarkError
from fastvae.benchmarks.record import write_record

from .describe import describe
from .families import all_families
from .limits import MULTIPROCESSOR
from .report_tables import all_fields, record

ARCHES = ",".join(map(str, MULTIPROCESSOR))


def main(arguments: list[str]) -> int:
    """Print the table and write the report; 0 if all went well, 2 if an option asks for what there is not."""
    parser = argparse.ArgumentParser(prog="python -m tools.static_report", description=__doc__.split("\n")[0])
    parser.add_argument("--family", default="", metavar="A,B", help="families of kernels; all of them by default")
    parser.add_argument("--arch", default=ARCHES, metavar="A,B", help="compute capabilities, times ten")
    parser.add_argument("--match", default="", metavar="REGEX", help="only kernels whose name and case match")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/static-report.json"), metavar="FILE.json", help="the whole report"
    )
    parser.add_argument("--record", type=Path, metavar="DIR", help="write there what the tables in the docs print")
    options = parser.parse_args(arguments)
    try:
        if options.record is not None and (options.arch != ARCHES or options.match):
            raise BenchmarkError("--record is of all kernels, so it does not go with --arch or --match")
        families = _split(options.family)
        found = describe(families, _split(options.arch), options.match)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, found)
        if options.record is not None:
            for family in families or [name for name, one in all_families().items() if one.missing() is None]:
                write_record(options.record / f"{family}-static.json", record(found, family))
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 2
    print(all_fields(found["kernels"]))
    return 0


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
