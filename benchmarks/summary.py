"""What was measured, in few lines for the terminal."""

from __future__ import annotations

from . import formatting
from .cpu_targets import NOT_MEASURED, judge
from .ratios import OURS, Result, best_peer, copy_fraction, rate_fraction, seconds, times_faster
from .record import Record


def headline(result: Result) -> str:
    """A case in a line: fastvae against the best peer, and against what the machine can do."""
    ours, peer = seconds(result), best_peer(result)
    if ours is None:
        return f"{OURS} was not measured"
    text = f"{OURS} {formatting.duration(ours)}"
    if peer:
        text += f", {formatting.ratio(times_faster(result, peer))} as fast as the best peer, {peer}"
    if (fraction := rate_fraction(result)) is not None:
        text += f", {formatting.percent(fraction)} of the multiply-add rate"
    if (fraction := copy_fraction(result)) is not None:
        text += f", {formatting.percent(fraction)} of the copy bandwidth"
    return text


def targets(record: Record) -> str:
    """The targets that a record can judge, one a line."""
    lines = [
        f"{judged.verdict:>8}: {judged.target.work}: {', '.join(map(formatting.ratio, judged.measured))} against "
        f"{judged.target.against}, min {formatting.ratio(judged.target.min_ratio)}"
        for judged in judge(record.cases)
        if judged.verdict != NOT_MEASURED
    ]
    return "\n".join(lines) if lines else "No target is among what was measured."
