"""A mixture sharded over real processes equals the unsharded one, to the error budget."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from budget import Case, Result, allowance, assert_within, diffuse_case, hard_case
from support.ranks import Ranks
from support.sharded import (
    WORLD,
    Sharding,
    kl_on,
    lose_a_rank,
    model,
    on_mesh,
    received_on,
    run_on,
    run_on_all,
    same_bits,
    score_on,
    some_gradients_on,
    together,
    told,
    train_exemplars,
    with_dtensors,
    wrong_calls_of_exemplars,
    wrong_dtensors_told,
)

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
    exchange = "ring" if rows is not None and draw(0, 2) else "gather"
    return case, Sharding(parts(K, R, rng), rows, impl, bool(draw(0, 1)), exchange)


def test_random_shardings(ranks: Ranks) -> None:
    rng = torch.Generator().manual_seed(0)
    for i in range(100):
        case, sharding = random_case(rng)
        check(ranks, case, sharding, f"number {i}")


def test_the_same_bits_every_time(ranks: Ranks) -> None:
    case = hard_case(40, 60, 5)
    for sharding in (Sharding([20, 0, 30, 10]), Sharding([20, 0, 30, 10], [9, 12, 0, 19], exchange="ring")):
        first, second = (together(case, sharding, ranks(run_on, case, sharding)) for _ in range(2))
        assert all(map(same_bits, first, second))


EXCHANGES = pytest.mark.parametrize(
    ("rows", "exchange"), [(None, "gather"), ([3, 9, 0, 5], "gather"), ([3, 9, 0, 5], "ring")],
    ids=["replicated", "sharded", "ring"],
)  # fmt: skip


@EXCHANGES
def test_gradients_in_some_arguments(ranks: Ranks, rows: list[int] | None, exchange: str) -> None:
    """No rank waits for a part of backward that the others have no need of; and a call of no rows is one, too."""
    case = hard_case(17, 20, 3)
    case = replace(case, logvar=case.logvar[0].clone())
    sharding = Sharding([9, 0, 1, 10], rows, exchange=exchange)
    whole = dict(zip(["z", "mu", "logvar", "log_weights"], run_alone(case), strict=True))
    for wanted in (["z"], ["mu"], ["logvar"], ["log_weights"], ["logvar", "z"], ["mu", "log_weights"]):
        of_ranks = ranks(some_gradients_on, case, sharding, wanted)
        for name, *grads in zip(wanted, *of_ranks, strict=True):
            if rows is None and name in ("z", "logvar"):
                assert all(same_bits(grad, grads[0]) for grad in grads)
                got = grads[0]
            else:
                got = torch.stack(grads).sum(0) if name == "logvar" else torch.cat(grads)
            scale = float(whole[name].abs().max())
            torch.testing.assert_close(got, whole[name], rtol=1e-3, atol=1e-5 * scale)
    nothing = replace(case, z=case.z[:0], grad=case.grad[:0])
    of_ranks = ranks(run_on, nothing, sharding._replace(rows=None if rows is None else [0] * 4))
    assert all(part.log_prob.shape == (0,) and not bool(part.dmu.any()) for part in of_ranks)


def test_ranks_receive_what_is_planned(ranks: Ranks) -> None:
    pytest.importorskip("tools")
    from fastvae.app.planning.cost import bytes_received, bytes_received_in_ring

    case = hard_case(17, 22, 3)
    assert max(ranks(received_on, case, Sharding([6, 6, 5, 5]))) == bytes_received(17, 3, WORLD)
    ring = Sharding([6, 6, 5, 5], [5, 4, 4, 4], exchange="ring")
    assert max(ranks(received_on, case, ring)) == bytes_received_in_ring(22, 3, WORLD)


def run_alone(case: Case) -> list[torch.Tensor]:
    """The gradients of one process."""
    leaves = [v.clone().requires_grad_() for v in (case.z, case.mu, case.logvar, case.log_weights)]
    return list(torch.autograd.grad(fastvae.mixture_log_prob(*leaves, dense_backward=True), leaves, case.grad))


@EXCHANGES
@pytest.mark.parametrize("impl", [None, "composite", "reference"])
def test_score(ranks: Ranks, impl: str | None, rows: list[int] | None, exchange: str) -> None:
    """The gradient in z of the budget's case, with an upstream gradient of one."""
    case = replace(hard_case(17, 23, 4), grad=torch.ones(17), exclude=torch.arange(17) - 1)
    want, allowed = allowance(case, dense_backward=True)
    of_ranks = ranks(score_on, case, Sharding([10, 0, 12, 1], rows, impl, exchange=exchange))
    if rows is None:
        assert all(same_bits(score, of_ranks[0][1]) for _, score in of_ranks)
        log_prob, score = of_ranks[0]
    else:
        log_prob, score = (torch.cat(values) for values in zip(*of_ranks, strict=True))
    got = want._replace(log_prob=log_prob, dz=score)
    assert_within(got, want, allowed)


@pytest.mark.parametrize("samples", [None, 3])
def test_kl(ranks: Ranks, samples: int | None) -> None:
    """All ranks draw the noise of one seed, which the first rank's generator gives."""
    case = replace(diffuse_case(8, 12, 3), log_weights=torch.randn(12), exclude=torch.arange(8))
    q_logvar, sharding = 0.1 * torch.randn(8, 3), Sharding([5, 7])
    first, second = ranks(kl_on, case, sharding, q_logvar, samples)[:2]
    seed = int(reference.draw_seed(torch.device("cpu"), torch.Generator().manual_seed(0)))
    leaves = [v.clone().requires_grad_() for v in (case.z, q_logvar, case.mu, case.logvar, case.log_weights)]
    z, kl = fastvae.mixture_kl(
        *leaves, samples, exclude=case.exclude, generator=torch.Generator().manual_seed(seed), dense_backward=True
    )
    grads = torch.autograd.grad(kl.sum(), leaves)
    for a, b in zip(first[:4], second[:4], strict=True):  # z, kl, and what reaches the posterior
        assert same_bits(a, b)
    for got, want in zip(first[:4], (z, kl, *grads[:2]), strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-5)
    for a, b, want in zip(first[4:], second[4:], grads[2:], strict=True):
        torch.testing.assert_close(torch.cat([a, b]), want, rtol=1e-5, atol=1e-5)


def test_rows_and_components_on_a_mesh(ranks: Ranks) -> None:
    """Rows that are sharded by data parallelism need the group of the components, and nothing else."""
    case = hard_case(12, 20, 4)
    log_probs, dzs, *grads = zip(*ranks(on_mesh, case), strict=True)
    rows, components = (0, 2), (0, 1)  # the ranks are numbered along the components first
    whole = [torch.cat([values[r] for r in rows]) for values in (log_probs, dzs)]
    whole += [torch.cat([values[r] for r in components]) for values in grads]
    assert_within(Result(*whole), *sharded_allowance(case, Sharding([10, 10])))


@pytest.mark.parametrize("shared", [False, True], ids=["own logvar", "shared logvar"])
@pytest.mark.parametrize(
    ("z_placements", "exchange"),
    [
        (["replicate"], "gather"),
        (["shard"], "gather"),
        (["shard"], "ring"),
        (["shard", "replicate"], "gather"),
        (["shard", "shard"], "gather"),
        (["shard", "shard"], "ring"),
        (["replicate", "shard"], "ring"),
        (["replicate", "replicate"], "gather"),
    ],
)
def test_dtensors(ranks: Ranks, z_placements: list[str], exchange: str, shared: bool) -> None:
    """On one dimension of ranks, and on a mesh of rows and components."""
    case = replace(hard_case(13, 11, 3), exclude=torch.arange(13) % 12 - 1)
    if shared:
        case = replace(case, logvar=case.logvar[3])
    of_ranks = ranks(with_dtensors, case, len(z_placements) == 2, z_placements, shared, exchange)
    _, score = fastvae.mixture_log_prob_and_score(case.z, case.mu, case.logvar, case.log_weights, exclude=case.exclude)
    parts = [6, 5] if len(z_placements) == 2 else [3, 3, 3, 2]
    for log_prob, got_score, *grads in of_ranks:
        assert_within(Result(log_prob, *grads), *sharded_allowance(case, Sharding(parts)))
        torch.testing.assert_close(got_score, score, rtol=1e-4, atol=1e-4)


def test_a_rank_without_weights_and_rows_and_components_of_nan(ranks: Ranks) -> None:
    case = hard_case(6, 12, 3)
    case.log_weights[:4] = -math.inf
    check(ranks, case, Sharding([4, 8]))
    absent = replace(case, log_weights=torch.full_like(case.log_weights, -math.inf))
    got = together(absent, Sharding([4, 0, 8]), ranks(run_on, absent, Sharding([4, 0, 8])))
    assert bool((got.log_prob == -math.inf).all())
    assert all(not bool(grad.any()) for grad in got[1:])
    case.z[2] = math.nan
    case.grad[2] = 0.0
    shardings = [Sharding([4, 0, 8]), *(Sharding([4, 0, 8], [2, 4, 0], exchange=way) for way in ("gather", "ring"))]
    for sharding in shardings:
        got = together(case, sharding, ranks(run_on, case, sharding))
        for values in (got.log_prob, got.dz.sum(1)):
            assert values.isnan().tolist() == [m == 2 for m in range(6)]
    case.mu[9, 1] = math.nan  # of the last rank, and so in the density of all rows of all ranks
    for sharding in shardings:
        got = together(case, sharding, ranks(run_on, case, sharding))
        assert bool(got.log_prob.isnan().all()) and bool(got.dz.isnan().any(1).all())


def test_the_wide_component_is_elsewhere(ranks: Ranks) -> None:
    """A narrow component that weighs 1e-12 on its rank's side may still hold much of the gradient in z."""
    case = Case(
        z=torch.tensor([[8e-3]]),
        mu=torch.zeros(2, 1),
        logvar=2 * torch.tensor([[1e3], [1e-3]]).log(),
        log_weights=torch.tensor([0.5, 0.5]).log(),
        grad=torch.ones(1),
    )
    got = check(ranks, case, Sharding([1, 1]))
    assert abs(float(got.dz)) > 1e-6


Z, MU = torch.zeros(5, 3), torch.zeros(4, 3)
CALL: dict[str, Any] = {"z": Z, "mu": MU, "logvar": torch.zeros(3)}
DISAGREEMENTS = {
    "rows": ({"z": Z[:4]}, "rank 0 made .*z \\[5, 3\\].*rank 1 made .*z \\[4, 3\\]"),
    "dimensions": ({"z": Z[:, :2], "mu": MU[:, :2], "logvar": torch.zeros(2)}, "z \\[5, 2\\]"),
    "dtype": ({"mu": MU.double()}, "in torch.float64"),
    "log_weights": ({"log_weights": torch.zeros(4)}, "with log_weights"),
    "exclude": ({"exclude": torch.zeros(5, dtype=torch.int64)}, "with exclude"),
    "gradients": ({"mu": MU.clone().requires_grad_()}, "with gradients in mu"),
    "sharded": ({"rows": "sharded"}, "rows='sharded'"),
    "values": ({"z": Z + 1}, "must give the same z"),
    "logvar": ({"logvar": torch.zeros(4, 3)}, "logvar must be \\[D\\] or \\[\\] on all ranks or on none"),
    "shape of a shared logvar": ({"logvar": torch.zeros(())}, "a logvar that all components share must be the same"),
    "values of a shared logvar": ({"logvar": torch.ones(3)}, "a logvar that all components share must be the same"),
    "wrong shape": ({"mu": MU[:, :2]}, "logvar must be broadcastable to \\[1, 2\\] to match mu, not \\[3\\]"),
    "no tensor": ({"logvar": 0.0}, "logvar must be a tensor, not float"),
    "backend": ({"impl": "cuda"}, "impl='cuda'"),
    "exchange": ({"rows": "sharded", "exchange": "ring"}, "rows='sharded', exchange='ring', dense_backward=False"),
    "no such exchange": ({"exchange": "star"}, "exchange must be 'gather' or 'ring', not 'star'"),
    "a ring of replicated rows": ({"exchange": "ring"}, "exchange='ring' is for rows='sharded'"),
    "no such rows": ({"rows": "both"}, "rows must be 'replicated' or 'sharded'"),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_are_told(ranks: Ranks, name: str) -> None:
    changed, message = DISAGREEMENTS[name]
    started = time.monotonic()
    answers = ranks(told, [("mixture_log_prob", CALL), ("mixture_log_prob", CALL | changed)])[:2]
    assert time.monotonic() - started < 50  # the group's time-out is longer
    for answer in answers:
        assert answer.startswith(("ValueError", "TypeError", "RuntimeError"))
        assert re.search(message, answer), answer


def test_wrong_dtensors_of_one_rank_are_told_on_all(ranks: Ranks) -> None:
    messages = ("mu and log_weights must be DTensors", "log_weights must be placed as mu", "group must be None")
    started = time.monotonic()
    first, second = ranks(wrong_dtensors_told, hard_case(5, 8, 3), 2)[:2]
    assert time.monotonic() - started < 50  # the group's time-out is 60
    for message, own, others in zip(messages, first, second, strict=True):
        assert message in own
        assert (
            others.startswith("ValueError: mixture_log_prob: the arguments of rank 0 are wrong") and message in others
        )


def test_other_functions_and_wrong_indices_are_told(ranks: Ranks) -> None:
    answers = ranks(told, [("mixture_log_prob", CALL), ("mixture_log_prob_and_score", CALL)])[:2]
    assert all("must make the same call" in answer for answer in answers)
    kl = {"mu": Z, "logvar": Z, "prior_mu": MU, "prior_logvar": MU}
    answers = ranks(told, [("mixture_kl", kl), ("mixture_kl", kl | {"num_samples": 2})])[:2]
    assert all("num_samples=2" in answer for answer in answers)
    answers = ranks(told, [("mixture_kl", kl), ("mixture_kl", kl | {"mu": Z + 1})])[:2]
    assert all("must give the same mu" in answer for answer in answers)
    sharded = CALL | {"rows": "sharded", "exclude": torch.zeros(5, dtype=torch.int64)}
    wrong = sharded | {"exclude": torch.full((5,), 8)}
    answers = ranks(told, [("mixture_log_prob", sharded), ("mixture_log_prob", wrong)])[:2]
    assert all("exclude must be in -1 ... 7 for K = 8" in answer for answer in answers)
    # numbers that have the same sum, and the same sum when multiplied by 1, 3, 5, 7
    calls = [CALL | {"z": Z[:4], "exclude": torch.tensor(order)} for order in ([1, 0, 2, 3], [0, 2, 1, 3])]
    answers = ranks(told, [("mixture_log_prob", call) for call in calls])[:2]
    assert all("must give the same z and exclude" in answer for answer in answers)
    nothing = CALL | {"mu": MU[:0]}
    answers = ranks(told, [("mixture_log_prob", nothing)] * 2)[:2]
    assert all("no components on any" in answer for answer in answers)


@pytest.mark.parametrize(
    ("how", "exchange"),
    [
        ("killed before forward", "gather"),
        ("silent before forward", "gather"),
        ("killed before backward", "gather"),
        ("killed in forward", "ring"),
        ("silent in backward", "ring"),
    ],
)
def test_a_rank_that_is_lost(how: str, exchange: str) -> None:
    """The others hear of it within the time-out, whether the rank has ended or only does not go on."""
    ranks = Ranks(3)
    try:
        case, others = hard_case(6, 12, 3), [0, 1]
        sharding = Sharding([4, 4, 4], [2, 2, 2] if exchange == "ring" else None, exchange=exchange)
        ranks(run_on_all, case, sharding)
        started = time.monotonic()
        ranks.start(lose_a_rank, case, sharding, how)
        answers = ranks.answers(others)
        assert time.monotonic() - started < 50  # of the group the time-out is 10 at most
        for answer in answers:
            assert re.match("RuntimeError: mixture_log_prob: rank . of 3 lost the other ranks", answer), answer
    finally:
        ranks.processes[2].kill()
        ranks.close()


def test_exemplars_in_data_parallel_training(ranks: Ranks) -> None:
    """A step by two... four processes has the gradients of one process that has all exemplars and all batches."""
    torch.manual_seed(0)
    data = torch.rand(21, 6)
    shares, batch = [6, 8, 0, 7], [[0, 20, 5], [7, 8, 9], [1, 2, 3], [10, 19, 4]]
    of_ranks = ranks(train_exemplars, data, shares, batch)
    vae = model(lambda encoder: fastvae.ExemplarPrior(encoder, data, shared_variance=True))
    losses = []
    for rank, index in enumerate(map(torch.tensor, batch)):
        torch.manual_seed(1 + rank)
        losses.append(vae(data[index], index=index).loss)
        torch.testing.assert_close(of_ranks[rank]["loss"], losses[-1].detach(), rtol=1e-5, atol=1e-5)
    torch.stack(losses).mean().backward()
    for rank, got in enumerate(of_ranks):
        for name, parameter in vae.named_parameters():
            torch.testing.assert_close(
                got[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n} {m}"
            )
        with torch.no_grad():
            torch.testing.assert_close(got["log_prob"], vae.prior.log_prob(torch.zeros(2, 3) + rank))
        assert got["samples"].shape == (100 * (rank + 1), 3)
    with torch.no_grad():
        mu, _ = vae.encoder(data)
    samples = torch.cat([got["samples"] for got in of_ranks])
    assert not torch.equal(of_ranks[0]["samples"], of_ranks[1]["samples"][:100])
    torch.testing.assert_close(samples.mean(0), mu.mean(0), rtol=0, atol=5 / math.sqrt(1000))


def test_wrong_calls_of_the_exemplar_prior_are_told_on_all_ranks(ranks: Ranks) -> None:
    messages = (
        "n must be an int, at least 0, not -1",
        "n must be an int, at least 0, not 2.5",
        r"exclude must be \[2\] to match z \[2, 3\], not \[1\]",
        r"exclude must be \[2\] to match z \[2, 3\], not \[3\]",
        "exclude must be an int64 tensor, not torch.float32",
        "exclude must be a tensor, not list",
    )
    for errors in ranks(wrong_calls_of_exemplars):
        for error, message in zip(errors, messages, strict=True):
            assert re.search(message, error), error
