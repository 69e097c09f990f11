"""A stage: one process, its log, how long it may take, and what became of it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, OVERTIME, LEFT_OUT = "passed", "failed", "ran out of time", "left out"
LEAST = 5.0  # seconds: in fewer no stage does anything
DRY_PATIENCE = 10  # times as long for a dry run: it interprets, on whatever machine


@dataclass(frozen=True)
class Context:
    """Where the run writes, and whether there is a GPU to run on.

    Attributes:
        out: the folder for everything, absolute.
        dry: no GPU: every stage does what it can without one.
    """

    out: Path
    dry: bool


@dataclass(frozen=True)
class Stage:
    """One step of the run.

    Attributes:
        name: what `--only`, its log and the summary call it.
        seconds: after so long it is ended; what it wrote until then counts.
        arguments: of Python, run in the checkout's root.
        variables: environment variables to set, None to unset.
        why_not: why it does not apply, or None.
    """

    name: str
    seconds: float
    arguments: Callable[[Context], Sequence[str]]
    variables: Callable[[Context], Mapping[str, str | None]] = field(default=lambda context: {})
    why_not: Callable[[Context], str | None] = field(default=lambda context: None)


@dataclass(frozen=True)
class Outcome:
    """What became of a stage; `detail` is the reason it was left out, or the last line of its log."""

    name: str
    status: str
    seconds: float
    detail: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run(stage: Stage, context: Context, seconds: float = math.inf) -> Outcome:
    """Run a stage to its end, or to the end of its time or of those seconds; never raises for what the stage does."""
    if why := stage.why_not(context):
        return Outcome(stage.name, LEFT_OUT, 0.0, why)
    if seconds < LEAST:
        return Outcome(stage.name, LEFT_OUT, 0.0, "the stages before it took all the time there was")
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    for name, value in stage.variables(context).items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value
    log = context.out / f"{stage.name}.log"
    start = time.perf_counter()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *stage.arguments(context)],
            cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=min(seconds, stage.seconds * (DRY_PATIENCE if context.dry else 1)))
            status = PASSED if code == 0 else FAILED
        except subprocess.TimeoutExpired:
            _end(process)
            status = OVERTIME
        except BaseException:
            _end(process)
            raise
    lines = log.read_text(errors="replace").strip().splitlines()
    return Outcome(stage.name, status, time.perf_counter() - start, lines[-1] if lines else "")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the stage and its children, so that what can be kept is, then end them."""
    for sign, patience in ((signal.SIGINT, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=patience)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
