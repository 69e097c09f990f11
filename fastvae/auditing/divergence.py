"""Whether a KL term is log q - log p."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvae.auditing.claim import Claim
from fastvae.auditing.formulas import NAMED, NEGLIGIBLE, RIGHT, Formula, evaluate, formulas, log_scale
from fastvae.auditing.report import Finding
from fastvae.auditing.sampler import SCALES, is_normal
from fastvae.contracts import describe
from fastvae.reference import gaussian_kl

Kl = Callable[[Tensor, Tensor], Any]
OF_Q = ("structure", "scale", "exponent", "normaliser")
ELEMENTS = 1 << 22


def audit_kl(
    kl: Kl, claim: Claim, formula: Formula | None, false_alarm: float, generator: torch.Generator
) -> tuple[list[Finding], list[str]]:
    """Findings and what is untested; formula: the one that the density follows, None for none that is known."""
    # Posteriors near the prior's components, with scales of their own; not D of them, which [M] and [D] tell apart.
    rows = max(64, min(512, ELEMENTS // (claim.K * claim.D)))
    rows += rows == claim.D
    mu = claim.draw(rows, generator)
    logvar = 0.3 * torch.randn(rows, claim.D, dtype=torch.float64, generator=generator) + claim.logvar.mean(0) - 0.7
    mu, logvar = claim.to_prior(mu), claim.to_prior(logvar)
    result = kl(mu, logvar)
    if not isinstance(result, tuple | list) or len(result) != 2 or not all(isinstance(x, Tensor) for x in result):
        raise TypeError(f"kl(mu, logvar) must return (z, kl), two tensors, not {describe(result)}")
    z, seen = (x.detach().double().cpu() for x in result)
    if z.shape != mu.shape or (seen.shape != (rows,) and seen.shape != mu.shape):
        return [
            Finding("kl-shape", f"kl(mu, logvar) returns z {list(z.shape)} and kl {list(seen.shape)}.", None,
                    f"mu and logvar [{rows}, {claim.D}]", "Return z [M, D] and kl [M].")
        ], []  # fmt: skip
    findings = []
    if seen.shape == mu.shape:
        findings.append(
            Finding("kl-sum-over-dimensions-forgotten", "the KL term is [M, D], a number for each dimension.", None,
                    f"mu and logvar [{rows}, {claim.D}]", "Sum over the dimensions, log p before logsumexp.")
        )  # fmt: skip
        seen = seen.sum(-1)
    q = Claim(
        mu.double().cpu()[:, None],
        logvar.double().cpu()[:, None],
        torch.zeros(1, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
        claim.dtype,
        claim.device,
    )
    findings += _draws(z, q, false_alarm)
    if not bool((seen.isfinite()).all()):
        findings.append(
            Finding("kl-not-finite", "the KL term is NaN or infinite.", None,
                    f"{int((~seen.isfinite()).sum())} of {rows} posteriors near the prior's components",
                    "Stay with logarithms: torch.logsumexp of log densities.")
        )  # fmt: skip
        return findings, []
    return [*findings, *_formula(seen, z, q, claim, formula)], []


def _draws(z: Tensor, q: Claim, false_alarm: float) -> list[Finding]:
    """Whether z is a draw of q."""
    t = (z - q.mu[:, 0]) * torch.exp(-0.5 * q.logvar[:, 0])
    fine = (q.mu[:, 0].abs() * torch.finfo(q.dtype).eps * torch.exp(-0.5 * q.logvar[:, 0])).amax(0) < 0.01
    if not bool(fine.any()) or is_normal(t[:, fine], false_alarm):
        return []
    name, words, remedy = (
        "unexplained",
        "z is not drawn from N(mu, exp(logvar)).",
        "Draw mu + exp(0.5 * logvar) * noise.",
    )
    if float(t.abs().median()) < 1e-3:
        name, words = "no-noise", "z is the posterior's mean, without noise."
    for wrong in SCALES:
        other = (z - q.mu[:, 0]) * torch.exp(-log_scale(wrong, q.logvar[:, 0]))
        if bool(other.isfinite().all()) and is_normal(other[:, fine], false_alarm):
            name, words, remedy = wrong, f"z is drawn wrongly: {NAMED[wrong].words}", NAMED[wrong].remedy
            break
    where = f"{len(z)} posteriors: z is {float(t.square().mean().sqrt()):.3g} scales away from mu, and should be 1"
    return [Finding(f"kl-draws-{name}", words, None, where, remedy)]


def _formula(seen: Tensor, z: Tensor, q: Claim, claim: Claim, formula: Formula | None) -> list[Finding]:
    """Which of log q and log p is wrong in the KL term."""
    of_q = [RIGHT, *(f for f in formulas(1) if f[0].axis in OF_Q)]
    of_p = list(dict.fromkeys([RIGHT, formula or RIGHT, *formulas(1)]))
    log_q = {f: evaluate(f, z, q, drawn=True) for f in of_q}
    log_p = {RIGHT: evaluate(RIGHT, z, claim, drawn=True)}
    right = log_q[RIGHT].value - log_p[RIGHT].value
    off = float((seen - right).abs().median())
    where = f"{len(z)} posteriors near the prior's components; the median"

    def agrees(value: Tensor, p: Formula, f: Formula) -> bool:
        return bool(((seen - value).abs() <= log_p[p].budget + log_q[f].budget).all())

    if agrees(right, RIGHT, RIGHT):
        return []
    if claim.K == 1:  # a closed form may stand for the samples
        a = torch.exp(-claim.logvar)
        shifted = (q.mu[:, 0] - claim.mu) * torch.sqrt(a)
        closed = gaussian_kl(shifted, q.logvar[:, 0] - claim.logvar)
        if bool(((seen - closed).abs() <= NEGLIGIBLE + 1e-4 * closed.abs()).all()):
            return []
    for p in of_p:
        log_p[p] = evaluate(p, z, claim, drawn=True)
        for f in of_q:
            if agrees(log_q[f].value - log_p[p].value, p, f):
                if f == p:  # a constant that both sides drop cancels
                    same = float((log_q[f].value - log_p[p].value - right).abs().max())
                    if same <= NEGLIGIBLE:
                        return []
                return _named(p, f, formula, off, where)
    if agrees(-right, RIGHT, RIGHT):
        return [
            Finding("kl-negated", "the KL term has the wrong sign: log p - log q.", off, where, "Return log q - log p.")
        ]
    constant = seen - right
    value = float(constant.median())
    budget = log_p[RIGHT].budget + log_q[RIGHT].budget
    if abs(value) > 20 * NEGLIGIBLE and bool(((constant - value).abs() <= 2 * budget).all()):
        return [
            Finding("kl-constant", f"the KL term is {abs(value):.4g} nats too {'high' if value > 0 else 'low'} for "
                    "every posterior.", abs(value), where, "Look for a constant on one side alone.")
        ]  # fmt: skip
    return [
        Finding("kl-unexplained", "the KL term is not log q - log p of the claimed components, nor of a known wrong "
                "formula.", off if math.isfinite(off) else None, where,
                "Compare log q and log p one by one: fastvae.mixture_kl returns their difference.")
    ]  # fmt: skip


def _named(p: Formula, f: Formula, formula: Formula | None, off: float, where: str) -> list[Finding]:
    names = ({mistake.name for mistake in p}, {mistake.name for mistake in f})
    two_pi = [side for side, of in zip(("log p", "log q"), names, strict=True) if "log-2pi-dropped" in of]
    findings = []
    if len(two_pi) == 1:
        findings.append(
            Finding("kl-log-2pi-on-one-side", f"-D/2 log 2 pi is missing in {two_pi[0]} alone, so it does not cancel.",
                    off, where, "Keep it on both sides.")
        )  # fmt: skip
    for mistake in f:
        if mistake.name != "log-2pi-dropped":
            findings.append(
                Finding(f"kl-log-q-{mistake.name}", f"in log q: {mistake.words}", off, where, mistake.remedy)
            )
    if p != formula:  # else the density's own findings have told it
        for mistake in p:
            if mistake.name != "log-2pi-dropped":
                findings.append(
                    Finding(f"kl-log-p-{mistake.name}", f"in log p: {mistake.words}", off, where, mistake.remedy)
                )
    if not findings:
        findings.append(
            Finding("kl-log-p-wrong", "the KL term has the density's mistakes.", off, where,
                    "Put the density right; see its findings.")
        )  # fmt: skip
    return findings
