"""Draw every figure that a record has points for, and write its page: python -m tools.figures RECORD [--out DIR]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastvae.benchmarks.errors import BenchmarkError
from fastvae.benchmarks.page import write_page
from fastvae.benchmarks.record import read_record

from .draw import draw


def main(arguments: list[str]) -> int:
    """Print the files that were written; 0 if all went well, 2 if a record cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m tools.figures", description=__doc__)
    parser.add_argument("record", type=Path, metavar="RECORD", help="the DEVICE.json of `fastvae bench`")
    parser.add_argument("--out", type=Path, default=Path("runs/figures"), help="the folder for page and figures")
    options = parser.parse_args(arguments)
    try:
        record = read_record(options.record)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    figures = draw(record, options.out)
    print(*figures, write_page(record, options.out, figures), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
