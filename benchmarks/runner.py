"""Run the cases of a plan, one after the other, into a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .case import Case, measure, problems
from .record import Record
from .timing import Settings

OnStep = Callable[[int, int, str], None]
OnCase = Callable[[Case, list[str]], None]


def run_cases(
    cases: Sequence[Case],
    record: Record,
    settings: Settings,
    device: str,
    *,
    on_step: OnStep = lambda index, count, step: None,
    on_case: OnCase = lambda case, found: None,
) -> list[str]:
    """Measure every case that the record does not hold yet; the record is whole after each.

    Args:
        on_step: told (index of the case, how many there are, what is being done).
        on_case: told when a case is done, and what went wrong in it.

    Returns:
        Everything that went wrong, each with the case it went wrong in.
    """
    wrong = []
    for index, case in enumerate(cases):
        if not record.holds(case.key, case.asked):

            def watch(step: str, index: int = index, key: str = case.key) -> None:
                on_step(index, len(cases), f"{key}: {step}")

            record.add(case.key, measure(case, settings, device, record.cases, watch))
        found = problems(record.cases[case.key])
        wrong += [f"{case.key}: {problem}" for problem in found]
        on_case(case, found)
        on_step(index + 1, len(cases), "")
    return wrong
