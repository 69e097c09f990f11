"""EM finds what scikit-learn's finds, never lowers the likelihood, and takes rows in any form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.backend import device_of, few_shapes
from torch import Tensor

import fastvae
from fastvae import MixtureFit, MixturePrior, fit_mixture
from fastvae.em.statistics import Moments, Parameters, e_step, m_step, moments

F64 = torch.float64


def clusters(N: int = 600, K: int = 6, D: int = 3, dtype: torch.dtype = F64, spread: float = 3.0) -> Tensor:
    """Rows from K overlapping clusters, [N, D]."""
    centres = spread * torch.randn(K, D, dtype=dtype)
    return centres[torch.randint(K, (N,))] + torch.randn(N, D, dtype=dtype)


def start(z: Tensor, K: int) -> dict[str, Tensor]:
    """K of the rows, unit variances, equal weights."""
    mu = z[:K].clone()
    return {"mu": mu, "logvar": torch.zeros_like(mu), "log_weights": torch.zeros(K, dtype=z.dtype)}


def log_likelihood(fit: MixtureFit, z: Tensor) -> float:
    """The mean over rows, in float64 and plain PyTorch."""
    parameters = (t.double() for t in (fit.mu, fit.logvar, fit.log_weights))
    return float(fastvae.reference.mixture_log_prob(z.double(), *parameters).mean())


def by_definition(z: Tensor, parameters: Parameters, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(l, N, sum of g r z, sum of g r z^2) in float64."""
    wide = Parameters(*(t.double() for t in parameters))
    a = fastvae.reference.component_log_prob(z.double(), *wide)
    l = torch.logsumexp(a, 1)  # noqa: E741
    r = g.double()[:, None] * torch.exp(a - l[:, None])
    return l, r.sum(0), r.T @ z.double(), r.T @ z.double().square()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_statistics_are_those_of_the_responsibilities(each_impl: str, dtype: torch.dtype) -> None:
    check_statistics(each_impl, dtype)
    check_statistics("reference", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.usefixtures("emulated_small")
def test_the_statistics_by_cuda(dtype: torch.dtype) -> None:
    check_statistics("cuda", dtype)


def check_statistics(impl: str, dtype: torch.dtype) -> None:
    """With unequal weights, one of them 0 for a row and one for a component."""
    N, K, D = (40, 5, 3) if few_shapes(impl) else (500, 37, 5)
    z, device = clusters(N, K, D, dtype), device_of(impl)
    log_weights = torch.log_softmax(torch.randn(K, dtype=dtype), 0)
    log_weights[1] = -math.inf
    parameters = Parameters(z[:K] + 0.1, 0.3 * torch.randn(K, D, dtype=dtype), log_weights)
    g = torch.rand(N, dtype=dtype)
    g[3] = 0
    about = Parameters(*(t.to(device) for t in parameters))
    log_prob, found = e_step(z.to(device), about, g.to(device), impl, False)
    l, N_k, sums, squares = by_definition(z, parameters, g)  # noqa: E741
    tolerance = 1e-12 if dtype == F64 else 2e-5
    assert torch.allclose(log_prob.cpu().double(), l, atol=tolerance, rtol=tolerance)
    weight, mean, variance = (t.cpu() for t in moments(found, about))
    assert torch.allclose(weight, N_k, atol=tolerance * N, rtol=0) and weight[1] == 0
    used = N_k > 0.1
    want_mean = sums / N_k[:, None]
    want_variance = squares / N_k[:, None] - want_mean.square()
    assert torch.allclose(mean[used], want_mean[used], atol=50 * tolerance, rtol=0)
    assert torch.allclose(variance[used], want_variance[used], atol=200 * tolerance, rtol=0)
    assert torch.equal(mean[1], parameters.mu[1].double())  # without rows it stays as it is


def test_statistics_do_not_cancel() -> None:
    """Rows at a distance of 10,000 with a spread of 0.01: the variance from raw moments would be off by its size."""
    z = (1e4 + 0.01 * torch.randn(4000, 2)).float()
    fit = fit_mixture(z, 1, mu=z[:1].clone(), logvar=torch.full((1, 2), -9.0), max_iter=3, tol=0, reg_covar=0)
    assert torch.allclose(fit.logvar[0].exp().double(), z.double().var(0, correction=0), rtol=1e-3)


def test_statistics_of_no_rows() -> None:
    parameters = Parameters(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))
    log_prob, found = e_step(torch.zeros(0, 3), parameters, None, "composite", False)
    assert log_prob.shape == (0,) and all(float(t.abs().sum()) == 0 for t in found)


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("impl", [None, "composite", "reference"])
def test_the_likelihood_never_falls(impl: str | None, spread: float) -> None:
    z = clusters(spread=spread)
    g = torch.rand(len(z), dtype=F64)
    fit = fit_mixture(z, 8, sample_weight=g, max_iter=60, tol=0, reg_covar=0, impl=impl)
    history = torch.tensor(fit.history)
    assert len(history) == 60 and not fit.converged
    assert float((history[1:] - history[:-1]).min()) > -1e-12
    assert history[-1] > history[0] + 0.01


@pytest.mark.usefixtures("compiled")
def test_rounding_alone_lowers_the_likelihood_in_float32() -> None:
    history = torch.tensor(fit_mixture(clusters(dtype=torch.float32), 8, max_iter=60, tol=0, reg_covar=0).history)
    assert float((history[1:] - history[:-1]).min()) > -1e-5


@pytest.mark.parametrize("impl", ["cpu", "composite"])
def test_it_agrees_with_scikit_learn(impl: str, request: pytest.FixtureRequest) -> None:
    """Means, variances, weights, likelihood of every iteration, and the iteration that ends it."""
    mixture = pytest.importorskip("sklearn.mixture")
    if impl == "cpu":
        request.getfixturevalue("compiled")
    z, K = clusters(1000, 10, 4, spread=1.5), 10
    given = start(z, K)
    for reg_covar in (1e-6, 0.1):
        theirs = mixture.GaussianMixture(
            K, covariance_type="diag", tol=1e-4, max_iter=200, reg_covar=reg_covar, means_init=z[:K].numpy(),
            precisions_init=np.ones((K, 4)), weights_init=np.full(K, 1 / K),
        ).fit(z.numpy())  # fmt: skip
        fit = fit_mixture(z, K, **given, tol=1e-4, max_iter=200, reg_covar=reg_covar, impl=impl)
        assert fit.converged and theirs.converged_ and fit.n_iter == theirs.n_iter_ == len(fit.history)
        assert abs(fit.history[-1] - theirs.lower_bound_) < 1e-10
        assert np.abs(fit.mu.numpy() - theirs.means_).max() < 1e-8
        assert np.abs(fit.logvar.exp().numpy() - theirs.covariances_).max() < 1e-8
        assert np.abs(fit.weights.numpy() - theirs.weights_).max() < 1e-9


def test_weights_are_repetitions_and_0_is_absence() -> None:
    z = clusters(200)
    times = torch.randint(0, 4, (200,))
    given = start(z, 4)
    weighted = fit_mixture(z, 4, **given, sample_weight=times.double(), max_iter=10, tol=0)
    repeated = fit_mixture(z.repeat_interleave(times, 0), 4, **given, max_iter=10, tol=0)
    for a, b in ((weighted.mu, repeated.mu), (weighted.logvar, repeated.logvar), (weighted.weights, repeated.weights)):
        assert torch.allclose(a, b, rtol=1e-9)
    assert np.allclose(weighted.history, repeated.history, rtol=1e-12)


@pytest.mark.parametrize("batches", [False, True])
def test_a_row_of_weight_0_may_lie_anywhere(batches: bool) -> None:
    """So far away that its log density is -inf in float32, where 0 times it would be NaN."""
    z = clusters(200, 3, dtype=torch.float32)
    given, g = start(z[1:], 3), torch.ones(200)
    g[0] = 0
    far = z.clone()
    far[0] = 1e25
    found = fit_mixture([(far, g)] if batches else far, 3, **given, sample_weight=None if batches else g, max_iter=3)
    wanted = fit_mixture([z[1:]] if batches else z[1:], 3, **given, max_iter=3)
    assert torch.allclose(found.mu, wanted.mu) and np.allclose(found.history, wanted.history)


def test_the_start_finds_clusters_that_lie_apart() -> None:
    """k-means++ puts a seed into each of 30 clusters, from which rows drawn at random would leave out a third."""
    centres = 100.0 * torch.randn(30, 2)
    z = centres[torch.arange(3000) % 30] + torch.randn(3000, 2)
    for init in ("kmeans", "k-means++"):
        fit = fit_mixture(z, 30, init=init, generator=torch.Generator().manual_seed(1))
        nearest = torch.cdist(centres, fit.mu).min(1).values
        assert float((nearest < 1).double().mean()) > 0.9
    weights = (torch.arange(3000) % 30 < 3).float()  # rows of weight 0 attract no seed
    fit = fit_mixture(z, 3, sample_weight=weights, generator=torch.Generator().manual_seed(1))
    assert float(torch.cdist(centres[:3], fit.mu).min(1).values.max()) < 1


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("init", ["kmeans", "k-means++", "random_from_data"])
def test_an_outlier_leaves_the_other_clusters_apart(init: str, dtype: torch.dtype) -> None:
    """Clusters at distances of 1e-5 of the outlier's: components that start alike would stay alike."""
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]], dtype=dtype)
    z = centres[torch.arange(1000) % 4] + torch.randn(1000, 2, dtype=dtype)
    z = torch.cat([z, torch.full((1, 2), 1e6, dtype=dtype)])
    fits = [fit_mixture(z, 5, init=init, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    best = max(fits, key=lambda fit: fit.history[-1])
    if init != "random_from_data":  # whose seeds may leave out the outlier
        assert float(torch.cdist(centres, best.mu).min(1).values.max()) < 0.5
    for fit in fits:
        assert float(torch.nn.functional.pdist(fit.mu).min()) > 1e-3


def test_autocast_rounds_nothing() -> None:
    z = 100 + clusters(300, 3, 2, torch.float32)
    plain = fit_mixture(z, 5, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = fit_mixture(z, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.mu, plain.mu) and found.history == plain.history


def test_many_components_start_from_rows_at_random() -> None:
    z = torch.randn(4000, 2)
    fit = fit_mixture(z, 3000, init="random_from_data", max_iter=2)
    assert fit.history[1] > fit.history[0] and torch.isfinite(fit.mu).all()
    other = fit_mixture(z, 3000, init="random_from_data", max_iter=2)
    assert not torch.equal(fit.mu, other.mu)


def test_several_starts_return_the_best_and_the_generator_decides() -> None:
    z, seen = clusters(300, 8, 2), []
    options: dict[str, Any] = {"init": "k-means++", "max_iter": 15}

    def run(n_init: int, callback: Callable[..., None] | None = None) -> MixtureFit:
        return fit_mixture(
            z, 8, n_init=n_init, generator=torch.Generator().manual_seed(6), callback=callback, **options
        )

    best = run(6, lambda *at: seen.append(at))
    last = {n: likelihood for n, _, likelihood in seen}
    assert sorted(last) == list(range(6)) and best.history[-1] == max(last.values()) > last[0]
    assert [i for n, i, _ in seen if n == 2] == list(range(len([n for n, *_ in seen if n == 2])))
    assert torch.equal(run(6).mu, best.mu) and not torch.equal(run(1).mu, best.mu)


def test_a_dead_component_keeps_its_place_with_weight_0() -> None:
    z = clusters(200)
    given = start(z, 3)
    given["mu"][2] = 1e4
    fit = fit_mixture(z, 3, **given, max_iter=5)
    assert fit.log_weights[2] == -math.inf and fit.weights[:2].sum().isclose(torch.ones((), dtype=F64))
    assert torch.equal(fit.mu[2], given["mu"][2]) and torch.equal(fit.logvar[2], given["logvar"][2])
    alone = fit_mixture(z, 2, **{name: t[:2] for name, t in given.items()}, max_iter=5)
    assert torch.allclose(fit.mu[:2], alone.mu)
    prior = MixturePrior(fit.mu, fit.logvar, probs=fit.weights)
    assert torch.allclose(prior.log_prob(z), fastvae.mixture_log_prob(z, *alone_of(alone)))


def alone_of(fit: MixtureFit) -> tuple[Tensor, Tensor, Tensor]:
    return fit.mu, fit.logvar, fit.log_weights


def test_more_components_than_different_rows() -> None:
    z = torch.tensor([[0.0, 0.0], [5.0, 1.0]], dtype=F64).repeat(10, 1)
    fit = fit_mixture(z, 5)
    assert torch.isfinite(fit.mu).all() and torch.isfinite(fit.logvar).all() and math.isfinite(fit.history[-1])
    assert fit.weights.sum().isclose(torch.ones((), dtype=F64))
    with pytest.raises(ValueError, match="reg_covar must be larger than 0"):
        fit_mixture(z, 2, reg_covar=0)


def test_one_component_one_dimension_one_row() -> None:
    z = torch.randn(50, 1, dtype=F64)
    fit = fit_mixture(z, 1, reg_covar=0)
    assert torch.allclose(fit.mu[0], z.mean(0)) and torch.allclose(fit.logvar[0].exp(), z.var(0, correction=0))
    assert fit.converged and fit.n_iter == 2 and float(fit.log_weights) == 0
    one = fit_mixture(z[:1], 1)
    assert torch.equal(one.mu, z[:1]) and torch.allclose(one.logvar.exp(), torch.full((1, 1), 1e-6, dtype=F64))


def test_what_is_given_is_the_start_and_the_rest_is_found() -> None:
    z = clusters(300, 3)
    given = start(z, 3)
    whole = fit_mixture(z, 3, **given, max_iter=1)
    clustered = fit_mixture(z, 3, max_iter=1, generator=torch.Generator().manual_seed(0))
    for name in given:
        rest = {key: value for key, value in given.items() if key != name}
        partly = fit_mixture(z, 3, **rest, max_iter=1, generator=torch.Generator().manual_seed(0))
        assert partly.history[0] != whole.history[0] and partly.history[0] != clustered.history[0]
    unnormalised = given | {"log_weights": given["log_weights"] + 7}
    assert fit_mixture(z, 3, **unnormalised, max_iter=1).history == whole.history
    shared = given | {"logvar": torch.zeros((), dtype=F64)}
    assert fit_mixture(z, 3, **shared, max_iter=1).history == whole.history
    before = {name: t.clone() for name, t in given.items()}
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_fixed_weights_stay() -> None:
    z = clusters(300, 3)
    fit = fit_mixture(z, 3, learn_weights=False, max_iter=20, tol=0, reg_covar=0)
    assert torch.allclose(fit.weights, torch.full((3,), 1 / 3, dtype=F64))
    assert float(torch.tensor(fit.history).diff().min()) > -1e-12
    given = start(z, 3) | {"log_weights": torch.tensor([0.5, 0.3, 0.2], dtype=F64).log()}
    assert torch.allclose(fit_mixture(z, 3, **given, learn_weights=False).weights, given["log_weights"].exp())


# Mini-batches


def test_pooled_moments_are_those_of_all_rows() -> None:
    old, new = torch.randn(30, 2, dtype=F64), 5 + 2 * torch.randn(10, 2, dtype=F64)
    of = lambda z: Moments(torch.ones(1, dtype=F64), z.mean(0)[None], z.var(0, correction=0)[None])  # noqa: E731
    pooled, both = of(old).towards(of(new), 0.25), torch.cat([old, new])
    assert torch.allclose(pooled.mean[0], both.mean(0)) and torch.allclose(
        pooled.variance[0], both.var(0, correction=0)
    )
    nothing = of(old)._replace(weight=torch.zeros(1, dtype=F64))
    assert not any(t.isnan().any() for t in nothing.towards(nothing, 0.5))


@pytest.mark.parametrize("form", ["batch_size", "list", "loader", "tuples", "memory map"])
def test_batches_come_near_to_all_rows(form: str, tmp_path: Path) -> None:
    z = clusters(2000, 5, 2)
    rows: Any = z
    if form == "list":
        rows = list(z.split(100))
    elif form == "loader":
        rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(z), batch_size=100, shuffle=True)
    elif form == "tuples":
        rows = [(part, torch.ones(len(part), dtype=F64)) for part in z.split(100)]
    elif form == "memory map":
        np.save(tmp_path / "z.npy", z.numpy())
        rows = np.load(tmp_path / "z.npy", mmap_mode="r")
    given = start(z, 5)
    batch_size = 100 if form in ("batch_size", "memory map") else None
    stepwise = fit_mixture(rows, 5, **given, batch_size=batch_size, max_iter=20, tol=0)
    exact = fit_mixture(z, 5, **given, max_iter=300, tol=1e-9)
    assert stepwise.n_iter == 20 and len(stepwise.history) == 20
    first, best = log_likelihood(fit_mixture(z, 5, **given, max_iter=1), z), log_likelihood(exact, z)
    assert log_likelihood(stepwise, z) > best - 0.05 * (best - first)


@pytest.mark.parametrize("weighted", [False, True], ids=["a small last batch", "weights"])
def test_batches_count_by_what_they_weigh(weighted: bool) -> None:
    """A last batch of one row, and batches that count a thousand times less than others."""
    z = clusters(2001, 5, 2)
    batches = z.split(100)
    given, g = start(z, 5), torch.ones(2001, dtype=F64)
    if weighted:
        g = torch.where(torch.arange(2001) % 200 < 100, 1.0, 1e-3).double()
        z[g < 1] += 1.0
    rows = list(zip(batches, g.split(100), strict=True))
    stepwise = fit_mixture(rows, 5, **given, max_iter=60, tol=0)
    exact = fit_mixture(z, 5, **given, sample_weight=g, max_iter=300, tol=1e-9)

    def mean(fit: MixtureFit) -> float:
        return float(fastvae.mixture_log_prob(z, *alone_of(fit)) @ g / g.sum())

    assert mean(stepwise) > mean(exact) - 2e-3


def test_rows_of_any_kind_give_the_same() -> None:
    """A view, an array, an array that may not be written to or runs backwards, and a half precision."""
    z = clusters(100, 3, dtype=torch.float32)
    given = start(z, 3)
    want = fit_mixture(z, 3, **given)
    wide = torch.zeros(100, 6)
    wide[:, ::2] = z
    fixed = z.numpy().copy()
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (wide[:, ::2], z.clone().requires_grad_(), z.numpy(), fixed, z.flip(0).numpy()[::-1]):
            found = fit_mixture(same, 3, **given)
            assert torch.equal(found.mu, want.mu) and found.history == want.history and not found.mu.requires_grad
    assert fit_mixture(z.half(), 3).mu.dtype == torch.float32
    assert fit_mixture(z.double(), 3, mu=given["mu"]).mu.dtype == F64


def test_an_array_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    z = clusters(1000, 3)
    whole = fit_mixture(z, 3, **start(z, 3), max_iter=5, tol=0)
    monkeypatch.setattr("fastvae.em.rows.ROWS", 96)
    monkeypatch.setattr("fastvae.em.statistics.ROWS", 40)
    parts = fit_mixture(z.numpy(), 3, **start(z, 3), max_iter=5, tol=0)
    assert torch.allclose(parts.mu, whole.mu, rtol=1e-12) and np.allclose(parts.history, whole.history, rtol=1e-13)


def test_an_iterator_is_read_once() -> None:
    z = clusters(500, 3)
    fit = fit_mixture(iter(z.split(50)), 3, max_iter=10)
    assert fit.n_iter == 1 and not fit.converged and log_likelihood(fit, z) > -6
    seen = []
    fit_mixture((seen.append(i) or part for i, part in enumerate(z.split(50))), 3)
    assert seen == list(range(10))


# What is refused


def bad_calls() -> dict[str, tuple[type[Exception], str, Callable[[], Any]]]:
    z = torch.zeros(20, 3) + torch.arange(20)[:, None]
    broken = z.clone()
    broken[4, 1], broken[7, 2] = math.nan, math.inf
    fit = lambda *args, **options: lambda: fit_mixture(*args, **options)  # noqa: E731
    return {
        "NaN": (ValueError, "z must be finite, but 2 of 20 rows hold NaN or infinity", fit(broken, 2)),
        "NaN in a batch": (ValueError, "2 of 10 rows", fit(list(broken.split(10)), 2)),
        "NaN in an array": (ValueError, "2 of 20 rows", fit(broken.numpy(), 2, batch_size=5)),
        "integers": (TypeError, "z must be a floating tensor, not torch.int64", fit(z.long(), 2)),
        "integer array": (TypeError, "z must be a floating tensor, not torch.int64", fit(z.long().numpy(), 2)),
        "objects": (TypeError, "z must be of a dtype that PyTorch has.* not object", fit(z.numpy().astype(object), 2)),
        "byte order": (TypeError, "z must be .* this machine's byte order, not >f4", fit(z.numpy().astype(">f4"), 2)),
        "no rows": (ValueError, r"z must be \[N, D\] with N >= 1 and D >= 1, not \[0, 3\]", fit(z[:0], 2)),
        "one dimension": (ValueError, r"z must be \[N, D\]", fit(z[:, 0], 2)),
        "no batches": (ValueError, "z must give at least one batch", fit([], 2)),
        "a number": (TypeError, "z must be a tensor or an array", fit(3.0, 2)),
        "rows in a list": (TypeError, "a batch of z must be a tensor or an array", fit([[0.0, 1.0]], 1)),
        "labels": (TypeError, "sample_weight must be floating", fit([(z, torch.zeros(20).long())], 2)),
        "batches that differ": (ValueError, r"must be torch.float32 \[B, 3\] as the first", fit([z, z[:, :2]], 2)),
        "dtypes that differ": (ValueError, r"first, not torch.float64 \[20, 3\]", fit([z, z.double()], 2)),
        "K": (ValueError, "K must be at least 1, not 0", fit(z, 0)),
        "K of a float": (TypeError, "K must be an integer, not float", fit(z, 2.0)),
        "K of a bool": (TypeError, "K must be an integer, not bool", fit(z, True)),
        "meta": (ValueError, "z must hold values", fit(z.to("meta"), 2)),
        "generator": (TypeError, "generator must be a torch.Generator", fit(z, 2, generator=0)),
        "callback": (TypeError, "callback must be a function", fit(z, 2, callback=3)),
        "tol of a string": (TypeError, "tol must be a number, not str", fit(z, 2, tol="0.1")),
        "too few rows": (ValueError, "z must have at least K = 21 rows", fit(z, 21)),
        "too few rows of weight": (
            ValueError,
            "z must have at least K = 3 rows of positive weight, not 2",
            fit(z, 3, sample_weight=(torch.arange(20) < 2).float()),
        ),
        "max_iter": (ValueError, "max_iter must be at least 1", fit(z, 2, max_iter=0)),
        "tol": (ValueError, "tol must be finite and >= 0, not -1", fit(z, 2, tol=-1)),
        "reg_covar": (ValueError, "reg_covar must be finite and >= 0", fit(z, 2, reg_covar=math.nan)),
        "init": (
            ValueError,
            "init must be one of 'kmeans', 'k-means\\+\\+', 'random_from_data', not 'random'",
            fit(z, 2, init="random"),
        ),
        "n_init of an iterator": (ValueError, "n_init must be 1", fit(iter([z]), 2, n_init=2)),
        "batch_size": (ValueError, "batch_size must be at least 1", fit(z, 2, batch_size=0)),
        "batch_size of batches": (ValueError, "batch_size must be None", fit([z], 2, batch_size=2)),
        "weights' shape": (ValueError, r"sample_weight must be \[20\]", fit(z, 2, sample_weight=torch.ones(3))),
        "weights below 0": (ValueError, "sample_weight must be finite and >= 0", fit(z, 2, sample_weight=-z[:, 0])),
        "weights 0": (ValueError, "sample_weight must be above 0", fit(z, 2, sample_weight=torch.zeros(20))),
        "weights of batches": (ValueError, "sample_weight must be None", fit([z], 2, sample_weight=torch.ones(20))),
        "mu": (ValueError, r"mu must be \[2, 3\] for K = 2", fit(z, 2, mu=torch.zeros(3, 3))),
        "mu of a list": (TypeError, "mu must be a tensor, not list", fit(z, 2, mu=[[0.0]])),
        "logvar": (ValueError, r"logvar must be broadcastable to \[2, 3\]", fit(z, 2, logvar=torch.zeros(4, 3))),
        "logvar of inf": (ValueError, "logvar must be finite", fit(z, 2, logvar=torch.tensor(-math.inf))),
        "log_weights": (ValueError, r"log_weights must be \[2\]", fit(z, 2, log_weights=torch.zeros(3))),
        "no weight": (
            ValueError,
            "log_weights must be finite, or -inf",
            fit(z, 2, log_weights=torch.tensor([-math.inf] * 2)),
        ),
        "impl": (ValueError, "impl must be one of", fit(z, 2, impl="numpy")),
        "option": (TypeError, "unexpected keyword argument 'epochs'", fit(z, 2, epochs=3)),
        "out of range": (ValueError, "scale z, or give it as float64", fit(z * 1e30, 2)),
    }


@pytest.mark.parametrize("what", bad_calls())
def test_a_clear_error(what: str) -> None:
    error, message, call = bad_calls()[what]
    with pytest.raises(error, match=message):
        call()


def test_a_variance_of_0_in_the_m_step() -> None:
    found = Moments(torch.ones(2, dtype=F64), torch.zeros(2, 1, dtype=F64), torch.tensor([[1.0], [0.0]], dtype=F64))
    with pytest.raises(ValueError, match="reg_covar must be larger than 0"):
        m_step(found, None, 0.0, 0.0)
    empty = found._replace(weight=torch.tensor([1.0, 0.0], dtype=F64))
    assert m_step(empty, None, 0.0, 0.0).log_weights.tolist() == [0.0, -math.inf]


# A prior


@pytest.mark.parametrize("learn_weights", [True, False])
def test_a_prior_is_fitted_in_place(learn_weights: bool) -> None:
    z = clusters(500, 4, dtype=torch.float32)
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    prior = MixturePrior(z[:4], probs=probs, learn_weights=learn_weights)
    before, own = float(prior.log_prob(z).detach().mean()), {name: id(p) for name, p in prior.named_parameters()}
    fit = prior.fit(z, max_iter=5)
    assert abs(fit.history[0] - before) < 1e-5 and float(prior.log_prob(z).detach().mean()) >= fit.history[-1] > before
    assert own == {name: id(p) for name, p in prior.named_parameters()} and prior.mu.requires_grad
    assert torch.equal(prior.mu, fit.mu)
    assert torch.allclose(prior.components()[2].exp(), probs) != learn_weights
    state = {name: t.clone() for name, t in prior.state_dict().items()}
    with pytest.raises(ValueError, match="z must be finite"):
        prior.fit(torch.full((9, 3), math.nan))
    assert all(torch.equal(t, state[name]) for name, t in prior.state_dict().items())


def test_the_prior_of_a_vae_in_turn_with_its_network() -> None:
    """Variational EM: the prior's step is EM on draws of the aggregated posterior, and raises the ELBO."""
    from models import Encoder  # that of the tests

    encoder = Encoder(6, 2)
    x = torch.randn(400, 6)
    posterior = fastvae.AggregatedPosterior.of(encoder, x)
    prior = MixturePrior(torch.randn(10, 2))
    vae = fastvae.VAE(encoder, torch.nn.Linear(2, 6), prior, likelihood="gaussian")
    with torch.no_grad():
        before = float(vae.elbo(x, 20).mean())
        prior.fit(posterior.sample(20_000), max_iter=10)
        assert float(vae.elbo(x, 20).mean()) > before + 0.1
    assert float(posterior.marginal_kl(prior).value) < 0.1
