"""What a case's results say: who is the best peer, how many times faster fastvae is, what fraction of a limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .mixture_cases import FLOPS

OURS = "fastvae"
Result = Mapping[str, Any]


def is_ours(name: str) -> bool:
    """Whether a contender is fastvae, or a variant or a part of it."""
    return name == OURS or name.startswith((f"{OURS}-", f"{OURS}:"))


def seconds(result: Result | None, name: str = OURS) -> float | None:
    """A contender's median, or None where it was not measured."""
    entry = result["contenders"].get(name) if result else None
    return float(entry["seconds"]["median"]) if entry and entry["status"] == "measured" else None


def best_peer(result: Result) -> str | None:
    """The fastest that is not fastvae; parts of a contender ("eager: optimiser") are none."""
    times = {
        name: time
        for name in result["contenders"]
        if not is_ours(name) and ":" not in name and (time := seconds(result, name)) is not None
    }
    return min(times, key=times.__getitem__) if times else None


def times_faster(result: Result | None, than: str | None, ours: str = OURS) -> float | None:
    """How many times faster fastvae is than another contender."""
    mine, other = seconds(result, ours), seconds(result, than) if than else None
    return other / mine if mine and other else None


def flops(result: Result) -> int:
    """Floating-point operations of a forward in the difference form."""
    return int(FLOPS * result["M"] * result["K"] * result["D"])


def minimal_bytes(result: Result) -> int:
    """Bytes of the arguments and the result of a forward, read or written once."""
    M, K, D = result["M"], result["K"], result["D"]
    return int(4 * (M * D + 2 * K * D + K + M))


def multiply_add_rate(result: Result) -> float | None:
    """The highest multiply-add rate that any probe of a case reached, flops a second."""
    limits = result["limits"].items()
    return max((float(limit["median"]) for name, limit in limits if name.startswith("multiply_add")), default=None)


def rate_fraction(result: Result, name: str = OURS, meter: str | None = None) -> float | None:
    """What fraction of the probed multiply-add rate a forward runs at: of a meter's, or of the highest."""
    limit = multiply_add_rate(result) if meter is None else result["limits"].get(meter, {}).get("median")
    time = seconds(result, name)
    if limit is None or time is None or result.get("work") != "forward":
        return None
    return flops(result) / time / float(limit)


def copy_fraction(result: Result, name: str = OURS) -> float | None:
    """What fraction of the probed copy bandwidth a contender reaches, counting only the bytes that it must move."""
    limit, time = result["limits"].get("copy"), seconds(result, name)
    if limit is None or time is None or "bytes_moved" not in result:
        return None
    return float(result["bytes_moved"]) / time / float(limit["median"])


@dataclass(frozen=True)
class Selector:
    """Finds a case in a record by what is known of it."""

    facts: Mapping[str, Any]

    def find(self, cases: Mapping[str, Result]) -> Result | None:
        """The case with all of these facts that is no point of a series, or None."""
        for result in cases.values():
            if "series" not in result and all(result.get(name) == value for name, value in self.facts.items()):
                return result
        return None


def select(**facts: Any) -> Selector:
    """A Selector by keywords."""
    return Selector(facts)
