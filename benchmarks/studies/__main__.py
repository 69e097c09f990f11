"""Run a study and record what it finds: python -m fastvae.benchmarks.studies NAME [--out DIR]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ..record import versions, write_record
from . import annealing, encoding_memory, estimators, exemplar_refresh, total_correlation

STUDIES = {
    "annealing": annealing.study,
    "estimators": estimators.study,
    "memory": encoding_memory.study,
    "refresh": exemplar_refresh.study,
    "total-correlation": total_correlation.study,
}


def main(arguments: list[str]) -> None:
    """Write bounds-NAME.json."""
    parser = argparse.ArgumentParser(prog="python -m fastvae.benchmarks.studies", description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="the folder for the record")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"bounds-{options.study}.json"
    write_record(path, STUDIES[options.study]() | {"threads": torch.get_num_threads(), "versions": versions()})
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
