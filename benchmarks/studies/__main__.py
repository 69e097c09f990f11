"""Run a study and record what it finds: python -m fastvae.benchmarks.studies NAME [--out DIR]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ..record import versions, write_record
from . import (
    annealing,
    backward_components,
    backward_samples,
    em,
    encoding_memory,
    estimators,
    exemplar_refresh,
    out_of_core,
    total_correlation,
)

# Each with the record that it writes.
STUDIES = {
    "annealing": ("bounds-annealing.json", annealing.study),
    "backward-components": ("bounds-backward-components.json", backward_components.study),
    "backward-samples": ("bounds-backward-samples.json", backward_samples.study),
    "em": ("em.json", em.study),
    "estimators": ("bounds-estimators.json", estimators.study),
    "memory": ("bounds-memory.json", encoding_memory.study),
    "out-of-core": ("out-of-core.json", out_of_core.study),
    "refresh": ("bounds-refresh.json", exemplar_refresh.study),
    "total-correlation": ("bounds-total-correlation.json", total_correlation.study),
}


def main(arguments: list[str]) -> None:
    """Write the record of a study."""
    parser = argparse.ArgumentParser(prog="python -m fastvae.benchmarks.studies", description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="the folder for the record")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    name, study = STUDIES[options.study]
    path = options.out / name
    write_record(path, study() | {"threads": torch.get_num_threads(), "versions": versions()})
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
