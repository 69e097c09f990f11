"""Which formula a density follows, and how it behaves beside that."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastvae.auditing.claim import Claim
from fastvae.auditing.formulas import (
    ELEMENTS,
    NAMED,
    NEGLIGIBLE,
    RIGHT,
    Floor,
    Formula,
    Mistake,
    Value,
    evaluate,
    formulas,
)
from fastvae.auditing.observed import UNKNOWN, Observed
from fastvae.auditing.report import Finding

HUGE = 1e30  # what nan_to_num makes of an infinity is above it
LEAST_ROWS = 6  # fewer numbers than these decide nothing
TYPICAL = -1000.0  # nats: points of less density are no typical ones


@dataclass
class Density:
    """What is known of a density once it has been looked at; formula is None where it follows none that is known."""

    findings: list[Finding] = field(default_factory=list)
    untested: list[str] = field(default_factory=list)
    formula: Formula | None = None
    z: Tensor = field(default_factory=lambda: torch.empty(0))
    usable: Tensor = field(default_factory=lambda: torch.empty(0))  # [M], rows on which the formula was found
    floor: Floor | None = None
    rough: bool = False  # whether the numbers have less than float32's accuracy

    def evaluate(self, formula: Formula, claim: Claim, **how: Any) -> Value:
        """What the formula gives at z, with the floor that was found."""
        return evaluate(formula, self.z, claim, floor=self.floor, **how)


def points(claim: Claim, generator: torch.Generator) -> Tensor:
    """Points [M, D] that tell formulas apart: typical ones, some between the components, some far away.

    M differs from D and K, so that the shape of a result says what it is.
    """
    count = max(4, min(15, ELEMENTS // (4 * claim.K * claim.D)))
    while 4 * count in (claim.D, claim.K):
        count += 1
    pairs = claim.draw(2 * count, generator)
    w = claim.log_weights.exp()[:, None]
    mean = (w * claim.mu).sum(0)
    spread = ((w * (claim.logvar.exp() + (claim.mu - mean) ** 2)).sum(0)).sqrt()
    direction = torch.randn(count, claim.D, dtype=torch.float64, generator=generator)
    distance = torch.tensor([3.0, 10.0, 30.0, 100.0, 300.0], dtype=torch.float64).repeat(count)[:count, None]
    z = torch.cat(
        [
            claim.draw(count, generator),
            claim.draw(count, generator, widen=2.0),
            (pairs[:count] + pairs[count:]) / 2,
            mean + distance * spread * direction,
        ]
    )
    return claim.to_prior(z).double().cpu()  # as the prior sees them


def audit_density(observed: Observed, claim: Claim, z: Tensor) -> Density:
    """Which formula the density follows at z [M, D], and what is wrong with it.  Without gradients."""
    found = Density(z=z)
    found.findings += observed.findings
    if observed.shape == UNKNOWN:
        found.untested.append("the density: no number for each point can be had of what it returns")
        return found
    seen = observed(z)  # [M]
    unstable = _stability(observed, z, seen)
    found.findings += unstable
    right = evaluate(RIGHT, z, claim)
    found.usable = _underflow(found, observed, seen, right.value)
    if int(found.usable.sum()) < LEAST_ROWS:
        found.untested.append(
            f"the formula: log_prob is finite, or above its floor, at {int(found.usable.sum())} of {len(z)} points"
        )
        return found
    _recognise(found, observed, claim, seen, right)
    if not found.rough:
        found.findings += _dtype(observed, claim)
    if not unstable:
        found.findings += _non_finite(observed, z, right_formula=found.formula == RIGHT)
    return found


def _stability(observed: Observed, z: Tensor, seen: Tensor) -> list[Finding]:
    """Whether the same point always has the same density."""
    off = _distance(observed(z), seen)
    if off > NEGLIGIBLE:
        return [
            Finding(
                "nondeterministic",
                "the same points have another density at each call.",
                off,
                "two calls with the same z; the largest difference",
                "Call eval(): dropout, batch normalisation in training mode, or components that are drawn anew "
                "make a density of each call.",
            )
        ]
    order = torch.arange(len(z) - 1).flip(0)  # all but one, the other way round
    off = _distance(observed(z[order]), seen[order])
    if off <= NEGLIGIBLE:
        return []
    return [
        Finding(
            "depends-on-the-batch",
            "a point's density depends on the points beside it.",
            off,
            "the same points in another order, one left out; the largest difference",
            "Take maxima and sums over the components (dim=-1), not over the batch; call eval() where there is batch "
            "normalisation.",
        )
    ]


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference beyond rounding, where both are finite; inf where one alone is."""
    if bool((a.isfinite() != b.isfinite()).any()):
        return math.inf
    both = a.isfinite()
    off = (a - b).abs()[both]
    return float(torch.where(off > 1e-4 * b[both].abs(), off, 0.0).max()) if off.numel() else 0.0


def _underflow(found: Density, observed: Observed, seen: Tensor, right: Tensor) -> Tensor:
    """The rows whose number follows from a formula, bool [M]; findings where small densities are lost."""
    usable = seen.isfinite() & (seen.abs() < HUGE)
    lost = ~usable & right.isfinite()
    if bool(seen[lost].isnan().any()):
        found.findings.append(
            Finding(
                "nan",
                "log_prob is NaN at points that are finite.",
                None,
                f"{int(seen.isnan().sum())} of {len(seen)} points, the likeliest at log p = "
                f"{float(right[seen.isnan()].max()):.4g}",
                "Look for 0 / 0, inf - inf, and logarithms of negative numbers; log scales and logsumexp have none.",
            )
        )
    elif bool(lost.any()):
        signs = {f"{float(value):.4g}" for value in seen[lost]}
        worst = float(right[lost].max())
        tiny = math.log(torch.finfo(observed.dtype).tiny)
        found.findings.append(
            Finding(
                "underflow",
                f"log_prob is {' or '.join(sorted(signs))} where the density is small but not zero: an exponential is "
                "taken before the logarithm, and a density below the smallest number of the dtype becomes 0 (above "
                "the largest, inf).  The gradient there is lost as well.",
                math.inf,
                f"{int(lost.sum())} of {len(seen)} points, with log p from {worst:.4g} down; log p of the smallest "
                f"{observed.dtype} is {tiny:.4g}",
                "Stay with logarithms: torch.logsumexp of log densities.",
            )
        )
        # The last numbers before that have lost digits already.
        return usable & (seen.abs() < 0.8 * float(seen[usable].abs().max())) if bool(usable.any()) else usable
    low = usable & (right < -80)
    if int(low.sum()) >= 3:
        far = seen[low]
        level = float(far.median())
        flat = (far - level).abs() < NEGLIGIBLE
        spread = right[low][flat]
        if abs(level) > 1 and int(flat.sum()) >= 3 and float(spread.max() - spread.min()) > 10:
            found.floor = Floor(level, clamped=False)
            found.findings.append(
                Finding(
                    "floor",
                    f"log_prob stays at {level:.4g} however small the density is: a small number is added to the "
                    "density before its logarithm, or log p is clamped.  Points there have no gradient.",
                    float((spread - level).abs().median()),
                    f"{int(flat.sum())} of {len(seen)} points, with log p from {float(spread.max()):.4g} down",
                    "Leave the small number out and take torch.logsumexp of log densities.",
                )
            )
    return usable


def _recognise(found: Density, observed: Observed, claim: Claim, seen: Tensor, right: Value) -> None:
    """The formula with the fewest mistakes that gives the numbers."""
    z, usable = found.z, found.usable
    values = {formula: found.evaluate(formula, claim) for formula in (RIGHT, *formulas(1))}
    found.untested += _same_as_right(values, right, usable)

    def effect(mistake: Mistake) -> float:
        rows = usable & (right.value > TYPICAL)
        rows = rows if bool(rows.any()) else usable
        return float((values[(mistake,)].value - right.value).abs()[rows].nanmedian())

    def tell(formula: Formula, same: list[Formula]) -> None:
        also = sorted({mistake.name for other in same for mistake in other} - {mistake.name for mistake in formula})
        for mistake in formula:
            others = f"  The same numbers come of: {', '.join(also)}." if also else ""
            found.findings.append(
                Finding(mistake.name, mistake.words + others, effect(mistake), _everywhere(len(z)), mistake.remedy)
            )
        found.formula = formula

    few = usable.nonzero().squeeze(1)
    few = few[:: -(-len(few) // 4)]  # these tell most formulas apart, at a small part of the cost
    floors = [found.floor]
    if found.floor:
        floors.append(replace(found.floor, clamped=True))
    for found.floor in floors:
        for count in (0, 1, 2):
            same = [f for f in formulas(count) if _agrees_at(few, f, found, claim, seen)]
            same = [f for f in same if _explains(seen, found.evaluate(f, claim), usable, f)]
            if same:
                return tell(same[0], same[1:4])
    found.floor = floors[0]
    for formula, value in values.items():
        off = seen - value.value
        constant = float(off[usable].median())
        level = Value(torch.full_like(off, constant), 2 * value.budget)
        if not _agrees(off, level, usable):
            continue
        if abs(constant) <= NEGLIGIBLE:
            break  # rounding; a formula that differs by a constant fits as well, and must not be blamed
        tell(formula, [])
        found.findings.append(
            Finding(
                "constant",
                f"log p is {abs(constant):.4g} nats too {'high' if constant > 0 else 'low'} at every point: the "
                f"density integrates to {math.exp(min(constant, 700)):.4g}.",
                abs(constant),
                _everywhere(len(z)),
                "Normalise the weights, and look for a constant that is counted twice or not at all.",
            )
        )
        return None
    imprecise = [
        (size * (1.5 if formula else 1.0), finding, formula)
        for formula, value in values.items()
        for size, finding in _precision(found, observed, claim, seen, value, formula)
    ]
    if imprecise:
        _, finding, formula = min(imprecise, key=lambda item: item[0])
        tell(formula, [])
        found.findings.append(finding)
        found.rough = True
        return None
    found.findings.append(_unexplained(values, seen, right, usable))
    return None


def _agrees(seen: Tensor, value: Value, usable: Tensor) -> bool:
    near = (seen - value.value).abs() <= value.budget
    return bool((near & value.value.isfinite())[usable].all())


def _explains(seen: Tensor, value: Value, usable: Tensor, formula: Formula) -> bool:
    """Whether the numbers are the formula's; densities that are all 0 to rounding are nobody's."""
    nothing = NAMED["density-not-log"] in formula and float(value.value[usable].max()) < 1e-9
    return not nothing and _agrees(seen, value, usable)


def _agrees_at(rows: Tensor, formula: Formula, found: Density, claim: Claim, seen: Tensor) -> bool:
    value = evaluate(formula, found.z[rows], claim, floor=found.floor, loosely=True)
    return _agrees(seen[rows], value, torch.ones(len(rows), dtype=torch.bool))


def _same_as_right(values: dict[Formula, Value], right: Value, usable: Tensor) -> list[str]:
    """Mistakes that change nothing at these points, so that nobody could see them."""
    hidden = [
        formula[0].name
        for formula, value in values.items()
        if formula and _agrees(right.value, Value(value.value, value.budget / 2), usable)
    ]
    if not hidden:
        return []
    return [f"{', '.join(hidden)}: with these components, the mistake changes no number"]


def _everywhere(count: int) -> str:
    return f"at all {count} points; the median over the typical ones"


def _precision(
    found: Density, observed: Observed, claim: Claim, seen: Tensor, value: Value, formula: Formula
) -> list[tuple[float, Finding]]:
    """The formula in less than float32, if the numbers are off by as much as that makes them; the error with each.

    Rounding errors are others at the next point that the dtype has, where those of another formula are the same.
    """
    kinds = [
        ("cancellation", torch.float32, True, "of z^2 - 2 z mu + mu^2 in float32, whose terms cancel"),
        ("half-precision", torch.float16, False, "of float16"),
        ("half-precision", torch.bfloat16, False, "of bfloat16"),
    ]
    rows = found.usable & (value.value > TYPICAL)
    off = seen - value.value
    fitting = []
    for name, dtype, expanded, words in kinds:
        rough = found.evaluate(formula, claim, dtype=dtype, expanded=expanded).value - value.value
        both = rows & rough.isfinite()
        if int(both.sum()) < LEAST_ROWS:
            continue
        size, expected = (float(x[both].square().mean().sqrt()) for x in (off, rough))
        if not (expected > NEGLIGIBLE and expected / 30 < size <= 3 * expected):
            continue
        sign = (-1.0) ** torch.arange(found.z.numel(), dtype=torch.float64).reshape(found.z.shape)
        beside = claim.to_prior(found.z * (1 + 2 * torch.finfo(dtype).eps * sign)).double().cpu()
        noise = observed(beside) - evaluate(formula, beside, claim, floor=found.floor).value - off
        if float(noise[both].square().mean().sqrt()) > 0.3 * size:
            finding = Finding(
                name,
                f"the numbers have the accuracy {words}.",
                float(off[both].abs().median()),
                f"typical points; the largest error is {float(off[both].abs().max()):.3g} nats",
                "Compute the density in float32, from the differences z - mu (fastvae.mixture_log_prob does).",
            )
            fitting.append((size, finding))
    return fitting


def _unexplained(values: dict[Formula, Value], seen: Tensor, right: Value, usable: Tensor) -> Finding:
    off = (seen - right.value).abs()
    worst = int(torch.where(usable, off, -1.0).argmax())
    typical = usable & (right.value > TYPICAL)
    typical = typical if bool(typical.any()) else usable

    def distance(formula: Formula) -> float:
        median = float((seen - values[formula].value).abs()[typical].median())
        return math.inf if math.isnan(median) else median

    nearest = min(values, key=distance)
    hint = f"; the nearest known mistake is {nearest[0].name}, {distance(nearest):.3g} nats away" if nearest else ""
    wrong = off > right.budget
    return Finding(
        "unexplained",
        f"the numbers are not those of the claimed mixture, nor of a known wrong formula{hint}.",
        float(off[typical].median()),
        f"{int((wrong & usable).sum())} of {int(usable.sum())} points; the largest error is {float(off[worst]):.4g} "
        f"nats, at log p = {float(right.value[worst]):.4g}",
        "Check that the claimed components are those that the density uses, then compare it term by term with "
        "fastvae.reference.mixture_log_prob.",
    )


def _dtype(observed: Observed, claim: Claim) -> list[Finding]:
    """Whether the result's dtype keeps what the input's has."""
    wanted = torch.float64 if claim.dtype == torch.float64 else torch.float32
    if torch.finfo(observed.dtype).eps <= torch.finfo(wanted).eps:
        return []
    return [
        Finding(
            "dtype",
            f"log_prob returns {observed.dtype} for z in {claim.dtype}; a density of hundreds of nats keeps "
            f"{torch.finfo(observed.dtype).eps * 100:.1g} of a nat there.",
            None,
            "every call",
            f"Return {wanted}; if the prior computes in {observed.dtype} on purpose, give its components in that dtype "
            "too.",
        )
    ]


def _non_finite(observed: Observed, z: Tensor, *, right_formula: bool) -> list[Finding]:
    """What becomes of NaN and infinity.  A prior may refuse them with an error."""
    findings = []
    clean = z[:5]
    before = observed(clean)
    for value in (math.nan, math.inf):
        dirty = clean.clone()
        dirty[2, 0] = value
        try:
            after = observed(dirty)
        except (ValueError, RuntimeError):
            continue
        others = torch.arange(5) != 2
        if _distance(after[others], before[others]) > NEGLIGIBLE:
            findings.append(
                Finding(
                    "spreads-over-the-batch",
                    f"a point that is {value} changes the density of the points beside it.",
                    None,
                    f"one coordinate of one point is {value}",
                    "Take maxima and sums over the components (dim=-1), not over the batch.",
                )
            )
        elif math.isnan(value) and not bool(after[2].isnan()):
            findings.append(
                Finding(
                    "nan-hidden",
                    f"a point that is NaN has the log density {float(after[2]):.4g}, so that a broken encoder goes "
                    "unseen.",
                    None,
                    "one coordinate of one point is NaN",
                    "Let NaN through: leave out nan_to_num and comparisons that drop it.",
                )
            )
        elif math.isinf(value) and right_formula and bool(after[2].isnan()):
            findings.append(
                Finding(
                    "nan-at-infinity",
                    "a point at infinity has the log density NaN, not -inf.",
                    None,
                    "one coordinate of one point is inf",
                    "Use torch.logsumexp, in which -inf minus -inf does not arise.",
                )
            )
    return findings


def audit_gradient_in_z(found: Density, observed: Observed, claim: Claim) -> list[Finding]:
    """Whether autograd gives the score of the density's own formula."""
    if found.formula is None:
        found.untested.append("the gradient in z: the density follows no known formula")
        return []
    z = claim.to_prior(found.z[found.usable]).requires_grad_()
    remedy = "Compute log_prob from z with differentiable operations: no detach, no no_grad, no .item(), no NumPy."
    with torch.enable_grad():
        exact = z.detach().double().cpu().requires_grad_()
        value = evaluate(found.formula, exact, claim, floor=found.floor)
        (wanted,) = torch.autograd.grad(value.value.sum(), exact)
        try:
            seen = observed(z)
            (got,) = torch.autograd.grad(seen.sum(), z, allow_unused=True) if seen.requires_grad else (None,)
        except RuntimeError as error:  # without a gradient, the same points were fine
            return [
                Finding(
                    "gradient-fails",
                    f"log_prob has no gradient in z, but an error: {error}",
                    None,
                    "every call",
                    remedy,
                )
            ]
    # Where float32 may be off in the density itself, so it is in the gradient; the wrong formula has been told.
    rows = (value.budget < 10 * NEGLIGIBLE) & wanted.isfinite().all(-1) & (value.value.detach() > TYPICAL)
    if not bool(rows.any()):
        found.untested.append("the gradient in z: no point at which float32 determines it")
        return []
    if got is None or bool((got == 0).all() and (wanted[rows] != 0).any()):
        return [
            Finding(
                "gradient-detached",
                "log_prob has no gradient in z, so a KL term does not pull the encoder towards the prior.",
                None,
                "every point",
                remedy,
            )
        ]
    off = (got.double().cpu() - wanted).norm(dim=-1)
    size = wanted.norm(dim=-1)
    wrong = ((off > (0.2 if found.rough else 0.01) * (size + 1)) | off.isnan()) & rows
    if int(wrong.sum()) <= (int(rows.sum()) // 2 if found.rough else 0):
        return []
    return [
        Finding(
            "gradient-wrong",
            "the gradient of log_prob in z is not the derivative of its values.",
            None,
            f"{int(wrong.sum())} of {int(rows.sum())} points; the largest relative error is "
            f"{float((off / (size + 1e-9))[wrong].nan_to_num(math.inf).max()):.3g}",
            f"{remedy}  Responsibilities, weights or components that are detached in between leave a part of the "
            "gradient out.",
        )
    ]


def audit_gradient_of_parameters(
    found: Density, observed: Observed, claim: Claim, parameters: dict[str, Tensor]
) -> list[Finding]:
    """Whether the gradient reaches what the components are made of; claim: with the graph to these parameters."""
    if found.formula is None or not parameters:
        reason = "the density follows no known formula" if parameters else "no claimed component requires a gradient"
        found.untested.append(f"the gradient of the components: {reason}")
        return []
    z = found.z[found.usable]
    with torch.enable_grad():
        value = evaluate(found.formula, z, claim, floor=found.floor)
        rows = (value.budget < 10 * NEGLIGIBLE) & (value.value > TYPICAL)
        if not value.value.requires_grad or not bool(rows.any()):
            found.untested.append("the gradient of the components: the claimed components have no graph")
            return []
        tensors = list(parameters.values())
        wanted = torch.autograd.grad(value.value[rows].sum(), tensors, allow_unused=True)
        seen = observed(z[rows])
        got = (
            torch.autograd.grad(seen.sum(), tensors, allow_unused=True)
            if seen.requires_grad
            else (None,) * len(tensors)
        )
    missing, wrong = [], []
    for name, want, have in zip(parameters, wanted, got, strict=True):
        if want is None or not bool(want.isfinite().all()):
            continue
        size = float(want.double().norm())
        # The sum over rows cancels, down to rounding, in a parameter to which the density is invariant.
        if size <= 1e-3 * len(z):
            continue
        if have is None or not bool((have != 0).any()):
            missing.append(name)
        elif not float((have.double() - want.double()).norm()) <= (0.2 if found.rough else 0.01) * size:
            wrong.append(name)
    findings = []
    if missing:
        findings.append(
            Finding(
                "components-detached",
                "log_prob has no gradient in what its components are made of, so training does not move them.",
                None,
                f"without a gradient: {', '.join(missing)}",
                "Compute the components inside log_prob, without detach, no_grad or a cached copy.",
            )
        )
    if wrong:
        findings.append(
            Finding(
                "gradient-of-components-wrong",
                "the gradient of log_prob in what its components are made of is not the derivative of its values.",
                None,
                f"a wrong gradient: {', '.join(wrong)}",
                "Do not detach responsibilities, scales or weights in between.",
            )
        )
    return findings
