"""Whether draws are those of the claimed mixture, with a bound on how often a right sampler is called wrong.

For a draw z of the mixture and k drawn from its responsibilities r_k(z), the pair (k, t) with t = (z - mu_k) / s_k has
an exact law: k is categorical with the weights, t is N(0, I), and the pairs are independent.  So every test below is of
numbers whose law is known, and its false-alarm probability is bounded, not approximated: by the
Dvoretzky-Kiefer-Wolfowitz inequality (Massart 1990) for distribution functions, and by Chernoff's for frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastvae.auditing.claim import Claim
from fastvae.auditing.formulas import NAMED, log_scale, weights_of
from fastvae.auditing.report import Finding
from fastvae.contracts import describe

FAMILIES = 6  # of tests, which share the false-alarm probability
ELEMENTS = 1 << 25
SCALES = ("variance-as-scale", "scale-as-variance", "log-variance-as-scale", "inverted-variance",
          "tanh-of-log-variance", "variance-ignored")  # fmt: skip


@dataclass
class Draws:
    """Findings of a sampler, and what could not be tested."""

    findings: list[Finding] = field(default_factory=list)
    untested: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Explained:
    """Draws by the components that made them: k [N] and t [N, D] of the module's first lines.

    Attributes:
        own: [N], the responsibility for draw n of component n, counted from the first again after the last.
    """

    k: Tensor
    t: Tensor
    own: Tensor


def number_of_draws(claim: Claim) -> int:
    """As many as are soon looked at, at most 8192."""
    return max(64, min(8192, ELEMENTS // (claim.K * claim.D)))


def audit_sampler(
    sample: Callable[[int], Tensor], claim: Claim, n: int, false_alarm: float, generator: torch.Generator
) -> Draws:
    """What is wrong with n draws, with probability below false_alarm if nothing is."""
    found = Draws()
    z = sample(n)
    if not isinstance(z, Tensor) or z.shape != (n, claim.D) or not z.is_floating_point():
        told = describe(z) if not isinstance(z, Tensor) else f"{z.dtype} {list(z.shape)}"
        found.findings.append(
            Finding("samples-shape", f"sample({n}) returns {told}, not a floating tensor [n, D].", None,
                    f"n = {n}, D = {claim.D}", "Return [n, D], one row for each draw.")
        )  # fmt: skip
        return found
    eps = torch.finfo(z.dtype).eps
    again = sample(n)
    z, again = z.detach().double().cpu(), again.detach().double().cpu()
    if not bool(z.isfinite().all()):
        count = int((~z.isfinite()).any(-1).sum())
        found.findings.append(
            Finding("samples-not-finite", "draws are NaN or infinite.", None, f"{count} of {n} draws",
                    "Look for scales that overflow.")
        )  # fmt: skip
        return found
    if torch.equal(z, again):
        found.findings.append(
            Finding("repeated-draws", "two calls give the same draws.", None, f"sample({n}), twice",
                    "Draw new noise at each call: no fixed seed inside sample, no cached draws.")
        )  # fmt: skip
    alpha = false_alarm / FAMILIES
    # Where the dtype's grid is not fine beside a scale, draws are not normal, and no sampler can help it.
    coarse = (claim.mu.abs() * eps / torch.exp(0.5 * claim.logvar)).amax(0) > 0.01  # [D]
    if bool(coarse.any()):
        found.untested.append(
            f"the spread of draws in {int(coarse.sum())} dimensions whose scale the dtype cannot hold"
        )
    _look(found, z, claim, ~coarse, alpha, generator)
    return found


def _look(found: Draws, z: Tensor, claim: Claim, fine: Tensor, alpha: float, generator: torch.Generator) -> None:
    n, K = len(z), claim.K
    explained = _explain(z, claim, None, claim.log_weights, generator)
    scale = None
    if bool(fine.any()):
        if _no_noise(explained.t[:, fine]):
            found.findings.append(
                Finding("no-noise", "draws are the components' means, without noise.", None, f"all of {n} draws",
                        "Add exp(0.5 * logvar) times standard normal noise.")
            )  # fmt: skip
            claim = replace(claim, logvar=claim.logvar - 20)  # the nearest mean is the component's
            fine = torch.zeros_like(fine)
            explained = _explain(z, claim, None, claim.log_weights, generator)
        elif len(torch.unique(z, dim=0)) < n // 2:
            found.findings.append(
                Finding("repeated-draws", "one call gives the same draw many times.", None,
                        f"{len(torch.unique(z, dim=0))} different draws of {n}", "Draw noise for every row.")
            )  # fmt: skip
            return
        elif not is_normal(explained.t[:, fine], alpha):
            name, scale = _spread(z, claim, fine, alpha, generator)
            found.findings.append(_spread_finding(name, explained.t[:, fine], n))
            if scale is None:
                found.untested.append("the frequencies of components in draws, whose spread is another")
                return
            explained = _explain(z, claim, scale, claim.log_weights, generator)
    if K == 1:
        return
    w = claim.log_weights.exp()
    if _is_in_order(explained.own, w, K, alpha):
        found.findings.append(_order_finding(explained.own, w, K))
    elif not _is_independent(explained, alpha, w, fine):
        found.findings.append(
            Finding("draws-not-independent", "neighbouring draws depend on each other.", None,
                    "draws 2n and 2n + 1", "Draw every row anew; shuffle draws that are made component by component.")
        )  # fmt: skip
    elif not _frequencies_fit(explained.k, w, alpha):
        found.findings.append(_frequency_finding(z, claim, fine, scale, explained.k, alpha, generator))


def _explain(
    z: Tensor, claim: Claim, scale: str | None, log_w: Tensor, generator: torch.Generator, period: int = 0
) -> _Explained:
    """Components drawn from the responsibilities; period: after how many draws the first comes again, or K."""
    log_s = log_scale(scale, claim.logvar)  # [K, D]
    ks, ts, own = [], [], []
    step = max(1, (1 << 22) // (claim.K * claim.D))
    for first in range(0, len(z), step):
        part = z[first : first + step]
        t = (part[:, None] - claim.mu) * torch.exp(-log_s)  # [m, K, D]
        r = torch.softmax(log_w - (0.5 * t.square() + log_s).sum(-1), -1)  # [m, K]
        k = torch.multinomial(r, 1, generator=generator).squeeze(1)
        rows = torch.arange(len(part))
        ks.append(k)
        ts.append(t[rows, k])
        own.append(r[rows, (first + rows) % (period or claim.K)])
    return _Explained(torch.cat(ks), torch.cat(ts), torch.cat(own))


def _no_noise(t: Tensor) -> bool:
    return float(t.abs().median()) < 1e-3  # has a probability below 1e-70 for as few as 64 draws


def is_normal(t: Tensor, alpha: float) -> bool:
    """Whether t [N, D] may be N(0, I)."""
    return _distance_to_normal(t) <= _dkw(len(t), alpha / (t.shape[1] + 1))


def _distance_to_normal(t: Tensor) -> float:
    """The largest sup |F_N - F| of the dimensions of t [N, D], and of its squared length, for F of N(0, I)."""
    if not bool(t.isfinite().all()):
        return math.inf
    D = t.shape[1]
    length = torch.special.gammainc(torch.tensor(D / 2, dtype=torch.float64), t.square().sum(-1) / 2)
    uniform = torch.cat([torch.special.ndtr(t), length[:, None]], 1)  # [N, D + 1]
    return float(_distance_to_uniform(uniform).max())


def _distance_to_uniform(u: Tensor) -> Tensor:
    """sup |F_N - F| of each column of u [N, C], for F uniform."""
    n = len(u)
    u = u.sort(0).values
    steps = torch.arange(n + 1, dtype=torch.float64)[:, None] / n
    return torch.maximum((steps[1:] - u).amax(0), (u - steps[:-1]).amax(0))


def _dkw(n: int, alpha: float) -> float:
    """The distance that n numbers exceed with probability at most alpha: P <= 2 exp(-2 n distance^2)."""
    return math.sqrt(math.log(2 / alpha) / (2 * n))


def _chernoff(observed: Tensor, mean: Tensor, n: int) -> Tensor:
    """A bound on log P that the mean of n independent numbers in [0, 1] is as far from `mean`, on that side."""
    observed, mean = observed.clamp(0, 1), mean.clamp(0, 1)
    return -n * (torch.xlogy(observed, observed / mean) + torch.xlogy(1 - observed, (1 - observed) / (1 - mean)))


def _frequencies_fit(k: Tensor, w: Tensor, alpha: float) -> bool:
    frequency = torch.bincount(k, minlength=len(w)).double() / len(k)
    if bool((frequency[w == 0] > 0).any()):
        return False
    present = w > 0
    bound = _chernoff(frequency[present], w[present], len(k)).nan_to_num(0.0)  # w = 1
    return float(bound.min()) >= math.log(alpha / (2 * len(w)))


def _is_in_order(own: Tensor, w: Tensor, period: int, alpha: float) -> bool:
    """Whether draw n comes from component n too often: the responsibility has the mean w_n."""
    for count in {min(len(own), period), len(own)}:
        mean = w[:period].repeat(-(-count // period))[:count].mean()
        observed = own[:count].mean()
        if observed > mean and float(_chernoff(observed, mean, count)) < math.log(alpha / 2):
            return True
    return False


def _order_finding(own: Tensor, w: Tensor, period: int) -> Finding:
    count = min(len(own), period)
    return Finding(
        "first-components-in-order",
        "draw n comes from component n, then from the first again: a few draws show the first components alone, and no "
        "draw is independent of its place.",
        None,
        f"draws 0 ... {count - 1}: the mean responsibility of component n for draw n is "
        f"{float(own[:count].mean()):.3g}, and should be {float(w[:count].mean()):.3g}",
        "Draw components with torch.multinomial(weights, n, replacement=True).",
    )


def _is_independent(explained: _Explained, alpha: float, w: Tensor, fine: Tensor) -> bool:
    pairs = len(explained.k) // 2
    first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    same = (explained.k[first] == explained.k[second]).double().mean()
    frequency = torch.bincount(explained.k, minlength=len(w)).double() / len(explained.k)
    expected = torch.maximum(w.square().sum(), frequency.square().sum())  # wrong frequencies alone are no dependence
    bounds = [_chernoff(torch.maximum(same, expected), expected, pairs).nan_to_num(0.0)]
    if bool(fine.any()):
        t = explained.t[:, fine][:, 0]
        agree = ((t[first] > 0) == (t[second] > 0)).double().mean()
        bounds.append(_chernoff(agree, torch.tensor(0.5, dtype=torch.float64), pairs))
    return float(torch.stack(bounds).min()) >= math.log(alpha / 4)


def _spread(
    z: Tensor, claim: Claim, fine: Tensor, alpha: float, generator: torch.Generator
) -> tuple[str | None, str | None]:
    """The mistake that explains the draws' spread best, with the reading of the scale that it is; None for neither."""
    fitting = []
    for name in SCALES:
        if bool(log_scale(name, claim.logvar).isfinite().all()):
            # Draws with wrong frequencies still have the right spread within their components.
            t = _explain(z, claim, name, _fitted_log_weights(z, claim, name), generator).t[:, fine]
            if is_normal(t, alpha):
                fitting.append((_distance_to_normal(t), name))
    if fitting:
        name = min(fitting)[1]
        return name, name
    if claim.K > 1 and claim.D > 1 and _has_a_component_for_each_dimension(z, claim, fine, alpha, generator):
        return "component-for-each-dimension", None
    return None, None


def _fitted_log_weights(z: Tensor, claim: Claim, scale: str) -> Tensor:
    """log w, [K], with which the components, with that reading of their scales, make draws like z most likely."""
    a = _log_normals(z[:2048], claim, log_scale(scale, claim.logvar))  # [n, K]
    log_w = claim.log_weights
    for _ in range(100):  # EM
        log_w = torch.softmax(a + log_w, -1).mean(0).log()
    return log_w


def _log_normals(z: Tensor, claim: Claim, log_s: Tensor) -> Tensor:
    """log N(z; mu_k, s_k), [N, K], without its constant."""
    step = max(1, (1 << 22) // (claim.K * claim.D))
    parts = [
        -(0.5 * ((part[:, None] - claim.mu) * torch.exp(-log_s)).square() + log_s).sum(-1) for part in z.split(step)
    ]
    return torch.cat(parts)


def _has_a_component_for_each_dimension(
    z: Tensor, claim: Claim, fine: Tensor, alpha: float, generator: torch.Generator
) -> bool:
    """Whether each dimension by itself is right, and points lie as far from all components as such draws do."""
    t = [
        _explain(z[:, d, None], _dimension(claim, d), None, claim.log_weights, generator).t
        for d in fine.nonzero().squeeze(1).tolist()
    ]
    if not all(is_normal(each, alpha / claim.D) for each in t):
        return False
    mixed = torch.stack([claim.draw(1024, generator)[:, d] for d in range(claim.D)], 1)
    far, as_far = (
        _explain(x, claim, None, claim.log_weights, generator).t.square().sum(-1).median() for x in (z, mixed)
    )
    return bool((far / as_far).log().abs() < 0.1)


def _dimension(claim: Claim, d: int) -> Claim:
    return replace(claim, mu=claim.mu[:, d, None], logvar=claim.logvar[:, d, None])


def _spread_finding(name: str | None, t: Tensor, n: int) -> Finding:
    ratio = t.square().mean().sqrt()
    nats = float((0.5 * (t.square().mean(0) - 1 - t.square().mean(0).log())).sum())  # KL(N(0, ratio^2) || N(0, 1))
    where = f"{n} draws: their distance from the component's mean is {float(ratio):.3g} of its scale, and should be 1"
    if name == "component-for-each-dimension":
        words = "each dimension is drawn from a component of its own: these are draws of the product of D mixtures."
        remedy = "Draw one component for each row, and all D dimensions from it."
    elif name is not None:
        words = f"draws have a wrong spread: {NAMED[name].words}"
        remedy = NAMED[name].remedy
    else:
        words = "the spread of draws about the components' means is not that of the claimed components."
        remedy = "Check that the sampler uses the components that the density uses."
    return Finding(f"samples-{name or 'unexplained'}", words, nats, where, remedy)


def _frequency_finding(
    z: Tensor, claim: Claim, fine: Tensor, scale: str | None, k: Tensor, alpha: float, generator: torch.Generator
) -> Finding:
    w = claim.log_weights.exp()
    frequency = torch.bincount(k, minlength=claim.K).double() / len(k)
    bound = _chernoff(frequency, w, len(k)).nan_to_num(0.0)
    worst = int(torch.where((w == 0) & (frequency > 0), -torch.inf, bound).argmin())
    nats = float(torch.xlogy(frequency, frequency / w).sum())
    where = (
        f"component {worst} made {float(frequency[worst]):.3g} of {len(k)} draws; its weight is {float(w[worst]):.3g}"
    )
    for name in ("weights-ignored", "weights-as-logits"):
        wrong = weights_of(name, claim)
        if _frequencies_fit(_explain(z, claim, scale, wrong, generator).k, wrong.exp(), alpha):
            words, remedy = f"components are drawn wrongly: {NAMED[name].words}", NAMED[name].remedy
            return Finding(f"samples-{name}", words, nats, where, remedy)
    # The first b components alone, at random or one after the other, for the b by which the draws are most ahead.
    b = int((frequency - w).cumsum(0).argmax()) + 1
    first = torch.arange(claim.K) < b
    some = torch.log_softmax(claim.log_weights.masked_fill(~first, -math.inf), 0)
    explained = _explain(z, claim, scale, some, generator, period=b)
    if b > 1 and _is_in_order(explained.own, some.exp(), b, alpha):
        finding = _order_finding(explained.own, w, b)
        return replace(
            finding, words=f"{finding.words}  The first {b} of {claim.K} components are drawn, the others never."
        )
    spread_fits = not bool(fine.any()) or is_normal(explained.t[:, fine], alpha)
    if spread_fits and _frequencies_fit(explained.k, some.exp(), alpha):
        return Finding(
            "samples-first-components-only",
            f"only the first {b} of {claim.K} components are drawn.",
            nats,
            f"the others have {float(w[b:].sum()):.3g} of the weight",
            "Draw components with torch.multinomial(weights, n, replacement=True), over all K.",
        )
    return Finding(
        "samples-frequencies",
        "components are not drawn with their weights.",
        nats,
        where,
        "Draw components with torch.multinomial(weights, n, replacement=True).",
    )
