"""A case: one piece of work that several contenders do; each is checked, then all are timed in turn."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .memory import extra_peak
from .timing import Settings, clock_for, interleave, spread

Errors = dict[str, float]
SLOW = 1.0  # seconds; at this length a first call is no slower than a later one, so it counts as a round
VERY_SLOW = 5.0  # and here not even a second call is made to measure memory


class WrongResultError(Exception):
    """A contender does not compute what it should; the message says what was off and by how much."""


@dataclass(frozen=True)
class Contender:
    """Someone who does the work of a case.

    Attributes:
        name: its name in the record.
        run: does the work once, and is what is timed.
        verify: takes what `first` returns; gives its errors, or raises WrongResultError.
        first: does the work on something that can be verified; `run` by default.
        builds: its first call compiles something, so it is not timed.
    """

    name: str
    run: Callable[[], Any]
    verify: Callable[[Any], Errors]
    first: Callable[[], Any] | None = None
    builds: bool = False


@dataclass(frozen=True)
class Prepared:
    """A case that is ready to be measured.

    Attributes:
        contenders: who takes part.
        absent: who does not, with (status, why): "missing", something is not installed; "skipped", it can not or
            need not.
        meters: limits to probe in the same rounds.
        facts: what is known about the inputs now that they are there.
    """

    contenders: Sequence[Contender]
    absent: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    meters: Mapping[str, Callable[[], float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        facts: what it is: "suite", "work", "inputs", sizes; they make its key.
        asked: the names of those who were asked to do it.
        prepare: makes the inputs and the contenders; told the results of the cases before, by key.
    """

    facts: Mapping[str, Any]
    asked: tuple[str, ...]
    prepare: Callable[[Mapping[str, Any]], Prepared]

    @property
    def key(self) -> str:
        """What the record files it under."""
        return ", ".join(f"{value}" if name in _PLAIN else f"{name} {value}" for name, value in self.facts.items())


_PLAIN = ("suite", "work", "inputs", "series")
Watch = Callable[[str], None]


def measure(
    case: Case, settings: Settings, device: str, earlier: Mapping[str, Any], watch: Watch = lambda step: None
) -> dict[str, Any]:
    """Check, weigh and time everyone in a case.

    A contender that is wrong or that fails is in the result with its status and why, and is not timed.

    Returns:
        What the record keeps: the facts; for each contender its status, and if that is "measured" its seconds
        (median and quartiles), bytes and errors; for each meter its rate.
    """
    watch("preparing")
    gc.collect()
    prepared = case.prepare(earlier)
    results: dict[str, Any] = {name: {"status": status, "why": why} for name, (status, why) in prepared.absent.items()}
    runs, already = {}, {}
    for contender in prepared.contenders:
        watch(f"checking {contender.name}")
        try:
            result, warm = _first(contender, device)
        except WrongResultError as error:
            results[contender.name] = {"status": "wrong", "why": str(error)}
        except Exception as error:  # a peer's error, of whatever kind, must not end the run
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            results[contender.name] = {"status": "failed", "why": why}
        else:
            results[contender.name] = result
            runs[contender.name], already[contender.name] = contender.run, warm
    samples, rates = interleave(
        runs,
        clock_for(device),
        settings,
        meters=prepared.meters,
        already=already,
        watch=lambda name, count: watch(f"{name}, round {count + 1}"),
    )
    for name, values in samples.items():
        results[name]["seconds"] = spread(values)
    return {
        **case.facts,
        **prepared.facts,
        "asked": list(case.asked),
        "contenders": {name: results[name] for name in sorted(results, key=_order(case))},
        "limits": {name: spread(values) for name, values in rates.items() if values},
    }


def _order(case: Case) -> Callable[[str], int]:
    return lambda name: case.asked.index(name) if name in case.asked else len(case.asked)


def _first(contender: Contender, device: str) -> tuple[dict[str, Any], list[float]]:
    """Run a contender for the first time: what to record about it, and the samples that this gave."""
    kept: list[Any] = []

    def first() -> None:
        start = time.perf_counter()
        kept.append((contender.first or contender.run)())
        kept.append(time.perf_counter() - start)

    weight = extra_peak(first, device)
    result, seconds = kept
    kept.clear()
    errors = contender.verify(result)
    del result
    if not all(map(math.isfinite, errors.values())):
        raise WrongResultError(f"its result is not finite: {errors}")
    warm = [seconds] if seconds > SLOW and not contender.builds else []
    if seconds < VERY_SLOW or contender.builds:  # without what only a first call allocates
        weight = extra_peak(contender.run, device)
    measured = {"status": "measured", "first_call_seconds": seconds, "extra_bytes": weight, "errors": errors}
    return measured, warm


def problems(result: Mapping[str, Any]) -> list[str]:
    """What went wrong in a case: who was wrong or failed, and why."""
    return [
        f"{name} {'gives a wrong result' if entry['status'] == 'wrong' else 'fails'}: {entry['why']}"
        for name, entry in result["contenders"].items()
        if entry["status"] in ("wrong", "failed")
    ]
