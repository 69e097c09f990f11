"""How numbers are written: ratios, fractions, times, bytes and errors, and Markdown tables of them."""

from __future__ import annotations

from collections.abc import Sequence

from .memory import MIN_BYTES

NOTHING = "-"


def ratio(value: float | None) -> str:
    """How many times: 6.2 x, 0.95 x, 17 x."""
    if value is None:
        return NOTHING
    return f"{value:.0f} x" if value >= 9.95 else f"{value:.1f} x" if value >= 1.995 else f"{value:.2f} x"


def percent(fraction: float | None) -> str:
    """A fraction of a limit: 81 %."""
    return NOTHING if fraction is None else f"{100 * fraction:.0f} %"


def duration(value: float | None) -> str:
    """Seconds with three digits, in the unit that fits: 4.52 ms."""
    if value is None:
        return NOTHING
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def size(count: int | None) -> str:
    """Bytes: 1.6 GB, 26 MB, or that it is less than can be told."""
    if count is None:
        return NOTHING
    if count < MIN_BYTES:
        return "< 1 MB"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def error(value: float | None) -> str:
    """An error with one digit: 3e-06."""
    return NOTHING if value is None else f"{value:.0e}"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; the first `left` columns are set to the left, the others to the right."""
    rule = ["---" if index < left else "---:" for index in range(len(headings))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, rule, *rows])
