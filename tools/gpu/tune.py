"""Time every tile that autotuning offers: python -m tools.gpu.tune --out DIR [--dry-run]

What the table of `kernels/tiles.py` should be, for the GPU at hand: by the very mechanism that FASTVAE_AUTOTUNE=1
gives users, its file in DIR.  Processes side by side compile first, because that is what takes long.  A dry run does
small problems, interpreted on the CPU: that it runs is all it tells.  Writes tune.json after each call.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from fastvae._files import write_json
from fastvae.backends import triton
from fastvae.benchmarks import formatting
from fastvae.benchmarks.inputs import diffuse

from .gpu_targets import D, K, M

LARGE, FEW_ROWS, DOUBLE = (M, K, D), (256, K, D), (1024, 10_000, D)
KINDS = ("forward", "score", "parameters")
Entries = dict[str, list[dict[str, Any]]]


class Work(NamedTuple):
    """One call whose tile is to be chosen."""

    kind: str
    precision: str
    shape: tuple[int, int, int]
    shared: bool = False
    double: bool = False

    def __str__(self) -> str:
        form = "float64" if self.double else self.precision
        return f"{self.kind}, {self.shape}, {form}{', one variance' * self.shared}"

    def call(self, device: str) -> Callable[[], object]:
        """The launchers' call, on random inputs."""
        mixture = triton.load("mixture")
        data = diffuse(*self.shape)
        dtype = torch.float64 if self.double else torch.float32
        z, mu, logvar, log_weights = (t.to(device, dtype) for t in (data.z, data.mu, data.logvar, data.log_weights))
        rest = z, mu, logvar[:1].contiguous() if self.shared else logvar, log_weights, None
        if self.kind == "forward":
            return partial(mixture.mixture_log_prob, self.precision, *rest)
        if self.kind == "score":
            return partial(mixture.mixture_log_prob_and_score, self.precision, *rest)
        with patch.dict(os.environ, FASTVAE_AUTOTUNE="0"):
            log_prob = mixture.mixture_log_prob(self.precision, *rest)
        given = torch.ones_like(log_prob), log_prob, *rest, False
        return partial(mixture.mixture_log_prob_backward, self.precision, *given, False, True, True, True)


def works(dry: bool) -> Iterator[Work]:
    """Everything that is to be timed, what matters most first."""
    for kind in KINDS:
        for precision in ("highest", "high", "medium"):
            yield Work(kind, precision, (40, 70, 8) if dry else LARGE)
    for kind in KINDS:
        yield Work(kind, "highest", (40, 70, 8) if dry else DOUBLE, double=True)
    if dry:
        return
    for kind in KINDS:
        for precision in ("highest", "high", "medium"):
            yield Work(kind, precision, FEW_ROWS)
    for kind in KINDS:
        for precision in ("high", "medium"):  # of the difference form the kernels are the same
            yield Work(kind, precision, LARGE, shared=True)


def once(run: Callable[[], object]) -> float:
    """A clock that lets everything compile, and a dry run's: milliseconds of one call."""
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def compile_tiles(work: Work, device: str) -> None:
    """Run a call once by each tile, so that Triton's cache has them all."""
    autotune = triton.load("autotune")
    with (
        TemporaryDirectory() as folder,
        patch.dict(os.environ, FASTVAE_AUTOTUNE="1", FASTVAE_CACHE_DIR=folder, FASTVAE_TILES="1"),
        patch.object(autotune, "clock_of", lambda device: once),
    ):
        work.call(device)()


def compile_all(chosen: list[Work], device: str) -> None:
    """In as many processes as there are cores; what fails here is seen when it is timed."""
    start = time.perf_counter()
    workers = max(1, min(len(os.sched_getaffinity(0)), len(chosen), 12))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(compile_tiles, work, device) for work in chosen]
        failures = [str(future.exception()) for future in waiting if future.exception() is not None]
    print(f"compiled in {time.perf_counter() - start:.0f} s, {len(failures)} failed: {failures[:1]}", flush=True)


def tune(work: Work, device: str) -> dict[str, Any]:
    """What the file has of a call after it was made: its key, and every candidate, the fastest first."""
    tiles, tuned_tiles = triton.load("tiles"), triton.load("tuned_tiles")
    call = work.call(device)
    before = _entries(tuned_tiles.path())
    call()
    ((key, timed),) = (item for item in _entries(tuned_tiles.path()).items() if item[0] not in before)
    dtype = torch.float64 if work.double else torch.float32
    table = tiles.tile_for(
        work.kind, work.precision, work.shape[2], tiles.capability(torch.device(device)), dtype
    )._asdict()
    for entry in timed:
        entry["table"] = all(entry[name] == value for name, value in table.items())
    return {"work": str(work), "key": key, "timed": timed}


def _entries(file: Path) -> Entries:
    return json.loads(file.read_text())["tiles"] if file.exists() else {}


def markdown(found: list[dict[str, Any]]) -> str:
    """A row for each call: the fastest tile, and how much faster than the table's it is."""
    rows = []
    for one in found:
        best = one["timed"][0]
        table = next(entry["milliseconds"] for entry in one["timed"] if entry["table"])
        rows.append(
            [
                one["work"],
                f"{best['rows']} x {best['columns']}, {best['warps']} warps, {best['stages']} stages",
                formatting.duration(best["milliseconds"] / 1000),
                formatting.ratio(table / best["milliseconds"] if table else None),
                str(sum(entry["milliseconds"] is None for entry in one["timed"])),
            ]
        )
    return formatting.markdown(["call", "fastest tile", "time", "faster than the table's", "failed"], rows, left=2)


def main(arguments: list[str]) -> int:
    """0 if every call could be tuned."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--dry-run", action="store_true", help="small problems, interpreted on the CPU")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    autotune, tuned_tiles = triton.load("autotune"), triton.load("tuned_tiles")
    device = "cpu" if options.dry_run else "cuda"
    found: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    compile_all(list(works(options.dry_run))[: 2 if options.dry_run else None], device)
    clock_of = (lambda device: once) if options.dry_run else autotune.clock_of
    variables = {"FASTVAE_AUTOTUNE": "1", "FASTVAE_CACHE_DIR": str(options.out), "FASTVAE_TILES": "1"}
    with patch.dict(os.environ, variables), patch.object(autotune, "clock_of", clock_of):
        tuned_tiles.path().unlink(missing_ok=True)  # of an earlier run
        for work in works(options.dry_run):
            try:
                found.append(tune(work, device))
            except Exception as error:  # one call's failure, of whatever kind, must not cost the others
                failed[str(work)] = f"{type(error).__name__}: {error}"
                print(f"{work} failed: {failed[str(work)]}", flush=True)
            write_json(options.out / "tune.json", {"dry": options.dry_run, "calls": found, "failed": failed})
    print(markdown(found))
    print(f"{len(found)} calls tuned, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
