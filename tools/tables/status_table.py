"""What has run where: a generated answer for each backend and operation, from the records."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fastvae.backends import PRECISIONS
from fastvae.benchmarks import formatting
from fastvae.benchmarks.record import Record

from ..gpu.stages import STAGES
from .gpu_records import GpuRecord, gpu_records
from .registry import Results, table

NEVER = "never"
CPU_RECORDS = ("cpu", "gaussian/cpu", "train-step/cpu", "alone/cpu", "avx2/cpu")
OPERATIONS = (
    "mixture_log_prob",
    "mixture_log_prob, backward",
    "mixture_kl, backward",
    "gaussian_rsample",
    "gaussian_rsample, backward",
    "gaussian_kl",
    "gaussian_kl, backward",
    "VampPrior step",
)
TRITON, CUDA = (tuple(f"{impl}, {precision}" for precision in PRECISIONS) for impl in ("triton", "cuda"))
BACKENDS = ("cpu, baseline", "cpu, avx2", "cpu, avx512", "composite", *TRITON, *CUDA)
# figures of tools/gpu/measure.py that are no "forward WHO" and no "both WHO": (backend, operation)
FIGURES = {
    "rsample": ("triton, highest", "gaussian_rsample"),
    "rsample cuda": ("cuda, highest", "gaussian_rsample"),
    "KL graph": ("triton, highest", "mixture_kl, backward"),
    "KL graph cuda": ("cuda, highest", "mixture_kl, backward"),
    "step cuda 500": ("cuda, highest", "VampPrior step"),
    "step triton 500": ("triton, highest", "VampPrior step"),
    "step composite 500": ("composite", "VampPrior step"),
}


class Ran(NamedTuple):
    """That an operation of a backend was measured on a machine."""

    backend: str
    operation: str
    machine: str


def bench_ran(record: Record, machine: str) -> Iterator[Ran]:
    """What a record of `fastvae bench` shows."""
    default = _default_backend(record)
    for case in record.cases.values():
        for name, entry in case["contenders"].items():
            backend = _backend(name, default)
            if entry["status"] == "measured" and backend is not None:
                yield Ran(backend, _operation(case), machine)


def _default_backend(record: Record) -> str:
    """What ran where no backend was named; records that do not say so have a sentence with the instruction set."""
    code = record.content["code"]
    if "default" in code:
        return str(code["default"])
    isa = re.match(r"cpu \(compiled kernels, (\w+)", code["extension"])
    return f"cpu, {isa[1]}" if isa else "composite"


def _backend(contender: str, default: str) -> str | None:
    """The backend of a contender; None where the contender is a peer, or a part of a step."""
    if contender in ("fastvae", "fastvae-dense", "fastvae-shared"):
        return default
    named = contender.removeprefix("fastvae-")
    known = {"composite": "composite", "cuda": "cuda, highest", **{name.replace(", ", "-"): name for name in TRITON}}
    known |= {isa: f"cpu, {isa}" for isa in ("baseline", "avx2", "avx512")}
    return known.get(named) if named != contender else None


def _operation(case: Mapping[str, Any]) -> str:
    if case["suite"] == "train-step":
        return "VampPrior step"
    work = str(case["work"])  # of the Gaussian suite "gaussian_kl forward + backward", of the mixture's without a name
    operation = "mixture_log_prob" if case["suite"] == "mixture" else work.split()[0]
    return f"{operation}, backward" if "backward" in work else operation


def figures_ran(gpu: GpuRecord) -> Iterator[Ran]:
    """What the figures of a run on a GPU show."""
    who = {name.removeprefix("triton, "): name for name in TRITON}
    who |= {name.removesuffix(", highest").replace(", ", " "): name for name in CUDA}  # "cuda", "cuda high", ...
    for figure in gpu.figures:
        work, _, name = figure.partition(" ")
        if name in who and work in ("forward", "both"):
            yield Ran(who[name], f"mixture_log_prob{', backward' * (work == 'both')}", gpu.name)
        elif figure in FIGURES:
            yield Ran(*FIGURES[figure], gpu.name)


@table("status", "*")
def status(results: Results) -> str:
    """What has run where: operations by backend, stages and tests on GPUs, and where each record is from."""
    gpus = gpu_records(results)
    found: set[Ran] = set()
    sources = []
    for name in CPU_RECORDS:
        if (results.folder / f"{name}.json").is_file():
            record = results.bench(name)
            machine = str(record.content["machine"]["cpu"])
            found |= {*bench_ran(record, machine)}
            sources.append(_source(f"{name}.json", f"{machine}, {record.content['machine']['vector']}", record.content))
    for gpu in gpus:
        found |= {*figures_ran(gpu)} | {ran for record in gpu.bench for ran in bench_ran(record, gpu.name)}
        told = {"versions": gpu.machine, "code": {"commit": gpu.machine.get("commit")}}
        sources.append(_source(f"{gpu.folder}/", gpu.machine["device"], told))
    parts = [
        "Where each operation was measured; `never`: no record has a time of it, though tests may have run it.",
        _operations(found),
        "Stages of `make gpu`:",
        _stages(gpus),
        "Tests that failed on a GPU:",
        _failures(gpus),
        "Where the records in `benchmarks/results/` are from:",
        formatting.markdown(["record", "machine", "commit", "torch"], sources, left=4),
    ]
    return "\n\n".join(parts)


def _source(name: str, machine: str, content: Mapping[str, Any]) -> list[str]:
    commit = content["code"]["commit"]
    return [f"`{name}`", machine, f"{commit[:7]}" if commit else formatting.NOTHING, content["versions"]["torch"]]


def _operations(found: set[Ran]) -> str:
    """Backends down, operations across; the machines in each cell."""
    where = defaultdict(set)
    for ran in found:
        where[ran.backend, ran.operation].add(ran.machine)
    rows = []
    for backend in BACKENDS:
        cells = [", ".join(sorted(where[backend, operation])) or NEVER for operation in OPERATIONS]
        rows.append([backend, *cells])
    return formatting.markdown(["backend", *OPERATIONS], rows, left=1 + len(OPERATIONS))


def _stages(gpus: list[GpuRecord]) -> str:
    rows = []
    for stage in STAGES:
        cells = []
        for gpu in gpus:
            told = next((f"{one['status']}: {one['detail']}" for one in gpu.stages if one["name"] == stage.name), NEVER)
            cells.append(_tests(gpu) or told if stage.name == "test" else told)
        rows.append([stage.name, *cells] if gpus else [stage.name, NEVER])
    return formatting.markdown(["stage", *([gpu.name for gpu in gpus] or [""])], rows, left=2 + len(gpus))


def _tests(gpu: GpuRecord) -> str:
    """Each run of the tests: "14 passed, 8 failed; 205 passed, 24 failed"."""
    return "; ".join(
        f"{run['passed']} passed, {run['failed']} failed{', ended early' * run['ended_early']}"
        for run in gpu.tests.get("runs", ())
    )


def _failures(gpus: list[GpuRecord]) -> str:
    """A line for each test that failed: how many of its cases on each GPU, and why if that is known."""
    counts: dict[str, Counter[str]] = {gpu.name: Counter() for gpu in gpus}
    reasons: dict[str, str] = {}
    for gpu in gpus:
        reasons |= gpu.tests.get("reasons", {})
        failures = {failure for run in gpu.tests.get("runs", ()) for failure in run["failures"]}
        counts[gpu.name].update(failure.partition("[")[0] for failure in failures)
    tests = sorted({test for counter in counts.values() for test in counter})
    if not tests:
        return "*No run of the tests on a GPU is recorded, or none failed.*"
    rows = []
    for test in tests:
        file, _, name = test.rpartition("::")
        cells = [str(counter[test] or formatting.NOTHING) for counter in counts.values()]
        rows.append([f"`{file.rpartition('/')[2]}::{name}`", *cells, reasons.get(name, "not looked into")])
    return formatting.markdown(["test", *counts, "why"], rows, left=2 + len(counts))
