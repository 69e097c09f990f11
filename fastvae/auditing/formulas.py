"""The known wrong formulas of a mixture's log density, and what each of them gives.

A formula is the right one with some mistakes, of which no two are on the same axis.  In the symbols of
`fastvae.reference`, with s_kd the standard deviation that a formula uses and t = (z - mu) / s:

    n_mkd = -1/2 t_mkd^2 - log s_kd - 1/2 log 2 pi        l_m = logsumexp_k [log w_k + sum_d n_mkd]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from fastvae._noise import LOG_2PI
from fastvae.auditing.claim import Claim


@dataclass(frozen=True)
class Mistake:
    """One known mistake: its name, the part of the formula that it concerns, what is wrong, what to do."""

    name: str
    axis: str
    words: str
    remedy: str


_SUM_FIRST = (
    "Sum the log densities over the D dimensions first, then take logsumexp over the K components: "
    "torch.logsumexp(log_weights + normal.log_prob(z[:, None]).sum(-1), -1), or fastvae.mixture_log_prob."
)
_STD = "Use exp(0.5 * logvar), the square root of the variance, as the scale of Normal."
_NORMALISER = "Each dimension has -0.5 * (logvar + log 2 pi); compare with fastvae.reference.mixture_log_prob."

MISTAKES = (
    Mistake(
        "product-of-mixtures",
        "structure",
        "the density is a product of D one-dimensional mixtures: logsumexp over the components is taken in each "
        "dimension and the results are summed.  It has K^D modes where the mixture has K.",
        _SUM_FIRST,
    ),
    Mistake(
        "mean-of-logs",
        "structure",
        "the weighted mean of the components' log densities is taken, not the log of the mean of their densities.  "
        "By Jensen's inequality that is a lower bound, far below where components lie apart.",
        "Take torch.logsumexp(log_weights + log_densities, -1).",
    ),
    Mistake(
        "sum-of-logs",
        "structure",
        "the components' log densities and log weights are summed: a product of the components, not their mixture.",
        "Take torch.logsumexp(log_weights + log_densities, -1).",
    ),
    Mistake(
        "largest-component",
        "structure",
        "the largest component stands for the sum over all components.",
        "Take torch.logsumexp, not max, over the components.",
    ),
    Mistake(
        "mean-over-dimensions",
        "structure",
        "the log densities of the D dimensions are averaged within a component, not summed.",
        _SUM_FIRST,
    ),
    Mistake(
        "variance-as-scale",
        "scale",
        "the variance is used where the standard deviation belongs (the same numbers come of a log variance that is "
        "read as a log scale): s = exp(logvar).",
        _STD,
    ),
    Mistake(
        "scale-as-variance",
        "scale",
        "the standard deviation is used where the variance belongs, so its square root is taken (the same numbers "
        "come of a log scale that is read as a log variance): s = exp(logvar / 4).",
        "Give the scale to Normal as it is, without sqrt.",
    ),
    Mistake(
        "log-variance-as-scale",
        "scale",
        "the log variance itself is used as the standard deviation: s = logvar.",
        _STD,
    ),
    Mistake(
        "inverted-variance",
        "scale",
        "the variance and its inverse, the precision, are mixed up: s = exp(-logvar / 2).",
        _STD,
    ),
    Mistake(
        "tanh-of-log-variance",
        "scale",
        "the log variance goes through tanh first: s = exp(tanh(logvar) / 2), so that no variance is above e.",
        "Use the log variance that the encoder gives, in the density and in the sampler alike.",
    ),
    Mistake("variance-ignored", "scale", "the variances are ignored: s = 1.", _STD),
    Mistake(
        "half-forgotten",
        "exponent",
        "the factor 1/2 of the square is missing: exp(-t^2) is not the normal density.",
        "Write -0.5 * t**2.",
    ),
    Mistake("sign-of-square", "exponent", "the square has the wrong sign: exp(+t^2 / 2).", "Write -0.5 * t**2."),
    Mistake(
        "student-t",
        "exponent",
        "the components are Student-t distributions with 3 degrees of freedom, not normal ones.",
        "Ask for normal components (scvi-tools: dof=None), or do not claim them.",
    ),
    Mistake(
        "log-2pi-dropped",
        "normaliser",
        "-D/2 log 2 pi is missing.  That cancels in log q - log p only if log q drops it too.",
        _NORMALISER,
    ),
    Mistake(
        "log-2pi-once", "normaliser", "-1/2 log 2 pi is there once, not for each of the D dimensions.", _NORMALISER
    ),
    Mistake(
        "log-determinant-dropped",
        "normaliser",
        "-1/2 sum_d logvar is missing: a wide component counts as much as a narrow one.",
        _NORMALISER,
    ),
    Mistake(
        "log-determinant-doubled",
        "normaliser",
        "sum_d logvar is subtracted in full, without the factor 1/2.",
        _NORMALISER,
    ),
    Mistake("sign-of-log-determinant", "normaliser", "1/2 sum_d logvar is added, not subtracted.", _NORMALISER),
    Mistake(
        "weights-missing",
        "weights",
        "the components' densities are summed without weights (equal weights: log K is missing), so the density "
        "integrates to K.",
        "Add log w_k inside logsumexp; -log K for equal weights.",
    ),
    Mistake(
        "weights-ignored",
        "weights",
        "all components count alike, 1/K, whatever their weights.",
        "Add log w_k inside logsumexp.",
    ),
    Mistake(
        "weights-as-logits",
        "weights",
        "the weights are used as logits: a softmax of probabilities is nearly equal weights.",
        "Give probabilities as probs and their logarithms as logits.",
    ),
    Mistake(
        "weights-unnormalised",
        "weights",
        "the weights are used as they are given, and do not sum to one.",
        "Normalise the weights: torch.log_softmax(log_weights, 0).",
    ),
    Mistake("negated", "output", "the sign is wrong: this is -log p, a loss.", "Return log p."),
    Mistake("density-not-log", "output", "this is the density p, not its logarithm.", "Return the logarithm."),
    Mistake("bits", "output", "this is in bits, not in nats: log p / log 2.", "Multiply by log 2."),
    Mistake("divided-by-dimensions", "output", "log p is divided by D.", "Return the sum over the D dimensions."),
)
NAMED = {mistake.name: mistake for mistake in MISTAKES}
AXES = ("structure", "scale", "exponent", "normaliser", "weights", "output")

Formula = tuple[Mistake, ...]
RIGHT: Formula = ()


def formulas(count: int) -> Iterator[Formula]:
    """All formulas with that many mistakes."""
    for formula in combinations(MISTAKES, count):
        if len({mistake.axis for mistake in formula}) == count:
            yield formula


@dataclass(frozen=True)
class Floor:
    """The least log p that a density gives: it adds a small number before the logarithm, or clamps log p.

    Attributes:
        level: what the density returns where p is 0.
        clamped: whether log p is clamped, not a number added to p.
    """

    level: float
    clamped: bool


@dataclass(frozen=True)
class Value:
    """What a formula gives, [M], and how far off float32 may be by rounding, at least NEGLIGIBLE, [M]; in float64."""

    value: Tensor
    budget: Tensor


EPS = 2.0**-23
NEGLIGIBLE = 1e-3  # nats
ELEMENTS = 1 << 22  # of an array [M, K, D] at a time


def evaluate(
    formula: Sequence[Mistake],
    z: Tensor,
    claim: Claim,
    *,
    dtype: torch.dtype = torch.float64,
    expanded: bool = False,
    floor: Floor | None = None,
    loosely: bool = False,
    drawn: bool = False,
) -> Value:
    """The formula at z [M, D].

    Args:
        formula: its mistakes.
        dtype: what it is computed in; float64 is exact for this purpose.
        expanded: with the square expanded into z^2 - 2 z mu + mu^2.
        floor: what keeps log p from falling further.
        loosely: with a budget that is no more than a guess, in half the time.
        drawn: z are draws that were rounded to the claim's dtype, perhaps after the density was computed.
    """
    step = max(1, ELEMENTS // (claim.K * claim.D))
    parts = [
        _evaluate(formula, part, claim.rows(n * step, (n + 1) * step), dtype, expanded, floor, loosely, drawn)
        for n, part in enumerate(z.split(step))
    ]
    return Value(torch.cat([part.value for part in parts]), torch.cat([part.budget for part in parts]))


def log_scale(mistake: str | None, logvar: Tensor) -> Tensor:
    """log s, as a right or wrong reading of logvar has it."""
    match mistake:
        case "variance-as-scale":
            return logvar
        case "scale-as-variance":
            return logvar / 4
        case "log-variance-as-scale":
            return logvar.log()  # NaN, which no number equals, where it cannot be
        case "inverted-variance":
            return -logvar / 2
        case "tanh-of-log-variance":
            return torch.tanh(logvar) / 2
        case "variance-ignored":
            return torch.zeros_like(logvar)
    return logvar / 2


def weights_of(mistake: str | None, claim: Claim) -> Tensor:
    """log w, [K], as a right or wrong reading of the weights has it."""
    absent = claim.log_weights == -math.inf
    match mistake:
        case "weights-missing":
            return torch.zeros_like(claim.log_weights).masked_fill(absent, -math.inf)
        case "weights-ignored":
            return torch.full_like(claim.log_weights, -math.log(claim.K))
        case "weights-as-logits":
            return torch.log_softmax(claim.log_weights.exp(), 0)
        case "weights-unnormalised":
            return claim.given_log_weights
    return claim.log_weights


def _evaluate(
    formula: Sequence[Mistake],
    z: Tensor,
    claim: Claim,
    dtype: torch.dtype,
    expanded: bool,
    floor: Floor | None,
    loosely: bool,
    drawn: bool,
) -> Value:
    chosen = {mistake.axis: mistake.name for mistake in formula}
    D = claim.D
    z, mu = z[:, None, :].to(dtype), claim.mu.to(dtype)
    log_s = log_scale(chosen.get("scale"), claim.logvar.to(dtype))  # [K, D]
    log_w = weights_of(chosen.get("weights"), claim).to(dtype)  # [K]
    inverse = torch.exp(-log_s)
    t = (z - mu) * inverse  # [M, K, D]
    square = (z * inverse) ** 2 - 2 * (z * inverse**2) * mu + (mu * inverse) ** 2 if expanded else t.square()

    two_pi = {"log-2pi-dropped": 0.0, "log-2pi-once": LOG_2PI / D}.get(chosen.get("normaliser", ""), LOG_2PI)
    factors = {"log-determinant-dropped": 0.0, "log-determinant-doubled": 2.0, "sign-of-log-determinant": -1.0}
    log_det = factors.get(chosen.get("normaliser", ""), 1.0)
    match chosen.get("exponent"):
        case "half-forgotten":
            exponent = -square
        case "sign-of-square":
            exponent = 0.5 * square
        case "student-t":
            # Gamma(2) / (Gamma(3/2) sqrt(3 pi)), beside the 1 / sqrt(2 pi) that the normaliser brings
            exponent = -2 * torch.log1p(square / 3) - math.lgamma(1.5) - 0.5 * math.log(1.5)
        case _:
            exponent = -0.5 * square
    n = exponent - log_det * log_s - 0.5 * two_pi  # [M, K, D]

    match chosen.get("structure"):
        case "product-of-mixtures":
            a = n + log_w[:, None]  # [M, K, D]
            value = torch.logsumexp(a, 1).sum(-1)
            share = torch.softmax(a.detach(), 1)
        case "mean-of-logs" | "sum-of-logs" as structure:
            present = log_w > -math.inf
            a, w = n.sum(-1)[:, present], log_w[present].exp()
            value = (w * a).sum(-1) if structure == "mean-of-logs" else (log_w[present] + a).sum(-1)
            share = (log_w.exp() if structure == "mean-of-logs" else present.double())[:, None]
        case structure:
            a = (n.mean(-1) if structure == "mean-over-dimensions" else n.sum(-1)) + log_w  # [M, K]
            value = a.amax(-1) if structure == "largest-component" else torch.logsumexp(a, -1)
            share = torch.softmax(a.detach(), -1)[..., None]
    if loosely:
        budget = 1 + 0.01 * value.abs()
    else:
        with torch.no_grad():  # each term of n with its share of the value; mu and z may be off by one rounding
            size = (z.abs() + mu.abs()) * inverse
            each = square * (2 + 2 * log_s.abs()) + t.abs() * size + EPS * size**2 + 2 * log_s.abs() + 2
            largest = log_w[log_w > -math.inf].abs().amax()
            eps = torch.finfo(claim.dtype).eps  # of the weights that were given
            budget = 8 * EPS * ((share * each).sum((1, 2)) + value.abs()) + max(8 * EPS, eps) * largest + NEGLIGIBLE
            if drawn:
                budget = budget + eps * (share * t.abs() * inverse * z.abs()).sum((1, 2))
    output = chosen.get("output")
    if floor is not None:
        level = {"negated": -floor.level, "bits": floor.level * math.log(2), "divided-by-dimensions": floor.level * D}
        least = torch.full_like(value, level.get(output or "", floor.level))
        value = torch.maximum(value, least) if floor.clamped else torch.logaddexp(value, least)
    match output:
        case "negated":
            value = -value
        case "density-not-log":
            value = value.exp()
            budget = value.detach() * torch.expm1(budget) + 1e-12
        case "bits":
            value = value / math.log(2)
            budget = budget * 2
        case "divided-by-dimensions":
            value = value / D
    return Value(value.double(), budget.double())
