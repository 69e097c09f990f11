"""The studies run, and their model is that of the digits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae.benchmarks.studies import (
    annealing,
    backward_components,
    backward_samples,
    digits,
    em,
    encoding_memory,
    estimators,
    exemplar_refresh,
    out_of_core,
    total_correlation,
)
from fastvae.benchmarks.studies.__main__ import main

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So short that only the form of what is found can be looked at."""
    monkeypatch.setattr(digits, "EPOCHS", 1)
    monkeypatch.setattr(estimators, "DRAWS", 3)
    for name, value in {"DRAWS": 3, "STEPS": 1, "FEW": (2,), "S": 4}.items():
        monkeypatch.setattr(backward_samples, name, value)
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path))
    np.savez(tmp_path / "mnist.npz", x_train=np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8))
    sizes = {"DRAWS": 2, "STEPS": 1, "EXEMPLARS": 30, "SUBSET": 4, "PSEUDO_INPUTS": 4}
    for name, value in {**sizes, "FEW": {"digits": (30,), "exemplars": (3,), "pseudo-inputs": (2,)}}.items():
        monkeypatch.setattr(backward_components, name, value)
    monkeypatch.setattr(exemplar_refresh, "SAMPLES", 2)
    monkeypatch.setattr(encoding_memory, "SIZES", (20,))
    for name, value in {"IMAGES": 2, "SAMPLES": 20, "CHAINS": 3, "TEMPERATURES": 4, "LEAPFROG_STEPS": 1}.items():
        monkeypatch.setattr(annealing, name, value)
    monkeypatch.setattr(total_correlation, "POINTS", 2000)
    monkeypatch.setattr(em, "SPEED", (300, 5, 4))
    monkeypatch.setattr(em, "MEMORY", (500, 6, 3))


def test_the_split_is_the_recorded_one() -> None:
    """By its sums: another split would give other numbers than those in the records."""
    data = digits.load()
    assert data.train.shape == (1200, 64) and data.validation.shape == (297, 64)
    assert float(data.train.double().sum()) == 23485.75
    assert int(data.validation.sum()) == 5817
    assert torch.equal(data.validation, data.validation.round())


ROWS = {
    **{"backward-components": 3, "backward-samples": 2, "estimators": 6, "refresh": 10, "memory": 2},
    **{"annealing": 3, "total-correlation": 3},
}


@pytest.mark.parametrize(("study", "rows"), ROWS.items())
def test_a_study_writes_its_record(study: str, rows: int, tmp_path: Path) -> None:
    main([study, "--out", str(tmp_path / "new")])
    found = json.loads((tmp_path / "new" / f"bounds-{study}.json").read_text())
    assert len(found["rows"]) == rows and found["threads"] == 1 and found["versions"]["torch"]
    for row in found["rows"]:
        if study == "estimators":
            assert row["variance"] > 0 and (row["gradient"] != "plain" or row["bias"] == 0)
        if study == "backward-samples":
            assert row["seconds"] > 0 and row["backward_samples"] in (4, 2)
            both = row["variance_of_a_batch"], row["variance_over_batches"]
            assert both == (1, 1) if row["backward_samples"] == 4 else min(both) > 0
        if study == "backward-components":
            assert min(row["seconds"], row["seconds_of_all"]) > 0 and row["components"] > row[
                "backward_components"
            ] in (30, 3, 2)
            assert row["added_variance"] > 0
        if study == "refresh":
            # of validation images, which are encoded too, none is counted
            assert row["log_likelihood"] < 0 and row["way"].startswith("all") == (row["encoded_in_a_step"] == 1200)
        if study == "annealing":
            assert row["importance"] < 0 and row["posterior"] < 0 and row["prior"] < 0 and row["prior_error"] > 0
        if study == "total-correlation":
            assert row["known"] - 0.1 < row["whole"] < row["batch"] < row["weighted"] and row["cost"] > 0
        if study == "memory":
            assert row["peak_bytes"] > 50_000_000


def test_em_writes_its_record(tmp_path: Path) -> None:
    main(["em", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "em.json").read_text())
    for row, dtype, error in zip(found["speed"], ("float32", "float64"), (1e-3, 1e-9), strict=True):
        assert (
            row["dtype"] == dtype
            and row["faster"] > 0 < row["faster_by_cpu_time"]
            and row["iterations"] == em.ITERATIONS
        )
        assert 0 < row["largest_error_of_means"]["fastvae"] < error
    assert found["memory"]["N"] == 500 and found["memory"]["seconds_per_iteration"] > 0


def test_the_study_of_files_writes_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_core, "BESIDE", (600, 400, 3))
    monkeypatch.setattr(out_of_core, "LARGE", (5000, 400, 3))
    monkeypatch.setattr(out_of_core, "MEMORIES", (2**28, 2**14))
    main(["out-of-core", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "out-of-core.json").read_text())
    whole, cut = found["beside"]
    assert whole["bytes_read"] == whole["input_bytes"] < cut["bytes_read"] and cut["block_components"] < 400
    assert whole["largest_difference"] < 1e-5 and cut["largest_difference"] < 1e-5
    large = found["large"]
    assert large["M"] == 5000 and large["bytes_read"] == large["input_bytes"] == 4 * 3 * 5800
    assert large["peak_bytes"] == max(large["peak_bytes_of_each_half"]) > 50_000_000
    assert large["cpu_seconds"] > 0 and large["seconds"] > 0


def test_the_recorded_study_of_files_is_flat_in_memory_and_as_fast_as_the_call() -> None:
    found = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "out-of-core.json").read_text())
    first, second = found["large"]["peak_bytes_of_each_half"]
    assert abs(second - first) < 0.1 * first and second < found["large"]["input_bytes"]
    assert all(row["ratio"] < 1.1 for row in found["beside"] if row["memory"] >= 2**23)
