"""Fitting a mixture of diagonal Gaussians by EM, over all rows at once or in steps by batches."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvae import _checks
from fastvae.backends import choice
from fastvae.em.rows import Batch, StoredRows, Stream, rows_of
from fastvae.em.start import INITS, kmeans
from fastvae.em.statistics import Moments, Parameters, Statistics, e_step, m_step, moments, wide_dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastvae.backends import BackendOptions

ROWS_PER_COMPONENT = 64  # that k-means looks at, and that the start counts for in stepwise EM
STEP_DECAY = 0.6  # of stepwise EM: above 1/2, so that it converges

Callback = Callable[[int, int, float], Any]


@dataclass(frozen=True)
class MixtureFit:
    """A mixture that :func:`fit_mixture` found: `MixturePrior(fit.mu, fit.logvar, probs=fit.weights)` is the prior.

    Attributes:
        mu: [K, D], the means.
        logvar: [K, D], the log variances.
        log_weights: [K], normalised; -inf for a component that no row uses any more.
        history: of each iteration the mean log-likelihood of the rows, nats, before its update.
        converged: whether the last change of that was below `tol`.
        n_iter: the number of iterations, the length of `history`.
    """

    mu: Tensor
    logvar: Tensor
    log_weights: Tensor
    history: tuple[float, ...]
    converged: bool
    n_iter: int

    @property
    def weights(self) -> Tensor:
        """[K], exp(log_weights)."""
        return self.log_weights.exp()


@torch.no_grad()
def fit_mixture(
    z: Any,
    K: int,
    *,
    sample_weight: Any = None,
    batch_size: int | None = None,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    log_weights: Tensor | None = None,
    learn_weights: bool = True,
    init: str = "kmeans",
    n_init: int = 1,
    max_iter: int = 100,
    tol: float = 1e-3,
    reg_covar: float = 1e-6,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    device: torch.device | str | None = None,
    **backend: Unpack[BackendOptions],
) -> MixtureFit:
    """Fit a mixture of K diagonal Gaussians to rows by expectation maximisation (EM).

    Each iteration computes the responsibilities of all components for all rows and sets each component's weight, mean
    and variance to those of its rows.  It takes two passes of the kernels of :func:`fastvae.mixture_log_prob`, forward
    and backward.  Memory beside the rows grows with K, and not with the number of rows times K.

    With `batch_size`, or batches for z, the mixture is updated after each batch instead (stepwise EM), and an iteration
    is a pass over all batches.  A component's share of a batch then moves it by a step that shrinks with the number of
    batches seen, t: (t + t_0)^-0.6, where the start counts for t_0 batches, which is 64 K rows.  The step of a batch is
    in proportion to its weight, by its rows or by `sample_weight`, beside the mean weight of the batches so far.

    A component whose share of all rows is below a rounding, the dtype's epsilon / K, is dead: its weight becomes 0 and
    stays 0, its mean and variance stay as they were.  Without `reg_covar` an iteration over all rows never lowers the
    likelihood.

    Args:
        z: the rows.  A tensor [N, D]; a NumPy array [N, D], which may be a memory map and is read some rows at a time;
            or an iterable of batches, such as a `DataLoader`, of tensors [B, D] or tuples (z,) or (z, sample_weight).
            An iterator is read once.
        K: the number of components.
        sample_weight: [N], how often each row counts, >= 0.  None means once.
        batch_size: rows in a batch of stepwise EM, drawn anew in each pass; None means EM over all rows.
        mu, logvar, log_weights: [K, D], broadcastable to [K, D], and [K], to start from.  Those not given are found by
            `init`.
        learn_weights: update the weights; False leaves them as they start: `log_weights`, or equal.
        init: "kmeans" assigns rows to the clusters of k-means, "k-means++" to the seeds of these, "random_from_data" to
            rows drawn at random.  Where there are many rows, a random subset is clustered: 65,536 rows, or 64 K if that
            is more; of an iterable, the first ones.  The seeds take O(rows K D log K) operations, which are too many
            where K is some 10,000.
        n_init: how many starts; the one that ends with the largest likelihood is returned.
        max_iter: iterations at most.
        tol: a change of the mean log-likelihood below this ends the iterations, in nats per row.
        reg_covar: is added to each variance.
        generator: of the CPU, for the start and for the batches; None means PyTorch's default.
        callback: is called as callback(start, iteration, mean_log_likelihood) after each iteration; both count from 0.
        device: where to compute; None means where the rows are.
        backend: impl, precision, dense_backward, as of :func:`fastvae.mixture_log_prob`.

    Returns:
        The mixture, in the dtype of the rows, float32 at least, and how it was found.  The sums over 65,536 rows at a
        time are added up in float64.

    Raises:
        TypeError: z is none of these, or not floating.
        ValueError: a row holds NaN or infinity, shapes that do not fit, fewer rows than K, a variance that is 0 because
            `reg_covar` is.

    Equals, for a tensor and the same start::

        sklearn.mixture.GaussianMixture(K, covariance_type="diag", means_init=..., ...).fit(z)

    Sources: Dempster, Laird and Rubin, Maximum likelihood from incomplete data via the EM algorithm (JRSS B 1977);
    Cappé and Moulines, On-line expectation-maximization algorithm for latent data models (JRSS B 2009), for batches.
    """
    K, n_init, max_iter = (
        _checks.positive(name, value) for name, value in (("K", K), ("n_init", n_init), ("max_iter", max_iter))
    )
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, not {init!r}")
    for name, bound in (("tol", tol), ("reg_covar", reg_covar)):
        if bound is None or isinstance(bound, str):
            raise TypeError(f"{name} must be a number, not {type(bound).__name__}")
        if not 0 <= bound < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, not {bound}")
    rows = rows_of(z, sample_weight, device)
    if batch_size is not None:
        batch_size = _checks.positive("batch_size", batch_size)
        if isinstance(rows, Stream):
            raise ValueError("batch_size must be None where z is an iterable: its batches are what they are")
    if isinstance(rows, Stream) and rows.once and n_init > 1:
        raise ValueError(f"n_init must be 1 where z is an iterator, which is read once, not {n_init}")
    generator = torch.default_generator if generator is None else generator
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise TypeError(f"generator must be a torch.Generator of the CPU, not {generator!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function or None, not {type(callback).__name__}")
    first = rows.sample(max(2**16, ROWS_PER_COMPONENT * K), generator)
    if len(first.z) < K:
        raise ValueError(f"z must have at least K = {K} rows of positive weight, not {len(first.z)}")
    given = _given(first.z, K, mu, logvar, log_weights)
    em = _EM(rows, first.z, batch_size, learn_weights, max_iter, tol, reg_covar, choice.checked("fit_mixture", backend))

    best = None
    for n in range(n_init):
        if n:
            first = rows.sample(len(first.z), generator)
        start = _start(first, K, given, learn_weights, init, reg_covar, generator)
        fit = em.run(start, generator, None if callback is None else functools.partial(callback, n))
        if best is None or fit.history[-1] > best.history[-1]:
            best = fit
    assert best is not None
    return best


def _given(
    rows: Tensor, K: int, mu: Tensor | None, logvar: Tensor | None, log_weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What the caller gives to start from, checked, in the wide dtype: [K, D], [K, D], [K]."""
    D, wide = rows.shape[1], wide_dtype(rows.device)
    for name, value in {"mu": mu, "logvar": logvar, "log_weights": log_weights}.items():
        if value is None:
            continue
        _checks.tensor(name, value)
        _checks.result_dtype(z=rows, **{name: value})
        if name == "log_weights":
            bad = bool((value.isnan() | (value == math.inf)).any()) or bool((value == -math.inf).all())
        else:
            bad = not bool(torch.isfinite(value).all())
        if bad:
            raise ValueError(f"{name} must be finite" + (", or -inf for some" if name == "log_weights" else ""))
    if mu is not None and mu.shape != (K, D):
        raise ValueError(f"mu must be [{K}, {D}] for K = {K} and z [N, {D}], not {list(mu.shape)}")
    like = rows.new_zeros((K, D), dtype=wide) if mu is None else mu.detach().to(wide)
    _, wide_logvar, wide_weights = _checks.components(
        like, like if logvar is None else logvar.detach(), None if log_weights is None else log_weights.detach(), wide
    )
    return (
        None if mu is None else like,
        None if logvar is None else wide_logvar.expand(K, D),
        None if wide_weights is None else torch.log_softmax(wide_weights, 0),
    )


def _start(
    first: Batch,
    K: int,
    given: tuple[Tensor | None, Tensor | None, Tensor | None],
    learn_weights: bool,
    init: str,
    reg_covar: float,
    generator: torch.Generator,
) -> Parameters:
    """What was given, and the rest from clusters of the first rows."""
    mu, logvar, log_weights = given
    if log_weights is None and not learn_weights:
        log_weights = first.z.new_full((K,), -math.log(K), dtype=wide_dtype(first.z.device))
    if mu is None or logvar is None or log_weights is None:
        with torch.autocast(first.z.device.type, enabled=False):  # which would round the products of k-means
            clusters = kmeans(*first, K, init, generator)
        found = m_step(clusters, None, reg_covar, 0.0)
        mu = found.mu if mu is None else mu
        logvar = found.logvar if logvar is None else logvar
        log_weights = found.log_weights if log_weights is None else log_weights
    return Parameters(mu, logvar, log_weights)


class _EM:
    """The iterations, from any start."""

    def __init__(
        self,
        rows: StoredRows | Stream,
        like: Tensor,
        batch_size: int | None,
        learn_weights: bool,
        max_iter: int,
        tol: float,
        reg_covar: float,
        options: BackendOptions,
    ) -> None:
        self.rows, self.dtype = rows, like.dtype
        self.batch_size, self.learn_weights = batch_size, learn_weights
        self.max_iter, self.tol, self.reg_covar = max_iter, tol, reg_covar
        self.backend = choice.choose(options["impl"], like.device, like.dtype, options["precision"])
        self.dense = choice.dense(options["dense_backward"])

    def run(
        self, start: Parameters, generator: torch.Generator, callback: Callable[[int, float], Any] | None
    ) -> MixtureFit:
        stepwise = self.batch_size is not None or isinstance(self.rows, Stream)
        updates = self._by_batches(start, generator) if stepwise else self._over_all_rows(start)
        history: list[float] = []
        parameters, converged = start, False
        for updated, log_likelihood in itertools.islice(updates, self.max_iter):
            if not math.isfinite(log_likelihood):
                raise ValueError(
                    f"z must be such that its log-likelihood can be computed in {self.dtype}, and it is "
                    f"{log_likelihood}: scale z, or give it as float64"
                )
            parameters = updated
            history.append(log_likelihood)
            if callback is not None:
                callback(len(history) - 1, log_likelihood)
            converged = len(history) > 1 and abs(history[-1] - history[-2]) < self.tol
            if converged:
                break
        if not history:
            raise ValueError("z must give rows of positive weight in each pass over its batches")
        return MixtureFit(*parameters.to(self.dtype), tuple(history), converged, len(history))

    def _over_all_rows(self, parameters: Parameters) -> Iterator[tuple[Parameters, float]]:
        """After each iteration the mixture, and the mean log-likelihood that its predecessor had."""
        while True:
            about = parameters.to(self.dtype)
            total: Statistics | None = None
            log_likelihood = weight = 0.0
            for batch in self.rows.in_order():
                summed, batch_weight, statistics = self._e_step(batch, about)
                log_likelihood += summed
                weight += batch_weight
                total = statistics if total is None else total + statistics
            assert total is not None
            parameters = self._m_step(moments(total, about), parameters)
            yield parameters, log_likelihood / weight

    def _by_batches(self, parameters: Parameters, generator: torch.Generator) -> Iterator[tuple[Parameters, float]]:
        """The same after each pass over the batches; the likelihood of a batch is that before its update."""
        kept = Moments(parameters.log_weights.exp(), parameters.mu, parameters.logvar.exp())
        seen = rows_seen = 0
        weight_seen = 0.0
        while True:
            log_likelihood = weight = 0.0
            for batch in self._batches(generator):
                about = parameters.to(self.dtype)
                summed, batch_weight, statistics = self._e_step(batch, about)
                log_likelihood += summed
                weight += batch_weight
                if batch_weight == 0:
                    continue
                found = moments(statistics, about)
                found = found._replace(weight=found.weight / batch_weight)
                seen, rows_seen, weight_seen = seen + 1, rows_seen + len(batch.z), weight_seen + batch_weight
                offset = ROWS_PER_COMPONENT * len(kept.weight) * seen / rows_seen
                # in proportion to the batch's weight: a last batch of few rows must not count as much as the others
                step = (seen + offset) ** -STEP_DECAY * batch_weight * seen / weight_seen
                kept = kept.towards(found, min(step, 1.0))
                parameters = self._m_step(kept, parameters)
            if weight == 0:
                return  # an iterator, which has been read
            yield parameters, log_likelihood / weight

    def _batches(self, generator: torch.Generator) -> Iterable[Batch]:
        if isinstance(self.rows, Stream):
            return self.rows.in_order()
        assert self.batch_size is not None
        return self.rows.shuffled(self.batch_size, generator)

    def _e_step(self, batch: Batch, about: Parameters) -> tuple[float, float, Statistics]:
        """(the sum of the batch's log-likelihoods, its weight, its statistics)."""
        log_prob, statistics = e_step(batch.z, about, batch.row_weights, self.backend, self.dense)
        log_prob = log_prob.to(wide_dtype(log_prob.device))
        if batch.row_weights is None:
            return float(log_prob.sum()), float(len(log_prob)), statistics
        row_weights = batch.row_weights.to(log_prob)
        return float(log_prob @ row_weights), float(row_weights.sum()), statistics

    def _m_step(self, found: Moments, before: Parameters) -> Parameters:
        negligible = torch.finfo(self.dtype).eps / len(found.weight)
        parameters = m_step(found, before, self.reg_covar, negligible)
        return parameters if self.learn_weights else parameters._replace(log_weights=before.log_weights)
