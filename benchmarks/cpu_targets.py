"""What fastvae is to reach on a CPU, and whether a record shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from . import formatting
from .gaussian_cases import KL, RSAMPLE
from .memory import MIN_BYTES
from .mixture_cases import BACKWARD, BACKWARD_Z, FORWARD
from .ratios import OURS, Result, Selector, best_peer, rate_fraction, select, times_faster

MET, MISSED, REPORTED, NOT_MEASURED = "met", "missed", "reported", "not measured"
Measure = Callable[[Result], float | None]


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        work: what is done.
        against: what it is compared with.
        min_ratio: the minimal ratio (or fraction) in each of `cases`; None where it is only to be reported.
        cases: where it has to hold.
        measure: the ratio in one of them.
    """

    work: str
    against: str
    min_ratio: float | None
    cases: Sequence[Selector]
    measure: Measure


@dataclass(frozen=True)
class Judged:
    """A target and what was measured: one value a case, None where there is none."""

    target: Target
    measured: Sequence[float | None]

    @property
    def verdict(self) -> str:
        """MET, MISSED, REPORTED or NOT_MEASURED.  A miss is one even while other cases are not measured."""
        values = [value for value in self.measured if value is not None]
        bound = self.target.min_ratio
        if bound is not None and any(value < bound for value in values):
            return MISSED
        if len(values) < len(self.measured):
            return NOT_MEASURED
        return MET if bound is not None else REPORTED


def _than_best(result: Result) -> float | None:
    return times_faster(result, best_peer(result))


def _than(name: str) -> Measure:
    return lambda result: times_faster(result, name)


def _shared_time(result: Result) -> float | None:
    return times_faster(result, OURS, ours="fastvae-shared")


def _shared_memory(result: Result) -> float | None:
    weights = [result["contenders"].get(name, {}).get("extra_bytes") for name in (OURS, "fastvae-shared")]
    told = [weight for weight in weights if weight and weight >= MIN_BYTES]
    return told[0] / told[1] if len(told) == 2 else None


_BIG = ((1024, 10_000, 40), (256, 50_000, 64))


def _mixture(work: str, *shapes: tuple[int, int, int], inputs: str = "diffuse") -> list[Selector]:
    return [select(suite="mixture", work=work, inputs=inputs, M=M, K=K, D=D) for M, K, D in shapes]


def _gaussian(operation: str, work: str, M: int, D: int) -> list[Selector]:
    return [select(suite="gaussian", work=f"{operation} {work}", M=M, D=D)]


_SHARED = "diffuse, shared variance"
_NAMED = "(1024, 10000, 40) and (256, 50000, 64), diffuse"

TARGETS = (
    Target(f"forward, {_NAMED}", "best peer", 6, _mixture(FORWARD, *_BIG), _than_best),
    Target(f"forward, {_NAMED}", "KeOps", 80, _mixture(FORWARD, *_BIG), _than("keops")),
    Target(f"forward + backward, all gradients, {_NAMED}", "best peer", 3, _mixture(BACKWARD, *_BIG), _than_best),
    Target(
        "forward + backward, mnist_latents (1024, 25000, 40)",
        "best peer",
        7,
        _mixture(BACKWARD, (1024, 25_000, 40), inputs="mnist_latents"),
        _than_best,
    ),
    Target(
        "forward + backward in z alone, (1024, 10000, 40), diffuse",
        "best peer",
        4,
        _mixture(BACKWARD_Z, (1024, 10_000, 40)),
        _than_best,
    ),
    Target("forward + backward, (100, 500, 40)", "best peer", 1.5, _mixture(BACKWARD, (100, 500, 40)), _than_best),
    Target(
        "forward, D = 64 and 128",
        "the probed FMA rate (fraction)",
        0.75,
        _mixture(FORWARD, (256, 50_000, 64), (1024, 10_000, 128)),
        rate_fraction,
    ),
    Target(
        "forward, D = 2, 8 and 16",
        "best peer",
        4,
        _mixture(FORWARD, *((1024, 10_000, D) for D in (2, 8, 16))),
        _than_best,
    ),
    Target(
        "shared variance, (256, 50000, 64), forward, and forward + backward",
        "our general case (no slower, within 5 %)",
        0.95,
        [*_mixture(FORWARD, _BIG[1], inputs=_SHARED), *_mixture(BACKWARD, _BIG[1], inputs=_SHARED)],
        _shared_time,
    ),
    Target(
        "shared variance, peak memory of the forward",
        "our general case (half, within 5 %)",
        1.9,
        _mixture(FORWARD, _BIG[1], inputs=_SHARED),
        _shared_memory,
    ),
    Target(
        f"{RSAMPLE} + its backward, 16384 x 256", "eager", 5, _gaussian(RSAMPLE, BACKWARD, 16_384, 256), _than("eager")
    ),
    Target(f"{RSAMPLE}, 100 x 40", "eager", 1.5, _gaussian(RSAMPLE, FORWARD, 100, 40), _than("eager")),
    Target(f"{RSAMPLE} + its backward, 100 x 40", "eager", 1.5, _gaussian(RSAMPLE, BACKWARD, 100, 40), _than("eager")),
    Target(f"{KL} + its backward, 16384 x 256", "eager", None, _gaussian(KL, BACKWARD, 16_384, 256), _than("eager")),
    Target(
        "one VampPrior training step, K = 500 and 5000",
        "the same model, eager",
        None,
        [select(suite="train-step", K=K) for K in (500, 5000)],
        _than("eager"),
    ),
)


def judge(cases: Mapping[str, Result]) -> list[Judged]:
    """Every target with what a record's cases show."""
    judged = []
    for target in TARGETS:
        found = [selector.find(cases) for selector in target.cases]
        judged.append(Judged(target, [target.measure(result) if result else None for result in found]))
    return judged


def target_table(cases: Mapping[str, Result], alone: Mapping[str, Result] | None = None) -> str:
    """Every target, what was measured, and whether it is met; beside it what `alone` shows."""
    rows = []
    for judged, beside in zip(judge(cases), judge(alone or {}), strict=True):
        target = judged.target
        row = [target.work, target.against, _written(target, [target.min_ratio])]
        row += [_written(target, judged.measured), judged.verdict]
        rows.append(row if alone is None else [*row, _written(target, beside.measured)])
    headings = ["work", "against", "min", "measured", ""]
    return formatting.markdown(headings if alone is None else [*headings, "alone"], rows, left=2)


def _written(target: Target, values: Sequence[float | None]) -> str:
    if all(value is None for value in values):
        return formatting.NOTHING
    return ", ".join(map(formatting.percent if "fraction" in target.against else formatting.ratio, values))
