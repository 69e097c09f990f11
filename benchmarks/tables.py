"""Put tables made from `benchmarks/results/` into README.md and docs/*.md, or check that they are in step.

    python -m benchmarks.tables [--check]

A page marks where table NAME goes with two HTML comments, `table: NAME` and `/table`; what stands between them
belongs to this script.  A table is a function from the records to Markdown, registered under its name.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fastvae.app.data.whole_file import whole_file
from fastvae.app.user_errors import AppError, ConfigError

from . import precision, words
from .gpu import targets as gpu_targets
from .ratios import (
    OURS,
    Result,
    best_peer,
    copy_fraction,
    rate_fraction,
    seconds,
    times_faster,
)
from .record import Record, read_record
from .report import target_table
from .static_report import report as static_report
from .static_report.families import cuda_family, triton_family

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- table: (?P<name>\S+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
OPENING = re.compile(r"<!-- table: (\S+) -->")


@dataclass(frozen=True)
class Results:
    """The folder of recorded runs."""

    folder: Path

    def bench(self, name: str) -> Record:
        """What `fastvae bench` recorded as NAME.json."""
        return read_record(self.folder / f"{name}.json")

    def read(self, name: str) -> Any:
        """Any other JSON file."""
        try:
            return json.loads((self.folder / name).read_text())
        except ValueError as error:
            raise ConfigError(f"{self.folder / name} is not JSON ({error})") from error


Table = Callable[[Results], str]
TABLES: dict[str, tuple[str, Table]] = {}


def table(name: str, source: str) -> Callable[[Table], Table]:
    """Register a table under a name, with the file (or pattern of files) it is made from."""

    def register(make: Table) -> Table:
        TABLES[name] = (source, make)
        return make

    return register


@table("cpu-targets", "cpu.json")
def cpu_targets(results: Results) -> str:
    """Every target, and whether it is met."""
    cases = results.bench("cpu").cases | results.bench("train-step/cpu").cases
    return target_table(cases, results.bench("alone/cpu").cases)


@table("speed", "cpu.json")
def speed(results: Results) -> str:
    """The large cases in short: a random mixture, and the one of a trained model."""
    rows = []
    for result in results.bench("cpu").cases.values():
        if result["suite"] != "mixture" or "series" in result:
            continue
        shape = (result["M"], result["K"], result["D"])
        if shape not in ((1024, 10000, 40), (1024, 25000, 40)):
            continue
        peer = best_peer(result)
        faster = (words.ratio(times_faster(result, than)) for than in (peer, "keops", "mixture-same-family"))
        rows.append([f"{result['work']}, {result['inputs']}", str(shape), *faster])
    return words.markdown(["", "(M, K, D)", "than the best peer", "than KeOps", "than MixtureSameFamily"], rows, left=2)


@table("avx2-targets", "avx2/cpu.json")
def avx2_targets(results: Results) -> str:
    """The targets on a machine whose widest vectors are those of AVX2."""
    return target_table(results.bench("avx2/cpu").cases)


@table("avx2-mixture", "avx2/cpu.json")
def avx2_mixture(results: Results) -> str:
    """As cpu-mixture, there."""
    return _mixture(results.bench("avx2/cpu"))


@table("cpu-mixture", "cpu.json")
def cpu_mixture(results: Results) -> str:
    """How many times faster fastvae is than the best peer and three others, how near the limit, how exact."""
    return _mixture(results.bench("cpu"))


def _mixture(record: Record) -> str:
    rows = []
    for result in record.cases.values():
        if result["suite"] != "mixture" or "series" in result or "shared" in result["inputs"]:
            continue
        peer = best_peer(result)
        rows.append(
            [
                f"{result['work']}, {result['inputs']}",
                f"({result['M']}, {result['K']}, {result['D']})",
                peer or words.NOTHING,
                words.ratio(times_faster(result, peer)),
                *(words.ratio(times_faster(result, than)) for than in ("keops", "mixture-same-family", "eager")),
                words.percent(rate_fraction(result)),
                _error(result, OURS),
                _error(result, peer),
            ]
        )
    headings = ["", "(M, K, D)", "best peer", "faster than it", "than KeOps", "than MixtureSameFamily", "than eager"]
    return words.markdown([*headings, "of the FMA rate", "error, nats", "best peer's"], rows, left=3)


def _error(result: Result, name: str | None) -> str:
    entry = result["contenders"].get(name) if name else None
    return words.error(entry["errors"]["log_prob"] if entry and entry["status"] == "measured" else None)


@table("cpu-isa", "cpu.json")
def cpu_isa(results: Results) -> str:
    """Each instruction set: against the best peer, and against what that instruction set can do."""
    rows = []
    for result in results.bench("cpu").cases.values():
        isas = [name for name in result["contenders"] if name in _ISAS]
        for name in isas:
            meter = f"multiply_add_{name.removeprefix(f'{OURS}-')}"
            rows.append(
                [
                    f"{result['work']}, {result['inputs']}, ({result['M']}, {result['K']}, {result['D']})",
                    name.removeprefix(f"{OURS}-"),
                    words.ratio(times_faster(result, best_peer(result), ours=name)),
                    words.percent(rate_fraction(result, name, meter)),
                    _error(result, name),
                ]
            )
    return words.markdown(
        ["", "instruction set", "faster than the best peer", "of its own FMA rate", "error, nats"], rows, left=2
    )


_ISAS = tuple(f"{OURS}-{isa}" for isa in ("avx512", "avx2", "baseline"))


@table("cpu-gaussian", "cpu.json")
def cpu_gaussian(results: Results) -> str:
    """Sampling and KL."""
    rows = []
    for result in results.bench("cpu").cases.values():
        if result["suite"] == "gaussian":
            rows.append(
                [
                    result["work"],
                    f"{result['M']} x {result['D']}",
                    words.ratio(times_faster(result, "eager")),
                    words.ratio(times_faster(result, "torch-distributions")),
                    words.percent(copy_fraction(result)),
                ]
            )
    headings = ["", "M x D", "faster than eager", "than torch.distributions", "of the copy bandwidth"]
    return words.markdown(headings, rows, left=2)


@table("cpu-train-step", "train-step/cpu.json")
def cpu_train_step(results: Results) -> str:
    """A training step, and what part of it each piece takes."""
    rows = []
    for result in results.bench("train-step/cpu").cases.values():
        for name in (OURS, "eager"):
            whole = seconds(result, name)
            parts = [seconds(result, f"{name}: {part}") for part in _PARTS]
            shares = [part / whole if part and whole else None for part in parts]
            known = [share for share in shares if share is not None]
            rows.append(
                [
                    f"K = {result['K']}, {name}",
                    words.ratio(times_faster(result, "eager") if name == OURS else None),
                    *map(words.percent, shares),
                    words.percent(sum(known) if len(known) == len(shares) else None),
                ]
            )
    return words.markdown(["", "faster than eager", *_PARTS, "sum of the parts"], rows)


_PARTS = (
    "encoder of pseudo-inputs",
    "encoder of images",
    "sampling and density",
    "decoder and likelihood",
    "optimiser",
)


@table("cuda-static", "cuda-static.json")
def cuda_static_kernels(results: Results) -> str:
    """What the compiler makes of the CUDA kernels."""
    return cuda_family.markdown(results.read("cuda-static.json")["kernels"])


@table("cuda-floors", "cuda-static.json")
def cuda_floors(results: Results) -> str:
    """The least time that the CUDA kernels can take on an H200, by its data sheet."""
    return cuda_family.floors(results.read("cuda-static.json")["kernels"])


@table("demo", "demo-digits.json")
def demo(results: Results) -> str:
    """What `fastvae compare` found on the digits: means over seeds +- their standard deviation."""
    found = results.read("demo-digits.json")
    rows = [
        [row["prior"], *(_mean(row[name]) for name in ("log_likelihood", "elbo", "kl")), _mean(row["active_units"], 1)]
        for row in found["priors"]
    ]
    written = words.markdown(["prior", "test log-likelihood", "ELBO", "KL", "active units"], rows)
    return f"{written}\n\n{found['verdict']['sentence']}"


def _mean(values: list[float], digits: int = 2) -> str:
    spread = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


@table("static-mnist", "static-mnist-*.json")
def static_mnist(results: Results) -> str:
    """What `fastvae evaluate` found on static MNIST, one file for each prior."""
    rows = []
    for path in sorted(results.folder.glob("static-mnist-*.json")):
        found = results.read(path.name)
        rows.append(
            [
                path.stem.removeprefix("static-mnist-").replace("-", ", "),
                f"{found['log_likelihood']:.2f} +- {found['standard_error']:.2f}",
                f"{found['elbo']:.2f}",
                f"{found['kl']:.2f}",
                f"{found['active_units']} of {found['latent']}",
            ]
        )
    return words.markdown(["", "test log-likelihood +- standard error", "ELBO", "KL", "active units"], rows)


@table("groups", "groups.json")
def groups(results: Results) -> str:
    """One call for all groups against the loop over them."""
    found = results.read("groups.json")
    rows = [
        [
            f"{found['cells']:,} cells x {found['groups']} groups, D = {found['latent']}",
            str(found["threads"]),
            f"{found['loop_seconds']:.0f} s",
            f"{found['call_seconds']:.2f} s",
            words.ratio(found["loop_seconds"] / found["call_seconds"]),
            words.ratio(found["loop_cpu_seconds"] / found["call_cpu_seconds"]),
            f"{found['largest_difference']:.0e}",
        ]
    ]
    headings = ["", "threads", "loop", "one call", "faster", "by CPU time", "largest difference, nats"]
    return words.markdown(headings, rows)


@table("bounds-estimators", "bounds-estimators.json")
def bounds_estimators(results: Results) -> str:
    """The variance and the bias of the encoder's gradient."""
    rows = [
        [
            row["gradient"],
            str(row["samples"]),
            f"{row['variance']:.3f}",
            "" if row["gradient"] == "plain" else f"{row['bias']:.2f} ({row['bias_error']:.2f})",
        ]
        for row in results.read("bounds-estimators.json")["rows"]
    ]
    headings = ["gradient", "S", "variance / plain's", "distance from plain's mean / its norm (by chance alone)"]
    return words.markdown(headings, rows)


@table("bounds-refresh", "bounds-refresh.json")
def bounds_refresh(results: Results) -> str:
    """What training with fewer exemplars encoded in a step costs."""
    rows = [
        [row["way"], f"{row['encoded_in_a_step']:.0f}", f"{row['log_likelihood']:.2f}"]
        for row in results.read("bounds-refresh.json")["rows"]
    ]
    return words.markdown(["in a step of training", "exemplars encoded", "log-likelihood, nats"], rows)


@table("bounds-memory", "bounds-memory.json")
def bounds_memory(results: Results) -> str:
    """The peak of a process that trains with K pseudo-inputs."""
    rows = [
        [
            f"{row['K']:,}",
            f"in chunks of {row['chunk_size']:,}" if row["chunk_size"] else "at once",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
        ]
        for row in results.read("bounds-memory.json")["rows"]
    ]
    return words.markdown(["K", "encoded", "peak of the process"], rows, left=2)


@table("triton-precision", "triton-precision.json")
def triton_precision(results: Results) -> str:
    """What each precision of the Triton kernels loses."""
    return precision.markdown(results.read("triton-precision.json"))


@table("triton-static", "triton-static.json")
def triton_static(results: Results) -> str:
    """The main Triton kernels' machine code on each architecture, in the general case and by the table's tiles."""
    return static_report.markdown(
        k
        for k in results.read("triton-static.json")["kernels"]
        if not k["kernel"].startswith(("packing", "merge"))
        and not any(word in k["case"] for word in ("shared", "candidate", "in float64"))
    )


@table("triton-candidates", "triton-static.json")
def triton_candidates(results: Results) -> str:
    """What autotuning may take beside the table's tile, and what it takes of registers on each architecture."""
    return triton_family.candidates_table(results.read("triton-static.json")["kernels"])


@table("triton-targets", "*")  # also where nothing is recorded, which is what it then says
def triton_targets(results: Results) -> str:
    """The targets on an H200: met, missed, or never run."""
    recorded = results.folder / "gpu" / "measure.json"
    if not recorded.is_file():
        return gpu_targets.table({})
    found = results.read("gpu/measure.json")
    return gpu_targets.table({} if found["dry"] else found["figures"])


def render(name: str, results: Results) -> str:
    """The Markdown of a table; that it is not recorded, where its source is not there.

    Raises:
        ConfigError: there is no such table, or its record is not what it should be.
    """
    if name not in TABLES:
        raise ConfigError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
    source, make = TABLES[name]
    if not any(results.folder.glob(source)):
        return f"*Not recorded yet: benchmarks/results/{source}.*"
    try:
        return make(results)
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"table {name}: {source} lacks something it should have ({error!r})") from error


def filled(text: str, results: Results) -> str:
    """A page with every table between its markers made anew.

    Raises:
        ConfigError: a marker has no end, or names no table.
    """
    if len(OPENING.findall(text)) != len(MARKED.findall(text)):
        raise ConfigError("a table's marker has no <!-- /table --> before the next one")
    return MARKED.sub(lambda found: f"{found[1]}{render(found['name'], results)}\n{found[4]}", text)


def pages(root: Path) -> list[Path]:
    """README.md and docs/*.md, those that are there."""
    return [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.is_file()]


def update(root: Path, *, check: bool = False) -> list[str]:
    """Make the tables of all pages anew, or with `check` write nothing.

    Returns:
        The pages that were out of step, by name, with the tables that were.
    """
    results, stale = Results(root / "benchmarks" / "results"), []
    for path in pages(root):
        old = path.read_text()
        try:
            new = filled(old, results)
        except ConfigError as error:
            raise ConfigError(f"{path.relative_to(root)}: {error}") from error
        if new != old:
            before, after = MARKED.finditer(old), MARKED.finditer(new)
            names = [a["name"] for a, b in zip(before, after, strict=True) if a["body"] != b["body"]]
            stale.append(f"{path.relative_to(root)}: {', '.join(names)}")
            if not check:
                with whole_file(path) as file:
                    file.write(new.encode())
    return stale


def main(arguments: list[str], root: Path = ROOT) -> str | int:
    """The command; a message is an error."""
    if arguments not in ([], ["--check"]):
        return "usage: python -m benchmarks.tables [--check]"
    try:
        stale = update(root, check=bool(arguments))
    except AppError as error:
        return f"error: {error}"
    if arguments and stale:
        listed = "\n  ".join(stale)
        return f"these tables are not what benchmarks/results/ gives; run python -m benchmarks.tables:\n  {listed}"
    print("\n".join(f"wrote {name}" for name in stale) or "all tables are in step")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
