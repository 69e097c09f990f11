"""Build, test and measure on a GPU: python -m benchmarks.gpu [--out DIR] [--only A,B] [--dry-run]

Without a GPU it stops, unless it is a dry run, in which every stage does what it can on the CPU.  Everything is written
to one folder: a log for each stage, its files, and gpu.json and gpu.md with what became of each.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastvae.app.data.whole_file import whole_file, write_json
from fastvae.app.user_errors import AppError, ConfigError

from .. import words
from .stage import FAILED, OVERTIME, Context, Outcome, run
from .stages import all_stages


def main(arguments: list[str]) -> int:
    """0 if every stage passed, 1 if one did not, 2 if it could not begin."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"), help="the folder for everything")
    parser.add_argument("--only", default="", metavar="A,B", help="these stages alone")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: every stage does what it can")
    options = parser.parse_args(arguments)
    try:
        stages = _chosen(options.only)
        if not options.dry_run and not torch.cuda.is_available():
            raise ConfigError("this torch sees no CUDA device; --dry-run does what can be done without one")
    except AppError as error:
        print(error, file=sys.stderr)
        return 2
    context = Context(options.out.resolve(), options.dry_run)
    context.out.mkdir(parents=True, exist_ok=True)
    (context.out / "targets.md").unlink(missing_ok=True)  # of an earlier run
    machine = _machine()
    outcomes: list[Outcome] = []
    for stage in stages:
        print(f"{stage.name} ...", end=" ", flush=True)
        outcomes.append(run(stage, context))
        print(f"{outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
        _write(context, machine, outcomes)
    print(_page(context, machine, outcomes))
    return 1 if any(outcome.status in (FAILED, OVERTIME) for outcome in outcomes) else 0


def _chosen(only: str) -> list[Any]:
    stages = all_stages()
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in [stage.name for stage in stages]:
            raise ConfigError(f"--only {name}: the stages are {', '.join(stage.name for stage in stages)}")
    return [stage for stage in stages if not names or stage.name in names]


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
    lines += [words.markdown(["stage", "", "took", "its last line"], rows, left=2), ""]
    targets = context.out / "targets.md"
    if targets.is_file():
        lines += [targets.read_text()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
