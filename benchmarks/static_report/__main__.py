"""Compile every kernel for every architecture and print what their machine code holds.

python -m benchmarks.static_report [--family triton,cuda] [--arch 80,90,100] [--match REGEX] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastvae.app.data.whole_file import write_json
from fastvae.app.user_errors import AppError

from .report import describe, markdown


def main(arguments: list[str]) -> int:
    """Print the table; 0 if all went well, 2 if something was asked for that there is not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_report", description=__doc__.split("\n")[0])
    parser.add_argument("--family", default="", metavar="A,B", help="families of kernels; all of them by default")
    parser.add_argument("--arch", default="80,90,100", metavar="A,B", help="compute capabilities, times ten")
    parser.add_argument("--match", default="", metavar="REGEX", help="only kernels whose name and case match")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write everything that was found there too")
    options = parser.parse_args(arguments)
    try:
        found = describe(_split(options.family), _split(options.arch), options.match)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.out, found)
    except AppError as error:
        print(error, file=sys.stderr)
        return 2
    print(markdown(found["kernels"]))
    return 0


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
