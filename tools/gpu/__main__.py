"""Build, test and measure on a GPU: python -m tools.gpu [--out DIR] [--only A,B] [--dry-run]

Without a GPU it stops, unless it is a dry run, in which every stage does what it can on the CPU.  The stages work in a
folder beside --out, whose name ends in -work.  After each of them --out has what is to be kept, at most eight files:
see `delivery.py`.  The folder, copied to benchmarks/results/gpu-NAME, is what the status table is made from.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import math
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastvae._files import whole_file, write_json
from fastvae.benchmarks import formatting
from fastvae.benchmarks.errors import BenchmarkError

from . import pytest_log
from .delivery import deliver
from .stage import FAILED, OVERTIME, Context, Outcome, Stage, run
from .stages import STAGES, TOTAL


def main(arguments: list[str]) -> int:
    """0 if every stage passed, 1 if one did not, 2 if it could not begin."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="the folder for everything")
    parser.add_argument("--only", default="", metavar="A,B", help="these stages alone")
    parser.add_argument(
        "--seconds", type=float, default=TOTAL, help="for all stages together; a dry run takes its time"
    )
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: every stage does what it can")
    options = parser.parse_args(arguments)
    try:
        stages = _chosen(options.only)
        if not options.dry_run and not torch.cuda.is_available():
            raise BenchmarkError("this torch sees no CUDA device; --dry-run does what can be done without one")
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 2
    out = options.out.resolve()
    context = Context(out.with_name(f"{out.name}-work"), options.dry_run)
    shutil.rmtree(context.out, ignore_errors=True)  # of an earlier run
    context.out.mkdir(parents=True)
    end = math.inf if options.dry_run else time.monotonic() + options.seconds
    machine = _machine()
    outcomes: list[Outcome] = []
    for stage in stages:
        print(f"{stage.name} ...", end=" ", flush=True)
        outcomes.append(run(stage, context, end - time.monotonic()))
        print(f"{outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
        if stage.name == "test" and (
            told := pytest_log.outcomes((context.out / "test.log").read_text(errors="replace"))
        ):
            write_json(context.out / "tests.json", {"runs": [told]})
        _write(context, machine, outcomes)
        deliver(context.out, out)
    print(_page(context, machine, outcomes))
    return 1 if any(outcome.status in (FAILED, OVERTIME) for outcome in outcomes) else 0


def _chosen(only: str) -> list[Stage]:
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in [stage.name for stage in STAGES]:
            raise BenchmarkError(f"--only {name}: the stages are {', '.join(stage.name for stage in STAGES)}")
    return [stage for stage in STAGES if not names or stage.name in names]


def _machine() -> dict[str, str]:
    """What ran: device, driver, versions, commit."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "device": "none", "triton": "none"}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["device"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors"
    for name, command in (
        ("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        ("commit", ["git", "describe", "--always", "--dirty"]),
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            found[name] = done.stdout.strip()
    return found


def _write(context: Context, machine: dict[str, str], outcomes: list[Outcome]) -> None:
    stages = [outcome.as_json() for outcome in outcomes]
    write_json(context.out / "gpu.json", {"dry": context.dry, "machine": machine, "stages": stages})
    with whole_file(context.out / "gpu.md") as file:
        file.write(_page(context, machine, outcomes).encode())


def _page(context: Context, machine: dict[str, str], outcomes: list[Outcome]) -> str:
    rows = [[o.name, o.status, f"{o.seconds:.0f} s", o.detail.replace("|", "/")[:120]] for o in outcomes]
    lines = ["# A dry run, without a GPU" if context.dry else "# A run on a GPU", ""]
    lines += [", ".join(f"{name} {value}" for name, value in machine.items()) + ".", ""]
    lines += [formatting.markdown(["stage", "", "took", "its last line"], rows, left=2), ""]
    targets = context.out / "targets.md"
    if targets.is_file():
        lines += [targets.read_text()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
