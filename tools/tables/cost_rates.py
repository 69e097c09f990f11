"""The rates that `fastvae plan` computes with, made from the records and shipped with the package.

On a CPU the seconds of one thread are fitted, by relative error, to

    M K (pair + D number) + K D component_number:

an exponential and the like for each pair, two multiply-adds for each of its D numbers, and packing for each number of
the components.  A record of a GPU has one forward pass, and gives `number` alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from fastvae._files import as_json, whole_file

from ..gpu.gpu_targets import D, K, M
from .gpu_records import gpu_records
from .registry import Results

PLACE = Path("fastvae", "app", "planning", "rates.json")
_CPU = {"cpu": "cpu.json", "cpu-avx2": "avx2/cpu.json"}
_LEAST_WORK = 1e8  # pairs times dimensions, below which the fixed cost of a call would be fitted
_LARGEST_D = 1000


def rates(results: Results) -> dict[str, Any]:
    """For each device: seconds, where they are from, and how far the fit is from what was measured."""
    found = {name: _cpu(results, source) for name, source in _CPU.items()}
    for record in gpu_records(results):
        seconds = record.figures.get("forward cuda")
        if seconds is not None:
            found[record.name.lower()] = {
                "source": f"{record.folder}/measure.json",
                "machine": record.machine["device"],
                "pair": 0.0,
                "number": _rounded(seconds / (M * K * D)),
                "component_number": 0.0,
                "deviation": None,
                "fewest_rows": M,
            }
    return found


def _cpu(results: Results, source: str) -> dict[str, Any]:
    record = results.read(source)
    machine, rows, times = record["machine"], [], []
    for case in record["cases"].values():
        M, K, D = case.get("M"), case.get("K"), case.get("D")
        if case["suite"] != "mixture" or case["work"] != "forward" or case["inputs"] != "diffuse":
            continue
        if M * K * D >= _LEAST_WORK and D <= _LARGEST_D:
            rows.append((M * K, M * K * D, K * D))
            times.append(machine["threads"] * case["contenders"]["fastvae"]["seconds"]["median"])
    relative = np.array(rows) / np.array(times)[:, None]
    scale = relative.max(0)
    fitted = nnls(relative / scale, np.ones(len(times)))[0] / scale
    limits = [case["limits"] for case in record["cases"].values()]
    rate = np.median([limit["multiply_add"]["median"] for limit in limits if "multiply_add" in limit])
    return {
        "source": source,
        "machine": f"{machine['cpu']}, {machine['vector']}, {machine['threads']} threads",
        **dict(zip(("pair", "number", "component_number"), map(_rounded, fitted), strict=True)),
        "deviation": round(float(np.abs(relative @ fitted - 1).max()), 3),
        "fewest_rows": 1,
        "multiply_add_rate": _rounded(rate / machine["threads"]),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def update_rates(root: Path, *, check: bool) -> list[str]:
    """Write the rates anew, or with `check` nothing; the file if it was out of step.  A root without it has none."""
    path = root / PLACE
    if not path.exists():
        return []
    content = rates(Results(root / "benchmarks" / "results"))
    if json.loads(path.read_text() or "null") == content:
        return []
    if not check:
        with whole_file(path) as file:
            file.write(as_json(content))
    return [str(PLACE)]
