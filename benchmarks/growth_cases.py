"""How time and memory grow: against everyone in K, and fastvae alone in M, K and D over four decades."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .case import Case
from .mixture_cases import FORWARD, mixture_case
from .peer import Peer

PATIENCE = 5.0  # seconds; a contender that would take longer for one call leaves the series
EVERYONE, ALONE, ROOFLINE = "growth in K, everyone", "growth in", "roofline"


def against_k(peers: Sequence[Peer], device: str, sizes: Sequence[int], M: int = 256, D: int = 40) -> Iterator[Case]:
    """Forward of all peers at K = sizes, in ascending order."""
    keys: list[str] = []
    for K in sizes:
        case = mixture_case(
            FORWARD,
            "diffuse",
            (M, K, D),
            peers,
            device=device,
            series=EVERYONE,
            too_slow=_too_slow(keys[-1] if keys else None, K),
        )
        keys.append(case.key)
        yield case


def alone(ours: Peer, device: str, decades: int) -> Iterator[Case]:
    """Forward of fastvae, with M, K and D in turn each over so many decades while the others stay."""
    base = {"M": 256, "K": 1000, "D": 16}
    steps = [10**e for e in range(decades + 1)]
    for name, start in (("M", 16), ("K", 100), ("D", 1)):
        for step in steps:
            sizes = base | {name: start * step}
            shape = (sizes["M"], sizes["K"], sizes["D"])
            yield mixture_case(FORWARD, "diffuse", shape, [ours], device=device, series=f"{ALONE} {name}")


def roofline(peers: Sequence[Peer], device: str, K: int, D: int, rows: Sequence[int]) -> Iterator[Case]:
    """Forward with few rows, which reading the components limits, to many, which arithmetic limits.

    K D should be more than caches hold.
    """
    for M in rows:
        yield mixture_case(FORWARD, "diffuse", (M, K, D), peers, device=device, series=ROOFLINE)


def _too_slow(before: str | None, K: int) -> Callable[[Mapping[str, Any], str], str | None]:
    def why(earlier: Mapping[str, Any], name: str) -> str | None:
        case = earlier.get(before) if before else None
        entry = case["contenders"].get(name) if case else None
        if case is None or entry is None:
            return None
        if entry["status"] == "skipped":
            return str(entry["why"])
        if entry["status"] != "measured":
            return None
        expected = entry["seconds"]["median"] * K / case["K"]
        if expected <= PATIENCE:
            return None
        return f"a call would take longer than {PATIENCE:.0f} seconds, judging by K = {case['K']}"

    return why
