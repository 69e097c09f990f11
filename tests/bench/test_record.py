"""The record is whole, continued, and kept by an interruption; targets are judged by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastvae
from fastvae.benchmarks import cpu_targets
from fastvae.benchmarks.case import Case, Contender, Prepared
from fastvae.benchmarks.cpu_targets import MET, MISSED, NOT_MEASURED, REPORTED, judge
from fastvae.benchmarks.errors import BenchmarkError
from fastvae.benchmarks.record import measured_files, open_record, read_record, write_record
from fastvae.benchmarks.runner import run_cases

from .conftest import TINY


def case(name: str, log: list[str], *, fail: BaseException | None = None) -> Case:
    def prepare(earlier: object) -> Prepared:
        log.append(name)
        if fail is not None:
            raise fail
        return Prepared([Contender("fastvae", lambda: None, lambda _: {"log_prob": 0.0})])

    return Case({"suite": "test", "work": name}, ("fastvae",), prepare)


def test_a_record_is_written_after_each_case_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cpu.json"
    log: list[str] = []
    record = open_record(path, "cpu", TINY)
    with pytest.raises(KeyboardInterrupt):
        run_cases([case("a", log), case("b", log, fail=KeyboardInterrupt())], record, TINY, "cpu")
    kept = json.loads(path.read_text())
    assert list(kept["cases"]) == ["test, a"] and kept["cases"]["test, a"]["contenders"]["fastvae"]["seconds"]
    assert kept["machine"]["threads"] == 1 and kept["versions"]["torch"] and kept["code"]["digest"]
    assert [p.name for p in path.parent.iterdir()] == ["cpu.json"], "a part of a file was left"

    again = open_record(path, "cpu", TINY)
    assert run_cases([case("a", log), case("b", log)], again, TINY, "cpu") == []
    assert log == ["a", "b", "b"]
    assert list(read_record(path).cases) == ["test, a", "test, b"]
    # Asked of more contenders, a case is measured again.
    run_cases([replace(case("a", log), asked=("fastvae", "eager"))], again, TINY, "cpu")
    assert log[-1] == "a"


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [("code", "digest", "0"), ("machine", "cpu", "abacus"), ("versions", "torch", "0.4"), ("settings", "seconds", 9.0)],
)
def test_a_record_of_another_run_is_not_mixed_with_this_one(tmp_path: Path, part: str, field: str, value: Any) -> None:
    path = tmp_path / "cpu.json"
    run_cases([case("a", [])], open_record(path, "cpu", TINY), TINY, "cpu")
    content = json.loads(path.read_text())
    content[part][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(BenchmarkError, match=f"{part} {field} {value}.*--overwrite"):
        open_record(path, "cpu", TINY)
    assert open_record(path, "cpu", TINY, overwrite=True).cases == {}
    assert json.loads(path.read_text())["cases"], "an old record is there until there is something new"


def test_another_commit_of_the_same_code_continues(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    run_cases([case("a", [])], open_record(path, "cpu", TINY), TINY, "cpu")
    path.write_text(path.read_text().replace('"commit": ', '"commit": "0123", "before": '))
    assert "test, a" in open_record(path, "cpu", TINY).cases


def test_a_record_has_a_line_a_case_and_is_whole_or_not_there(tmp_path: Path) -> None:
    content = {"format": 1, "none": {}, "cases": {"a, b": {"x": [1, {"y": 0.1}]}, "c": {}}, "rows": [{"z": "é"}, 2]}
    write_record(tmp_path / "cpu.json", content)
    text = (tmp_path / "cpu.json").read_text()
    assert json.loads(text) == content and list(json.loads(text)["cases"]) == ["a, b", "c"]
    assert '"a, b":{"x":[1,{"y":0.1}]},' in text.splitlines()
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path / "cpu.json", {"cases": {"a": float("nan")}})
    assert (tmp_path / "cpu.json").read_text() == text and len([*tmp_path.iterdir()]) == 1


def test_what_is_no_record_is_told(tmp_path: Path) -> None:
    for text in ("", "[]", '{"format": 99, "cases": {}}'):
        (tmp_path / "cpu.json").write_text(text)
        with pytest.raises(BenchmarkError, match="not a record"):
            open_record(tmp_path / "cpu.json", "cpu", TINY)
    with pytest.raises(BenchmarkError, match="no record"):
        read_record(tmp_path / "absent.json")


def mixture(work: str, M: int, K: int, D: int, *, inputs: str = "diffuse", **seconds: float) -> dict[str, Any]:
    """A case as the record has it."""
    return {
        "suite": "mixture",
        "work": work,
        "inputs": inputs,
        "M": M,
        "K": K,
        "D": D,
        "contenders": {
            name.replace("_", "-"): {
                "status": "measured",
                "seconds": {"median": time, "low": time, "high": time, "rounds": 3},
                "extra_bytes": 10_000_000,
                "errors": {"log_prob": 1e-6},
            }
            for name, time in seconds.items()
        },
        "limits": {"multiply_add": {"median": 4.0 * M * K * D, "low": 1.0, "high": 1.0, "rounds": 3}},
    }


def verdicts(*cases: dict[str, Any]) -> dict[tuple[str, str], str]:
    judged = judge({str(index): found for index, found in enumerate(cases)})
    return {(one.target.work, one.target.against): one.verdict for one in judged}


def test_targets_are_judged() -> None:
    first = "forward, (1024, 10000, 40) and (256, 50000, 64), diffuse"
    assert set(verdicts().values()) == {NOT_MEASURED}
    good = mixture("forward", 1024, 10_000, 40, fastvae=1.0, expansion_compile=6.0, keops=80.0, fastvae_avx2=0.5)
    also = mixture("forward", 256, 50_000, 64, fastvae=1.25, eager=7.5, keops=99.0)
    assert verdicts(good)[first, "best peer"] == NOT_MEASURED, "one of two cases does not decide it"
    found = verdicts(good, also)
    assert found[first, "best peer"] == MET
    assert found[first, "KeOps"] == MISSED  # 99 / 1.25 < 80
    slow = mixture("forward", 256, 50_000, 64, fastvae=1.26, eager=7.5)
    assert verdicts(good, slow)[first, "best peer"] == MISSED
    # A miss is a miss though the other case is not there; a peer that is not there is no ratio.
    assert verdicts(slow)[first, "best peer"] == MISSED
    assert verdicts(slow)[first, "KeOps"] == NOT_MEASURED


def test_targets_against_limits_and_without_a_bound() -> None:
    rate = ("forward, D = 64 and 128", "the probed FMA rate (fraction)")
    near = mixture("forward", 1024, 10_000, 128, fastvae=1.3)
    assert verdicts(near, mixture("forward", 256, 50_000, 64, fastvae=1.3))[rate] == MET
    probed = mixture("forward", 256, 50_000, 64, fastvae=1.3)
    limit = probed["limits"]["multiply_add"]
    probed["limits"]["multiply_add_avx2"] = {**limit, "median": 1.2 * limit["median"]}
    assert verdicts(near, probed)[rate] == MISSED, "the highest of the probes is the limit"
    assert verdicts(near, mixture("forward", 256, 50_000, 64, fastvae=1.4))[rate] == MISSED
    step = {"suite": "train-step", "work": "VampPrior step", "batch": 100, "D": 40}
    steps = [mixture("", 1, 1, 1, fastvae=1.0, eager=3.0) | step | {"K": K} for K in (500, 5000)]
    assert verdicts(*steps)["one VampPrior training step, K = 500 and 5000", "the same model, eager"] == REPORTED


def test_points_of_a_series_are_no_target() -> None:
    point = mixture("forward", 1024, 10_000, 40, fastvae=1.0, eager=1.0) | {"series": "roofline"}
    assert set(verdicts(point).values()) == {NOT_MEASURED}


def test_the_table_of_targets_is_complete() -> None:
    assert all(target.cases for target in cpu_targets.TARGETS)
    assert len({(target.work, target.against) for target in cpu_targets.TARGETS}) == len(cpu_targets.TARGETS)


def test_the_digest_is_of_all_code_that_a_measurement_runs() -> None:
    """Every module of the library, the command line apart."""
    library = Path(fastvae.__file__).parent
    modules = {path for room in (library, library / "kernels") for path in room.rglob("*.py")}
    modules = {path for path in modules if path.relative_to(library).parts[0] not in ("app", "benchmarks")}
    assert len(modules) > 30 and modules <= set(measured_files())
