"""Tables stand in the pages as the records give them, and a page out of step is found."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from fastvae.backends import BACKENDS
from fastvae.benchmarks import formatting
from fastvae.benchmarks import record as record_module
from fastvae.benchmarks.record import open_record
from tools.tables import status_table
from tools.tables.__main__ import main
from tools.tables.registry import TABLES, Results, render

from .conftest import TINY
from .test_record import mixture

ROOT = Path(__file__).parents[2]
EM = {
    "threads": 2,
    "speed": [
        {
            **{
                "N": 100_000,
                "K": 256,
                "D": 32,
                "dtype": "float32",
                "iterations": 5,
                "faster": 6.1,
                "faster_by_cpu_time": 8.0,
            },
            "seconds": {"fastvae": {"median": 1.0}, "scikit-learn": {"median": 6.0}},
            "largest_error_of_means": {"fastvae": 1e-5, "scikit-learn": 1e-3},
        }
    ],
    "memory": {
        **{"N": 1_000_000, "K": 1000, "D": 16},
        **{"rows_bytes": 64_000_000, "peak_beyond_rows_bytes": 210_000_000, "responsibilities_bytes": 4_000_000_000},
    },
}
PAGE = "# Page\n\n<!-- table: {name} -->\n<!-- /table -->\n\nand more\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with a record and one page for each table."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    record = open_record(results / "cpu.json", "cpu", TINY)
    case = mixture("forward", 1024, 10_000, 40, fastvae=1.0, fastvae_avx2=2.0, expansion_compile=6.0, keops=120.0)
    case["contenders"]["eager"] = {"status": "skipped", "why": "large"}
    record.add("one", case)
    gaussian = {"suite": "gaussian", "work": "gaussian_rsample forward", "M": 10, "D": 4, "bytes_moved": 50}
    limits = {"limits": {"copy": {"median": 100.0}}}
    (results / "gaussian").mkdir()
    sampled = mixture("", 1, 1, 1, fastvae=1.0, eager=5.0, torch_distributions=7.0) | gaussian | limits
    open_record(results / "gaussian" / "cpu.json", "cpu", TINY).add("two", sampled)
    step = mixture("", 1, 1, 1, fastvae=4.0, eager=8.0) | {"suite": "train-step", "K": 500}
    one = step["contenders"]["fastvae"]
    for part in ("encoder of pseudo-inputs", "encoder of images", "sampling and density", "decoder and likelihood"):
        step["contenders"][f"fastvae: {part}"] = one | {"seconds": one["seconds"] | {"median": 0.8}}
    step["contenders"]["fastvae: optimiser"] = one | {"seconds": one["seconds"] | {"median": 0.4}}
    (results / "train-step").mkdir()
    open_record(results / "train-step" / "cpu.json", "cpu", TINY).add("three", step)
    (results / "alone").mkdir()
    alone = mixture("forward", 1024, 10_000, 40, fastvae=1.0, expansion_compile=3.0, keops=120.0)
    open_record(results / "alone" / "cpu.json", "cpu", TINY).add("one", alone)
    (results / "avx2").mkdir()
    narrow = mixture("forward", 1024, 10_000, 40, fastvae=2.0, expansion_compile=5.0, keops=30.0)
    open_record(results / "avx2" / "cpu.json", "cpu", TINY).add("one", narrow)
    row = {"elbo": [-3.0, -3.0], "kl": [1.0, 1.0], "active_units": [4, 5]}
    priors = [{"prior": "vamp", "log_likelihood": [-1.0, -2.0], **row}]
    (results / "demo-digits.json").write_text(json.dumps({"priors": priors, "verdict": {"sentence": "vamp wins."}}))
    evaluation = {"log_likelihood": -80.126, "standard_error": 0.2, "elbo": -85.0, "kl": 25.0, "active_units": 20}
    evaluation["images"] = 1234
    (results / "static-mnist-vamp.json").write_text(json.dumps(evaluation | {"latent": 40}))
    bounds = {
        "estimators": {"samples": 5, "gradient": "dreg", "variance": 0.0123, "bias": 0.251, "bias_error": 0.2},
        "backward-samples": {
            "backward_samples": 10,
            "variance_of_a_batch": 2.345,
            "variance_over_batches": 1.0123,
            "seconds": 0.2,
        },
        "refresh": {"way": "subset=60", "log_likelihood": -23.456, "encoded_in_a_step": 60.0},
        "memory": {"K": 50_000, "chunk_size": None, "peak_bytes": 1_559_000_000},
    }
    for name, found in bounds.items():
        (results / f"bounds-{name}.json").write_text(json.dumps({"rows": [found]}))
    scored = {"cells": 20_000, "groups": 100, "latent": 30, "threads": 2, "largest_difference": 2e-5}
    times = {"loop_seconds": 90.0, "call_seconds": 0.3, "loop_cpu_seconds": 160.0, "call_cpu_seconds": 0.5}
    (results / "groups.json").write_text(json.dumps(scored | times))
    sampled = {"K": 1000, "samples": 6, "pyro_seconds": 6.0, "seconds": 0.03}
    (results / "mixture-samples.json").write_text(json.dumps({"latent": 10, "rows": [sampled]}))
    (results / "em.json").write_text(json.dumps(EM))
    (results / "reproductions").mkdir()
    reproduced = {"seed": 3, "evaluation": evaluation, "machine": {"threads": 1}, "seconds": 7200.0, "epochs": 191}
    for name, published, finished in (("a", [{"log_likelihood": -80.0}], True), ("b", [], False)):
        found = reproduced | {"protocol": {"name": name, "published": published}, "finished": finished}
        (results / "reproductions" / f"{name}.json").write_text(json.dumps(found))
    of_faces = {"name": "vampprior-freyfaces-truncated", "published": [{"log_likelihood": -1800.0}]}
    measured = evaluation | {"log_likelihood": -560 * 4.5 * math.log(2)}
    faces = reproduced | {"protocol": of_faces, "finished": True, "evaluation": measured, "seconds": 300.0}
    (results / "reproductions" / "vampprior-freyfaces-truncated-seed-0.json").write_text(json.dumps(faces))
    differences = {f"{name}_difference": 2e-14 for name in ("loss", "reconstruction", "kl", "gradient", "later_loss")}
    compared = {"model": "hvae", "prior": "vamp", "images": "gray", "loss": 123.456, "steps": 20, **differences}
    (results / "anchor.json").write_text(json.dumps({"cases": [compared], "trained": None}))
    _on_a_gpu(results / "gpu-h200")
    for name in TABLES:
        (tmp_path / "docs" / f"{name}.md").write_text(PAGE.format(name=name))
    return tmp_path


def _on_a_gpu(folder: Path) -> None:
    """What a run on a GPU leaves."""
    folder.mkdir()
    machine = {"device": "NVIDIA H200, sm_90, 132 multiprocessors", "torch": "2.11", "commit": "0123456789"}
    measured = {"name": "measure", "status": "passed", "seconds": 9.0, "detail": "7 figures measured, 0 failed"}
    (folder / "gpu.json").write_text(json.dumps({"dry": False, "machine": machine, "stages": [measured]}))
    figures = {
        "forward high": 1.0,
        "both cuda": 2.0,
        "rsample": 3.0,
        "copy rate": 4.0,
        "small": 7e-6,
        "small, call": 2.5e-5,
        "peak memory": 1e9,
    }
    (folder / "measure.json").write_text(json.dumps({"dry": False, "figures": figures, "failed": {}}))
    failures = ["tests/gpu/test_a.py::test_it[x-1]", "tests/gpu/test_a.py::test_it[x-2]", "tests/test_b.py::test_it"]
    run = {"passed": 5, "failed": 3, "skipped": 0, "ended_early": True, "failures": failures}
    (folder / "tests.json").write_text(json.dumps({"runs": [run], "reasons": {"test_it": "the harness"}}))


def line(root: Path, name: str, start: str) -> list[str]:
    text = (root / "docs" / f"{name}.md").read_text()
    (found,) = [row for row in text.splitlines() if row.startswith(f"| {start}")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_tables_say_what_the_records_say(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], root) == 0 and "docs/cpu-isa.md" in capsys.readouterr().out
    mixture_row = line(root, "cpu-mixture", "forward")
    assert mixture_row[1:] == [
        "(1024, 10000, 40)",
        "expansion-compile",
        "6.0 x",
        "120 x",
        "-",
        "-",
        "100 %",
        "1e-06",
        "1e-06",
    ]
    assert line(root, "cpu-isa", "forward")[1:3] == ["avx2", "3.0 x"]
    assert line(root, "avx2-mixture", "forward")[2:5] == ["expansion-compile", "2.5 x", "15 x"]
    assert "| 2.5 x, - | missed |" in (root / "docs" / "avx2-targets.md").read_text()
    assert line(root, "cpu-gaussian", "gaussian")[2:] == ["5.0 x", "7.0 x", "50 %"]
    assert line(root, "cpu-train-step", "K = 500, fastvae")[1:] == ["2.0 x", *["20 %"] * 4, "10 %", "90 %"]
    assert line(root, "demo", "vamp")[1:3] == ["-1.50 +- 0.71", "-3.00 +- 0.00"]
    assert "vamp wins." in (root / "docs" / "demo.md").read_text()
    assert line(root, "static-mnist", "vamp") == ["vamp", "-80.13 +- 0.20", "-85.00", "25.00", "20 of 40"]
    found, place = "-80.13 +- 0.20", ["2.0 h", "1 CPU thread"]
    assert line(root, "reproductions", "`a`")[1:] == ["3", "-80.00", found, "-0.13", "191", *place]
    assert line(root, "unfinished-reproductions", "`b`")[1:] == ["3", "-", found, "1,234", "191", *place]
    assert "`b`" not in (root / "docs" / "reproductions.md").read_text()
    assert "`a`" not in (root / "docs" / "unfinished-reproductions.md").read_text()
    truncated = ["truncated, as in the paper's code", "3", "4.64", "4.500", "-1746.7 +- 0.2", "191"]
    assert line(root, "freyfaces", "vampprior")[1:] == truncated
    assert line(root, "reproductions", "`vampprior-freyfaces-truncated`")[6] == "5 min"
    assert line(root, "anchor", "hvae, vamp, gray")[1:] == ["123.46", *["2e-14"] * 5]
    assert "from memory" in line(root, "published", "`standard-static-mnist`")
    of_faces = next(
        row for row in (root / "docs" / "differences.md").read_text().splitlines() if "split is our own" in row
    )
    assert "`standard-freyfaces`" in of_faces and "`vampprior-freyfaces-truncated`" in of_faces
    assert line(root, "bounds-estimators", "dreg")[1:] == ["5", "0.012", "0.25 (0.20)"]
    assert line(root, "bounds-backward-samples", "10")[1:] == ["1.00", "2.35", "1.01"]
    assert line(root, "bounds-refresh", "subset=60")[1:] == ["60", "-23.46"]
    assert line(root, "bounds-memory", "50,000")[1:] == ["at once", "1.56 GB"]
    assert line(root, "em-speed", "100,000")[1:] == ["2", "1.20 s", "0.20 s", "6.1 x", "8.0 x", "1e-03", "1e-05"]
    assert line(root, "em-memory", "1,000,000")[1:] == ["0.06 GB", "0.21 GB", "4.00 GB"]
    assert line(root, "groups", "20,000 cells")[1:] == ["2", "90 s", "0.30 s", "300 x", "320 x", "2e-05"]
    text = (root / "docs" / "cpu-targets.md").read_text()
    assert "| 6.0 x, - | not measured | 3.0 x, - |" in text
    assert "not measured" in text and text.startswith("# Page\n") and text.endswith("\n\nand more\n")
    assert main(["--check"], root) == 0


def test_the_status_says_what_ran_where_and_what_never(root: Path) -> None:
    main([], root)
    row = dict(zip(status_table.OPERATIONS, line(root, "status", "triton, high |")[1:], strict=True))
    assert row["mixture_log_prob"] == "H200" and row["mixture_log_prob, backward"] == row["gaussian_kl"] == "never"
    assert line(root, "status", "triton, highest")[1:] == ["never"] * 3 + ["H200"] + ["never"] * 4
    assert line(root, "status", "cuda, highest")[1:] == ["never", "H200"] + ["never"] * 6
    cpu = record_module.machine("cpu")["cpu"]
    assert line(root, "status", "cpu, avx2")[1] == cpu, "a contender by the name of its instruction set"
    default = record_module.default_backend("cpu")
    assert [line(root, "status", f"{default} |")[1 + i] for i in (0, 3, 7)] == [cpu, cpu, cpu]
    assert line(root, "status", "measure")[1] == "passed: 7 figures measured, 0 failed"
    assert line(root, "status", "tune")[1] == "never"
    assert line(root, "status", "test | 5")[1] == "5 passed, 3 failed, ended early"
    assert line(root, "status", "`test_a.py::test_it`")[1:] == ["2", "the harness"]
    assert line(root, "status", "`gpu-h200/`")[1:] == ["NVIDIA H200, sm_90, 132 multiprocessors", "0123456", "2.11"]
    assert line(root, "triton-targets", "peak memory")[2:] == ["1.0 GB", "met", "-"]
    assert line(root, "triton-targets", "forward, (100, 500, 40) ")[2:] == ["7 us", "met", "25 us"]


def test_the_status_of_the_kept_records() -> None:
    """Older records say which instruction set ran by default in a sentence."""
    rows = render("status", Results(ROOT / "benchmarks" / "results")).splitlines()
    for start in (
        "| cpu, avx512 | AMD EPYC |",
        "| cpu, avx2 | AMD EPYC |",
        "| cuda, highest | H100, H200 | H100, H200 | never |",
    ):
        assert [row for row in rows if row.startswith(start)], start


def test_a_dry_run_is_no_run(root: Path) -> None:
    """Its figures judge no target, and count nowhere in the status."""
    path = root / "benchmarks" / "results" / "gpu-h200" / "gpu.json"
    path.write_text(path.read_text().replace('"dry": false', '"dry": true'))
    main([], root)
    assert line(root, "triton-targets", "peak memory")[2:] == ["-", "never run", "-"]
    assert "H200" not in (root / "docs" / "status.md").read_text()


def test_pages_are_found_in_every_folder_of_the_docs(root: Path) -> None:
    for folder in ("guides", "developer/kernels"):
        (root / "docs" / folder).mkdir(parents=True)
        (root / "docs" / folder / "page.md").write_text(PAGE.format(name="demo"))
    main([], root)
    for folder in ("guides", "developer/kernels"):
        assert "vamp wins." in (root / "docs" / folder / "page.md").read_text()


def test_a_table_without_a_marker_is_told(root: Path) -> None:
    main([], root)
    (root / "docs" / "groups.md").unlink()
    assert main(["--check"], root) == "these tables have no marker in README.md or docs/: groups"


def test_no_table_assumes_the_folder_of_its_page() -> None:
    """It has no relative link, as pages move."""
    for name in TABLES:
        text = render(name, Results(ROOT / "benchmarks" / "results"))
        assert text and not re.search(r"\]\((?!https?://)|\]: ", text), name


def test_records_are_small_and_no_pictures_are_kept() -> None:
    """What machines make is kept only where a table needs it: JSON below 100 kB, no PNG."""
    for path in (ROOT / "benchmarks" / "results").rglob("*"):
        assert path.suffix != ".png", path
        if path.suffix == ".json":
            assert path.stat().st_size < 100_000, path


def test_check_names_the_page_and_the_table_that_is_out_of_step(root: Path) -> None:
    message = main(["--check"], root)
    assert isinstance(message, str) and "docs/cpu-mixture.md: cpu-mixture" in message
    main([], root)
    page = root / "docs" / "cpu-mixture.md"
    changed = page.read_text().replace("6.0 x", "7.0 x")
    page.write_text(changed)
    message = main(["--check"], root)
    assert isinstance(message, str) and message.splitlines()[1:] == ["  docs/cpu-mixture.md: cpu-mixture"]
    assert page.read_text() == changed, "--check writes nothing"
    assert main([], root) == 0 and main(["--check"], root) == 0


def test_a_record_that_changes_puts_pages_out_of_step(root: Path) -> None:
    main([], root)
    path = root / "benchmarks" / "results" / "static-mnist-vamp.json"
    path.write_text(path.read_text().replace("-80.126", "-79.0"))
    assert "static-mnist" in str(main(["--check"], root))


@pytest.mark.parametrize(
    ("kept", "empty", "sentence"),
    [("a", "unfinished-reproductions", "went to its end"), ("b", "reproductions", "No run has gone to its end")],
)
def test_runs_that_are_all_finished_or_none(root: Path, kept: str, empty: str, sentence: str) -> None:
    for path in (root / "benchmarks" / "results" / "reproductions").iterdir():
        if path.stem != kept:
            path.unlink()
    main([], root)
    assert sentence in (root / "docs" / f"{empty}.md").read_text()
    assert "No run is recorded of `exemplar-mnist`," in (root / "docs" / "unfinished-reproductions.md").read_text()


def test_what_is_not_recorded_says_so(root: Path) -> None:
    (root / "benchmarks" / "results" / "demo-digits.json").unlink()
    main([], root)
    assert "Not recorded yet: benchmarks/results/demo-digits.json" in (root / "docs" / "demo.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: cpu-everything -->\n<!-- /table -->\n", "no table 'cpu-everything'"),
        ("<!-- table: cpu-isa -->\nno end\n", "has no <!-- /table -->"),
        ("<!-- table: demo -->\n<!-- table: demo -->\n<!-- /table -->\n", "before the next one"),
    ],
)
def test_a_broken_page_is_told(root: Path, text: str, message: str) -> None:
    (root / "README.md").write_text(text)
    found = str(main([], root))
    assert found.startswith("error: README.md: ") and message in found


def test_a_broken_record_is_told(root: Path) -> None:
    (root / "benchmarks" / "results" / "demo-digits.json").write_text("{}")
    assert "demo-digits.json lacks" in str(main([], root))
    (root / "benchmarks" / "results" / "demo-digits.json").write_text("{")
    assert "is not JSON" in str(main([], root))


def test_words() -> None:
    assert [formatting.ratio(v) for v in (None, 0.954, 1.999, 6.24, 9.97, 113.2)] == [
        "-", "0.95 x", "2.0 x", "6.2 x", "10 x", "113 x"
    ]  # fmt: skip
    assert [formatting.duration(v) for v in (2.0, 0.0045, 3.1e-5)] == ["2 s", "4.5 ms", "31 us"]
    assert [formatting.size(v) for v in (None, 5000, 25_600_000, 3_000_000_000)] == ["-", "< 1 MB", "26 MB", "3.0 GB"]
    assert formatting.percent(0.756) == "76 %"


def test_a_default_rests_on_records_that_are_there() -> None:
    """A compiled backend is a default by measurements, and the table of the choice names them.

    Two have not run on a GPU yet, and are taken only where their precision is asked for.
    """
    for backend in BACKENDS.values():
        unmeasured = backend.name in ("composite", "cuda-high", "cuda-medium")
        assert bool(backend.measured_in) != unmeasured, backend.name
        for record in backend.measured_in:
            assert (ROOT / "benchmarks" / "results" / record).exists()
            assert f"`{record}`" in render("choice", Results(ROOT / "benchmarks" / "results"))
