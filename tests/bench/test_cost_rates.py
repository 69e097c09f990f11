"""The rates of `fastvae plan` are those of the records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.tables import cost_rates
from tools.tables.cost_rates import PLACE, rates, update_rates
from tools.tables.registry import Results

ROOT = Path(__file__).parents[2]


def write_record(folder: Path, pair: float, number: float, component_number: float, noise: float = 0.0) -> None:
    """A record of two threads whose times follow the model, but for `noise`, and of calls that are none of it."""
    shapes = [(1000, 10_000, D) for D in (16, 40, 100)] + [(1, 10**7, 64), (10**5, 1000, 8), (4, 10**6, 64)]
    cases = {}
    for index, (M, K, D) in enumerate(shapes):
        seconds = M * K * (pair + D * number) + K * D * component_number
        seconds *= (1 + noise * (-1) ** index) / 2
        cases[str(index)] = case = {
            **{"suite": "mixture", "work": "forward", "inputs": "diffuse", "M": M, "K": K, "D": D},
            "contenders": {"fastvae": {"seconds": {"median": seconds}}},
            "limits": {"multiply_add": {"median": 4e11}},
        }
        slow = case | {"contenders": {"fastvae": {"seconds": {"median": 100 * seconds}}}}
        cases |= {
            f"{index} small": slow | {"M": 2, "K": 3},
            f"{index} backward": slow | {"work": "forward + backward"},
            f"{index} other": slow | {"inputs": "mnist_latents"},
            f"{index} gaussian": slow | {"suite": "gaussian"},
        }
    machine = {"cpu": "one", "vector": "AVX512", "threads": 2}
    for path in (folder / "cpu.json", folder / "avx2" / "cpu.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine, "cases": cases}))


def test_the_fit_finds_what_the_times_were_made_of(tmp_path: Path) -> None:
    write_record(tmp_path, 1e-10, 2e-11, 3e-10)
    found = rates(Results(tmp_path))["cpu"]
    assert [found[name] for name in ("pair", "number", "component_number")] == pytest.approx([1e-10, 2e-11, 3e-10])
    assert found["deviation"] < 1e-3 and found["multiply_add_rate"] == 2e11
    write_record(tmp_path, 1e-10, 2e-11, 3e-10, noise=0.1)
    assert 0.05 < rates(Results(tmp_path))["cpu"]["deviation"] < 0.15


def test_the_shipped_rates_are_in_step(tmp_path: Path) -> None:
    assert update_rates(ROOT, check=True) == []
    shipped = json.loads((ROOT / PLACE).read_text())
    for name, folder in (("h100", "gpu-h100"), ("h200", "gpu-h200")):
        seconds = json.loads((ROOT / f"benchmarks/results/{folder}/measure.json").read_text())["figures"][
            "forward cuda"
        ]
        assert shipped[name]["number"] * cost_rates.M * cost_rates.K * cost_rates.D == pytest.approx(seconds, rel=1e-3)


def test_rates_out_of_step_are_found_and_made_anew(tmp_path: Path) -> None:
    write_record(tmp_path / "benchmarks" / "results", 1e-10, 2e-11, 3e-10)
    assert update_rates(tmp_path, check=True) == []  # a root without the file has none
    path = tmp_path / PLACE
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert update_rates(tmp_path, check=True) == [str(PLACE)] and path.read_text() == "{}"
    assert update_rates(tmp_path, check=False) == [str(PLACE)]
    assert update_rates(tmp_path, check=True) == [] and "h200" not in json.loads(path.read_text())
