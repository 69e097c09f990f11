"""Random calls of the public operations, each checked against the reference in float64.

What is drawn: the operation, its backend's dtype, shapes (sizes from one to a few hundred, D up to 4,096, empty
batches), every way to broadcast logvar, alike and unlike variances, weights of -inf, excluded components, strides,
which arguments want a gradient, and whether the call goes through vmap or half precision.  A seed decides the case.

    python tests/fuzz.py --backend cpu-avx512 --cases 5000 --seed 1

prints how many of each operation ran, and every failure with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from budget import Case, Result, allowance, difference, worst
from torch import Tensor

import fastvae
from fastvae import reference

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST = 2**20  # M K D of a case, which the reference holds


def check(seed: int, impl: str, largest: int = LARGEST) -> tuple[str, str | None]:
    """Draw the case of a seed, run it, compare: (which operation, what is wrong or None)."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    operation = rng.choice(OPERATIONS)
    try:
        wrong = operation(rng, impl, largest)
    except Exception as error:  # whatever a valid call raises is a failure of that seed
        wrong = f"{type(error).__name__}: {error}"
    return operation.__name__, wrong


def _sizes(rng: random.Random, largest: int) -> tuple[int, int, int]:
    D = rng.choice((1, 2, 3, 5, 8, 16, 17, 31, 33, 40, 64, 65, 129, 257, 1024, 4096))
    M = rng.choice((0, 1, 1, 2, 3, 7, 8, 9, 17, 33, 70))
    K = rng.choice((1, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 130, 300, 1025))
    while max(M, 1) * K * D > largest:
        M, K = M // 2, max(1, K // 2)
    return M, K, D


def _logvar(rng: random.Random, K: int, D: int) -> Tensor:
    """Of any shape that broadcasts to [K, D]; alike, mildly different, or sigma from 1e-3 to 1e3."""
    shape = rng.choice(((K, D), (K, D), (K, 1), (1, D), (D,), (1, 1), (1,), ()))
    kind = rng.choice(("alike", "mild", "wide"))
    if kind == "alike":
        return torch.full(shape, rng.choice((0.0, -13.8155, 5.0, -2.3, 1e-3)), dtype=torch.float64)
    return torch.randn(shape, dtype=torch.float64) * (0.5 if kind == "mild" else 4.0)


def _strided(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same numbers, perhaps laid out otherwise in memory."""
    kind = rng.choice(("contiguous", "contiguous", "transposed", "sliced"))
    if kind == "transposed" and tensor.ndim >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "sliced" and tensor.ndim >= 1:
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan)
        wide[..., 2:-1] = tensor
        return wide[..., 2:-1]
    return tensor


def _case(rng: random.Random, largest: int) -> tuple[Case, torch.dtype]:
    dtype = rng.choice(DTYPES)
    M, K, D = _sizes(rng, largest)
    logvar = _logvar(rng, K, D)
    sigma = torch.exp(0.5 * logvar).expand(K, D)
    mu = rng.choice((0.3, 1.0, 10.0)) * torch.randn(K, D, dtype=torch.float64)
    own = torch.randint(K, (M,))
    z = mu[own] + rng.choice((0.5, 1.0, 1.0, 8.0)) * sigma[own] * torch.randn(M, D, dtype=torch.float64)
    log_weights = None
    if rng.random() < 0.7:
        log_weights = torch.log_softmax(rng.choice((0.5, 3.0)) * torch.randn(K, dtype=torch.float64), 0)
        if rng.random() < 0.4:
            log_weights[torch.rand(K) < rng.choice((0.2, 1.0))] = -math.inf
    exclude = torch.randint(-1, K, (M,)) if rng.random() < 0.3 else None
    grad = torch.randn(M, dtype=torch.float64)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    # what a half precision call computes with are its inputs, cast; the budget speaks of these
    largest_half = 6e4  # float16 has no larger one
    z, mu = z.clamp(-largest_half, largest_half), mu.clamp(-largest_half, largest_half)
    case = Case(z, mu, logvar, log_weights, grad, exclude).to(dtype).to(compute)
    return replace(case, grad=grad.to(compute)), dtype


def mixture_log_prob(rng: random.Random, impl: str, largest: int) -> str | None:
    """Values and the gradients that are asked for, within the error budget; halves to one rounding more."""
    case, dtype = _case(rng, largest)
    dense = rng.random() < 0.3
    want, allowed = allowance(case, dense)
    names = ("z", "mu", "logvar", "log_weights")
    wanted = [n for n in names if getattr(case, n) is not None and rng.random() < 0.7] if rng.random() < 0.8 else []
    leaves = {
        n: None if getattr(case, n) is None else _strided(rng, getattr(case, n).to(dtype)).detach() for n in names
    }
    for n in wanted:
        leaves[n] = leaves[n].requires_grad_()
    score = None
    if rng.random() < 0.3:
        log_prob, score = fastvae.mixture_log_prob_and_score(
            **leaves, exclude=case.exclude, dense_backward=dense, impl=impl
        )
    else:
        log_prob = fastvae.mixture_log_prob(**leaves, exclude=case.exclude, dense_backward=dense, impl=impl)
    grads = (
        dict(zip(wanted, torch.autograd.grad(log_prob, [leaves[n] for n in wanted], case.grad), strict=True))
        if (wanted)
        else {}
    )
    underflow = torch.finfo(case.z.dtype).tiny
    # what a row's gradient may leave out, and its score: a rounding of what its widest component alone could give
    widest = torch.exp(-0.5 * case.logvar.double()).expand(case.mu.shape).amin(0).max()  # 1 / sigma
    left_out = torch.finfo(case.z.dtype).eps / 2 * widest
    if not dense:
        allowed = allowed._replace(dz=allowed.dz + left_out * case.grad.abs()[:, None])
    got, limits = [log_prob.detach()], [allowed.log_prob]
    for n, w, limit in zip(names, want[1:], allowed[1:], strict=True):
        limits.append(limit + _rounding(w, dtype) + underflow)
        own = grads.get(n, w).detach()
        got.append(torch.where(limits[-1] == math.inf, w, own.to(w)))  # beyond the range of a half: anything
    ratios = worst(Result(*got), want, Result(*limits))
    bad = {n: r for n, r in ratios.items() if not r <= 1}
    if score is not None and not bad:
        ones = replace(case, grad=torch.ones_like(case.grad))
        exact, limit = allowance(ones, dense_backward=True)
        off = difference(score, exact.dz)
        if bool((off > limit.dz + left_out + underflow).any()):
            bad["score"] = float((off / (limit.dz + left_out + underflow)).max())
    shapes = {n: None if v is None else list(v.shape) for n, v in leaves.items()}
    return f"{dtype} {shapes} dense={dense} wanted={wanted} error / allowed: {bad}" if bad else None


def _rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding a gradient to a half precision may change it by; a number beyond its range may be anything."""
    if dtype not in (torch.bfloat16, torch.float16):
        return torch.zeros_like(exact)
    about, u = torch.finfo(dtype), torch.finfo(dtype).eps / 2
    return torch.where(exact.abs() > about.max, math.inf, u * (exact.abs() + about.smallest_normal))


def _posterior(rng: random.Random) -> tuple[Tensor, Tensor, torch.dtype]:
    dtype = rng.choice(DTYPES)
    lead = rng.choice(((), (1,), (5,), (2, 3), (0,), (33,), (257,)))
    D = rng.choice((1, 2, 3, 5, 16, 31, 40, 129, 1024, 4096))
    logvar = torch.randn(rng.choice(((*lead, D), (*lead, 1), (D,), ())), dtype=torch.float64)
    if rng.random() < 0.4:
        logvar = torch.full_like(logvar, rng.choice((0.0, -13.8155, 3.0)))
    return torch.randn(*lead, D, dtype=torch.float64).to(dtype), logvar.to(dtype), dtype


def _close(name: str, got: Tensor, want: Tensor, terms: Tensor, u: float, slack: float = 0.0) -> str | None:
    """Whether got is within some roundings of want, the sum of `terms` in magnitude."""
    if got.shape != want.shape:
        return f"{name} is {list(got.shape)}, should be {list(want.shape)}"
    limit = u * (8 * terms + want.abs()) + slack
    bad = difference(got, want) > limit
    return f"{name} off by {float(difference(got, want).max()):.3g}" if bool(bad.any()) else None


def gaussian_kl(rng: random.Random, impl: str, largest: int) -> str | None:
    mu, logvar, dtype = _posterior(rng)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [_strided(rng, t).detach().requires_grad_() for t in (mu, logvar)]
    exact = [t.double().detach().requires_grad_() for t in (mu, logvar)]
    got, want = fastvae.gaussian_kl(*leaves, impl=impl), fastvae.gaussian_kl(*exact, impl="reference")
    grad = torch.randn(want.shape, dtype=torch.float64).to(compute)
    wide = mu.double().square() + torch.expm1(logvar.double()).abs() + logvar.double().abs()
    u = torch.finfo(compute).eps / 2
    sizes = wide.sum(-1) * math.sqrt(mu.shape[-1])
    if (wrong := _close("kl", got.detach(), want.detach(), sizes, u)) is not None:
        return f"{dtype} {list(mu.shape)} {list(logvar.shape)}: {wrong}"
    pairs = zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, exact, grad.double()), strict=True)
    for name, (g, w) in zip(("dmu", "dlogvar"), pairs, strict=True):
        each = (grad.double().abs()[..., None] * (mu.double().abs() + torch.expm1(logvar.double()).abs())).sum_to_size(
            w.shape
        )
        limit = u * 8 * each * math.sqrt(max(1, mu.numel())) + _rounding(w, dtype)
        if g.shape != w.shape or bool((difference(g, w) > limit).any()):
            return f"{dtype} {list(mu.shape)} {list(logvar.shape)}: {name} off by {float(difference(g, w).max()):.3g}"
    return None


def gaussian_rsample(rng: random.Random, impl: str, largest: int) -> str | None:
    """The samples of the reference from the same seed, and log q of these samples."""
    mu, logvar, dtype = _posterior(rng)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    S = rng.choice((None, 1, 2, 5))
    seed = rng.randrange(2**31)
    torch.manual_seed(seed)
    z, log_q = fastvae.gaussian_rsample(_strided(rng, mu), _strided(rng, logvar), S, impl=impl)
    torch.manual_seed(seed)
    want, want_q = reference.gaussian_rsample(mu.double(), logvar.double().expand(mu.shape), S)
    if z.dtype != dtype or log_q.dtype != compute or z.shape != want.shape or log_q.shape != want_q.shape:
        return f"{dtype}: z is {z.dtype} {list(z.shape)}, log_q {log_q.dtype} {list(log_q.shape)}"
    u, sigma = torch.finfo(compute).eps / 2, torch.exp(0.5 * logvar.double())
    eps = (want - mu.double()) / sigma
    half = torch.finfo(dtype).eps / 2
    limit = 1e-6 * sigma + (u * 4 + half) * (sigma * eps.abs() + want.abs() + torch.finfo(dtype).smallest_normal)
    if bool((difference(z, want) > limit).any()):
        return f"{dtype} {list(mu.shape)} S={S}: z off by {float(difference(z, want).max()):.3g}"
    size = (eps.square() + logvar.double().abs() + 2).sum(-1)
    limit = 1e-6 * eps.abs().sum(-1) + u * size * (4 + math.sqrt(3 * mu.shape[-1]))
    if bool((difference(log_q, want_q) > limit).any()):
        return f"{dtype} {list(mu.shape)} S={S}: log_q off by {float(difference(log_q, want_q).max()):.3g}"
    return None


def mixture_kl(rng: random.Random, impl: str, largest: int) -> str | None:
    """kl is log q - log p of the samples that it hands out, by the operations it is made of."""
    case, dtype = _case(rng, largest)
    if dtype in (torch.bfloat16, torch.float16):  # z is rounded there, after its density was taken
        dtype = torch.float32
    mu, logvar = case.z, 0.3 * torch.randn_like(case.z)
    S, seed = rng.choice((None, 1, 3)), rng.randrange(2**31)
    prior = case.mu, case.logvar, case.log_weights
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (mu, logvar, *prior)]
    twins = [None if t is None else t.detach().clone().requires_grad_() for t in (mu, logvar, *prior)]
    torch.manual_seed(seed)
    z, kl = fastvae.mixture_kl(*leaves, S, exclude=case.exclude, impl=impl)
    torch.manual_seed(seed)
    z2, log_q = fastvae.gaussian_rsample(*twins[:2], S, impl=impl)
    own = None if case.exclude is None else case.exclude.expand(z2.shape[:-1])
    kl2 = log_q - fastvae.mixture_log_prob(z2, *twins[2:], exclude=own, impl=impl)
    if not torch.equal(z, z2) and not torch.allclose(z, z2, rtol=1e-6, atol=1e-6):
        return "z is not that of gaussian_rsample"
    scale = float((log_q.abs() + kl2.abs()).detach().nan_to_num(0, 0, 0).max()) if kl.numel() else 1.0
    if not torch.allclose(kl, kl2, rtol=1e-5, atol=1e-6 * scale):
        return f"kl differs from its parts by {float(difference(kl, kl2.double()).max()):.3g}"
    finite = torch.isfinite(kl2)
    got = torch.autograd.grad(kl[finite].sum(), [t for t in leaves if t is not None])
    want = torch.autograd.grad(kl2[finite].sum(), [t for t in twins if t is not None])
    for g, w in zip(got, want, strict=True):
        largest_gradient = float(w.abs().max()) if w.numel() else 1.0
        if g.shape != w.shape or not torch.allclose(g, w, rtol=1e-4, atol=1e-5 * largest_gradient):
            return f"a gradient differs from its parts by {float((g - w).abs().max()):.3g}"
    return None


def grouped_mixture_log_prob(rng: random.Random, impl: str, largest: int) -> str | None:
    """Each group's column is the mixture of its components."""
    case, _ = _case(rng, largest)
    K, G = case.mu.shape[0], rng.randint(1, 5)
    groups = torch.randint(G, (K,))
    got = fastvae.grouped_mixture_log_prob(
        case.z, case.mu, case.logvar, groups, case.log_weights, num_groups=G, impl=impl
    )
    logvar = case.logvar.expand(case.mu.shape)
    for g in range(G):
        k = groups == g
        if not bool(k.any()):
            if not bool((got[..., g] == -math.inf).all()):
                return f"group {g} has no components and a density"
            continue
        weights = None if case.log_weights is None else case.log_weights[k]
        part = Case(case.z, case.mu[k], logvar[k], weights, case.grad)
        want, allowed = allowance(part)
        ratio = worst(Result(got[..., g], *want[1:]), want, allowed)["log_prob"]
        if not ratio <= 1:
            return f"group {g}: error / allowed {ratio}"
    return None


def mixture_marginal_log_prob(rng: random.Random, impl: str, largest: int) -> str | None:
    """Each dimension's column is a mixture of that dimension alone."""
    case, _ = _case(rng, largest // 4)
    got = fastvae.mixture_marginal_log_prob(
        case.z, case.mu, case.logvar, case.log_weights, exclude=case.exclude, impl=impl
    )
    logvar = case.logvar.expand(case.mu.shape)
    D = case.mu.shape[1]
    for d in rng.sample(range(D), min(D, 3)):
        part = Case(case.z[..., d, None], case.mu[:, d, None], logvar[:, d, None], case.log_weights, case.grad)
        part = replace(part, exclude=case.exclude)
        want, allowed = allowance(part)
        ratio = worst(Result(got[..., d], *want[1:]), want, allowed)["log_prob"]
        if not ratio <= 1:
            return f"dimension {d}: error / allowed {ratio}"
    return None


def vmapped(rng: random.Random, impl: str, largest: int) -> str | None:
    """vmap over z's batch is the loop."""
    case, _ = _case(rng, largest // 4)
    z = torch.stack([case.z, case.z.flip(0), 2 * case.z])
    f = lambda one: fastvae.mixture_log_prob(one, case.mu, case.logvar, case.log_weights, impl=impl)  # noqa: E731
    got, want = torch.vmap(f)(z), torch.stack([f(one) for one in z])
    scale = 1e-5 if z.dtype == torch.float32 else 1e-12
    if not torch.allclose(got, want, rtol=scale, atol=scale):
        return f"vmap differs from the loop by {float(difference(got, want.double()).max()):.3g}"
    return None


OPERATIONS: tuple[Callable[[random.Random, str, int], str | None], ...] = (
    mixture_log_prob,
    mixture_log_prob,
    mixture_log_prob,
    gaussian_kl,
    gaussian_rsample,
    mixture_kl,
    grouped_mixture_log_prob,
    mixture_marginal_log_prob,
    vmapped,
)


def main() -> None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    import pytest
    from support.backend import BACKENDS, use_backend

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--largest", type=int, default=LARGEST, help="M K D of a case at most")
    given = parser.parse_args()
    ran: Counter[str] = Counter()
    failed = 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        impl = use_backend(given.backend, monkeypatch)
        for seed in range(given.seed, given.seed + given.cases):
            name, wrong = check(seed, impl, given.largest)
            ran[name] += 1
            if wrong is not None:
                failed += 1
                print(f"seed {seed}, {name}: {wrong}", flush=True)
    print(f"{given.backend}: {given.cases} cases, {failed} failed; {dict(ran)}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
