"""A mixture sharded over real processes equals the unsharded one, to the error budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from budget import Case, Result, allowance, assert_within, diffuse_case, hard_case
from support.ranks import Ranks
from support.sharded import WORLD, Sharding, run_on, together

import fastvae
from fastvae import reference


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(WORLD)
    yield ranks
    ranks.close()


def sharded_allowance(case: Case, sharding: Sharding) -> tuple[Result, Result]:
    """(what float64 gives, how far from it the sharded result may be).

    The kernels leave out what is below u / K_r of a rank's share w_r, so that the parameters may miss so much of it.
    """
    want, allowed = allowance(case, dense_backward=True)
    if sharding.dense:
        return want, allowed
    exact, u = case.to(torch.float64), torch.finfo(case.z.dtype).eps / 2
    K, D = exact.mu.shape
    a = reference.component_log_prob(exact.z, exact.mu, exact.logvar, exact.log_weights)
    if case.exclude is not None:
        a = a.masked_fill(case.exclude[:, None] == torch.arange(K), -math.inf)
    r = torch.exp(a - want.log_prob[:, None]).nan_to_num(0.0)  # [M, K]
    left_out = torch.cat(
        [
            part.clamp(max=u / max(1, n))
            for part, n in zip(r.split(sharding.components, 1), sharding.components, strict=True)
        ],
        1,
    )
    present = a > -math.inf
    mu = exact.mu.expand(K, D)
    s = torch.exp(-0.5 * exact.logvar.expand(K, D))
    t = ((exact.z[:, None, :] - mu) * s).masked_fill(~present[..., None], 0.0)
    each = (exact.grad.abs()[:, None] * left_out)[..., None]
    dmu = (each * t.abs() * s).sum(0).masked_fill(~present.any(0)[:, None], 0.0)
    dlogvar = (0.5 * each * (t.square() - 1).abs()).sum(0)
    dlogvar = dlogvar.sum_to_size(exact.logvar.shape) if exact.logvar.ndim else dlogvar.sum()
    more = Result(
        torch.zeros_like(allowed.log_prob),
        torch.zeros_like(allowed.dz),
        dmu,
        dlogvar,
        each.sum((0, 2)) if case.log_weights is not None else allowed.dlog_weights,
    )
    return want, Result(*(x + y for x, y in zip(allowed, more, strict=True)))


def check(ranks: Ranks, case: Case, sharding: Sharding, what: str = "") -> Result:
    got = together(case, sharding, ranks(run_on, case, sharding))
    assert_within(got, *sharded_allowance(case, sharding), f"{what} {sharding}")
    return got


def parts(total: int, count: int, rng: torch.Generator) -> list[int]:
    """A random cut of `total` into `count` parts, of which some may be empty."""
    cuts = torch.randint(0, total + 1, (count - 1,), generator=rng).sort().values.tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def random_case(rng: torch.Generator) -> tuple[Case, Sharding]:
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    M, K, D = draw(1, 20), draw(1, 40), draw(1, 8)
    seed, dtype = draw(0, 10**6), (torch.float32, torch.float64)[draw(0, 1)]
    case = (hard_case if draw(0, 3) else diffuse_case)(M, K, D, seed, dtype)
    if draw(0, 3) == 0:
        case = replace(case, log_weights=None)
    form = draw(0, 3)
    if form < 2 and K > 1:
        case = replace(case, logvar=case.logvar[0] if form else case.logvar[:1].contiguous())
    if draw(0, 1):
        case = replace(case, exclude=torch.randint(-1, K, (M,), generator=rng))
    R = draw(1, WORLD)
    rows = parts(M, R, rng) if draw(0, 1) else None
    impl = ("cpu", "composite", "reference")[draw(0, 2)]
    if fastvae.info()["extension"] != "built" and impl == "cpu":
        impl = "composite"
    return case, Sharding(parts(K, R, rng), rows, impl, bool(draw(0, 1)))


def test_random_shardings(ranks: Ranks) -> None:
    rng = torch.Generator().manual_seed(0)
    for i in range(100):
        case, sharding = random_case(rng)
        check(ranks, case, sharding, f"number {i}")
