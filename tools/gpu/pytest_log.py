"""What pytest's log says of a run of tests on a GPU: how many passed, and which failed."""

from __future__ import annotations

import re
from typing import Any

_SUMMARY = re.compile(r"^=*\s?((?:\d+ [a-z]+, )*\d+ [a-z]+) in [\d.]+s", re.MULTILINE)
_FAILED = re.compile(r"^FAILED (\S+::\w+(?:\[.*?\])?)(?: - .*)?$", re.MULTILINE)


def outcomes(log: str) -> dict[str, Any] | None:
    """{"passed", "failed", "skipped", "ended_early", "failures"} of the last run in a log; None where none ended.

    Args:
        log: what `pytest -rf` printed.
    """
    summaries = _SUMMARY.findall(log)
    if not summaries:
        return None
    counts = {kind: int(count) for count, kind in (part.split() for part in summaries[-1].split(", "))}
    return {
        **{kind: counts.get(kind, 0) for kind in ("passed", "failed", "skipped")},
        "ended_early": "KeyboardInterrupt !!!" in log,
        "failures": sorted(set(_FAILED.findall(log))),
    }
