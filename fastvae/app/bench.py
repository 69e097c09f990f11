"""The command `fastvae bench`: its options, its progress and its messages; the measuring is `fastvae.benchmarks`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastvae.app.show.interruption import interruptible
from fastvae.app.user_errors import ConfigError

if TYPE_CHECKING:
    from fastvae.benchmarks.case import Case
    from fastvae.benchmarks.record import Record
    from fastvae.benchmarks.timing import Settings

console = Console()


def bench(
    suite: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SUITE]...", help="mixture, gaussian, train-step; all of them by default."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the record and its tables.")] = Path(
        "runs/bench"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    shapes: Annotated[
        list[str] | None,
        typer.Option(metavar="M,K,D", help="A problem for the suite mixture, in place of its own; may be repeated."),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(help="diffuse, concentrated, or an .npz file with z, mu and logvar; for the suite mixture."),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="With whom to compare: names, or paths of .py files, with commas between."),
    ] = None,
    isa: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Measure these instruction sets of fastvae too: baseline, avx2, avx512, or all."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small problems and few rounds: whether it works, not how fast.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin the record in --out anew.")] = False,
) -> None:
    """Measure fastvae beside what one would use instead: time, peak memory, and error in nats.

    Everyone's result is checked first, then all run in turn. Writes DEVICE.json and DEVICE.md into --out. Ctrl-C keeps
    what was measured, and the same command goes on from there.
    """
    # Not at the top: the other commands need nothing of the benchmarks.
    from fastvae.benchmarks import page, record, suites, summary, timing

    with _mistakes_told():
        plan = suites.Plan(
            suites=tuple(suite or suites.SUITES),
            device=_device(device),
            shapes=tuple(map(_shape, shapes or ())),
            inputs=inputs,
            peers=None if peers is None else _names(peers),
            isas=() if isa is None else suites.ISAS if isa == "all" else _names(isa),
            quick=quick,
        )
        cases = plan.cases()
        settings = timing.QUICK if quick else timing.FULL
        kept = record.open_record(out / f"{plan.device}.json", plan.device, settings, overwrite=overwrite)

    def advice() -> str:
        if not kept.path.exists():
            return "Nothing was measured yet."
        folder = shlex.quote(str(out))
        return (
            f"{kept.path} keeps the {len(kept.cases)} cases measured so far; the same command goes on from there, "
            f"with --out {folder} and without --overwrite."
        )

    with _mistakes_told(), interruptible(console, advice):
        wrong = _run(cases, kept, settings, plan.device)
        written = page.write_page(kept, out)
    _say(summary.targets(kept))
    _say(f"Wrote\n  {kept.path}\n  {written}")
    if wrong:
        _say("These went wrong, and their times are not in the tables:\n  " + "\n  ".join(wrong))
        raise typer.Exit(1)


@contextmanager
def _mistakes_told() -> Iterator[None]:
    """Turn the errors of the benchmarks into those of the command line, which are told without a traceback."""
    from fastvae.benchmarks.errors import BenchmarkError

    try:
        yield
    except BenchmarkError as error:
        raise ConfigError(str(error)) from error


def _run(cases: list[Case], kept: Record, settings: Settings, device: str) -> list[str]:
    from fastvae.benchmarks import runner, summary

    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        absent: set[str] = set()

        def on_step(index: int, count: int, step: str) -> None:
            progress.update(task, completed=index, description=step)

        def on_case(case: Case, found: list[str]) -> None:
            result = kept.cases[case.key]
            _say(f"{case.key}: {summary.headline(result)}")
            for name, entry in result["contenders"].items():
                told = f"{name}: {entry.get('why')}"
                if entry["status"] == "missing" and told not in absent:
                    absent.add(told)
                    _say(f"  {told}; it is left out everywhere")
                elif entry["status"] == "skipped":
                    _say(f"  {told}; skipped")
            for problem in found:
                _say(f"  {problem}")

        return runner.run_cases(cases, kept, settings, device, on_step=on_step, on_case=on_case)


def _device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: should be cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this torch sees no CUDA device")
    return name


def _shape(text: str) -> tuple[int, int, int]:
    try:
        M, K, D = (int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--shapes {text}: should be M,K,D, like 1024,10000,40") from None
    if min(M, K, D) < 1:
        raise ConfigError(f"--shapes {text}: M, K and D should be at least 1")
    return M, K, D


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ConfigError(f"{text!r} should be names with single commas between")
    return names


def _say(text: str) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)
