"""An estimator with scikit-learn's interface, on fastvae's kernels; it needs scikit-learn, which the rest does not.

pip install "fastvae-kernels[sklearn]"
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from fastvae import _checks
from fastvae import functional as F
from fastvae.em import fit_mixture, mixture_responsibilities
from fastvae.em.responsibilities import Exponents, row_slices
from fastvae.em.start import INITS
from fastvae.em.statistics import wide_dtype
from fastvae.priors.weights import log_weights_of

try:
    import numpy as np
    from sklearn.base import BaseEstimator, DensityMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_array, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        'fastvae.sklearn needs scikit-learn 1.6 or newer; pip install "fastvae-kernels[sklearn]"'
    ) from error

__all__ = ["GaussianMixture"]


class GaussianMixture(DensityMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """scikit-learn's `GaussianMixture(covariance_type="diag")`, fitted and evaluated by fastvae's kernels.

    Arguments, methods and attributes are scikit-learn's.  From the same start it finds the same mixture.

    Args:
        n_components: K.
        covariance_type: "diag"; there is no other.
        tol, reg_covar, max_iter, n_init: as of :func:`fastvae.fit_mixture`.
        init_params: "kmeans", "k-means++" or "random_from_data", the `init` of :func:`fastvae.fit_mixture`.
        weights_init, means_init, precisions_init: [K], [K, D], [K, D], to start from; `init_params` finds the others.
        random_state: an integer, a `numpy.random.RandomState`, or None, for the start and for `sample`.
        warm_start: start from the last fit's mixture, where there is one.
        device: where to compute, such as "cuda"; None means the CPU.
        impl: the backend, as of :func:`fastvae.mixture_log_prob`.

    Attributes:
        weights_, means_, covariances_, precisions_, precisions_cholesky_: [K], and [K, D] each; NumPy arrays in the
            dtype of X.
        converged_, n_iter_, lower_bound_, lower_bounds_: how the iterations ended: the mean log-likelihood, and that
            of each iteration.
        n_features_in_: D.

    Example::

        from fastvae.sklearn import GaussianMixture

        mixture = GaussianMixture(256, random_state=0).fit(x)
        labels, density = mixture.predict(x), mixture.score_samples(x)
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "diag",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: str = "kmeans",
        weights_init: Any = None,
        means_init: Any = None,
        precisions_init: Any = None,
        random_state: Any = None,
        warm_start: bool = False,
        device: torch.device | str | None = None,
        impl: str | None = None,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.random_state = random_state
        self.warm_start = warm_start
        self.device = device
        self.impl = impl

    def fit(self, X: Any, y: Any = None) -> GaussianMixture:
        """Fit to X [N, D] by EM; y is not used.  A `ConvergenceWarning` says that `max_iter` was too low."""
        if self.covariance_type != "diag":
            raise ValueError(
                f"covariance_type must be 'diag', not {self.covariance_type!r}; scikit-learn's own class has others"
            )
        if self.init_params not in INITS:
            raise ValueError(f"init_params must be one of {', '.join(map(repr, INITS))}, not {self.init_params!r}")
        _checks.positive("n_components", self.n_components)
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        if len(X) < self.n_components:
            raise ValueError(f"X must have at least n_components = {self.n_components} rows, not n_samples = {len(X)}")
        z = self._tensor(X)
        warm = self.warm_start and hasattr(self, "means_")
        given = dict(zip(("mu", "logvar", "log_weights"), self._mixture(z), strict=True)) if warm else self._given(z)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        fit = fit_mixture(
            z,
            self.n_components,
            **given,
            init=self.init_params,
            n_init=1 if warm else self.n_init,
            max_iter=self.max_iter,
            tol=self.tol,
            reg_covar=self.reg_covar,
            generator=torch.Generator().manual_seed(seed),
            impl=self.impl,
        )
        self.means_ = fit.mu.cpu().numpy()
        self.covariances_ = fit.logvar.exp().cpu().numpy()
        weights = fit.log_weights.to(wide_dtype(z.device)).exp()
        self.weights_ = (weights / weights.sum()).to(z).cpu().numpy()
        self.precisions_ = 1 / self.covariances_
        self.precisions_cholesky_ = np.sqrt(self.precisions_)
        self.converged_, self.n_iter_ = fit.converged, fit.n_iter
        self.lower_bound_, self.lower_bounds_ = fit.history[-1], list(fit.history)
        if not fit.converged:
            warnings.warn(
                f"EM did not converge in max_iter = {self.max_iter} iterations; raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def fit_predict(self, X: Any, y: Any = None) -> Any:
        """Fit to X [N, D], and each row's component: int64 [N]."""
        return self.fit(X).predict(X)

    def predict(self, X: Any) -> Any:
        """The component with the largest responsibility for each row of X [N, D]: int64 [N]."""
        z = self._rows(X)
        return mixture_responsibilities(z, *self._mixture(z), impl=self.impl).indices[:, 0].cpu().numpy()

    def predict_proba(self, X: Any) -> Any:
        """All responsibilities for the rows of X [N, D]: [N, K].

        :func:`fastvae.mixture_responsibilities` has the largest of them without a table of all.
        """
        z = self._rows(X)
        exponents = Exponents(*(t.to(wide_dtype(z.device)) for t in self._mixture(z)))
        found = z.new_empty(len(z), len(self.means_))
        for m in row_slices(z, len(self.means_)):
            found[m] = torch.softmax(exponents.of_all(z[m].to(exponents.c), slice(None)), 1).to(z)
        return found.cpu().numpy()

    def score_samples(self, X: Any) -> Any:
        """The log density of each row of X [N, D]: [N], nats."""
        z = self._rows(X)
        with torch.no_grad():
            return F.mixture_log_prob(z, *self._mixture(z), impl=self.impl).cpu().numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """The mean log density of the rows of X [N, D]."""
        return float(self.score_samples(X).mean(dtype=np.float64))

    def bic(self, X: Any) -> float:
        """The Bayesian information criterion on X [N, D]; the lower, the better."""
        X = self._validated(X)
        return -2 * self.score(X) * len(X) + self._n_parameters() * math.log(len(X))

    def aic(self, X: Any) -> float:
        """The Akaike information criterion on X [N, D]; the lower, the better."""
        X = self._validated(X)
        return -2 * self.score(X) * len(X) + 2 * self._n_parameters()

    def sample(self, n_samples: int = 1) -> tuple[Any, Any]:
        """(X [n_samples, D], their components int64 [n_samples]), in the order of the components."""
        check_is_fitted(self)
        n_samples = _checks.positive("n_samples", n_samples)
        rng = check_random_state(self.random_state)
        weights = self.weights_.astype(np.float64)
        labels = np.repeat(np.arange(len(weights)), rng.multinomial(n_samples, weights / weights.sum()))
        noise = rng.standard_normal((n_samples, self.n_features_in_))
        return self.means_[labels] + noise * np.sqrt(self.covariances_[labels]), labels

    def _n_parameters(self) -> int:
        K, D = self.means_.shape
        return int(2 * K * D + K - 1)

    def _validated(self, X: Any) -> Any:
        check_is_fitted(self)
        return validate_data(self, X, dtype=[np.float64, np.float32], reset=False)

    def _rows(self, X: Any) -> Tensor:
        return self._tensor(self._validated(X))

    def _tensor(self, array: Any) -> Tensor:
        # a copy of what PyTorch warns of: an array that may not be written to
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self.device or "cpu")

    def _mixture(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mu, logvar, log_weights) that were fitted, for rows z."""
        mu, variance, weights = (self._tensor(a).to(z) for a in (self.means_, self.covariances_, self.weights_))
        return mu, variance.log(), log_weights_of(weights)

    def _given(self, z: Tensor) -> dict[str, Any]:
        """What is given to start from, for rows z."""
        given: dict[str, Any] = {}
        for name, shape, to, convert in (
            ("means_init", (self.n_components, z.shape[1]), "mu", lambda t: t),
            ("precisions_init", (self.n_components, z.shape[1]), "logvar", lambda t: -t.log()),
            ("weights_init", (self.n_components,), "log_weights", log_weights_of),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            array = check_array(value, dtype=np.float64, ensure_2d=False, input_name=name)
            if array.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, not {list(array.shape)}")
            if name != "means_init" and not (array.min() >= 0 and array.max() > 0):
                raise ValueError(f"{name} must be positive, but the smallest is {array.min():.4g}")
            given[to] = convert(self._tensor(array).to(z.device, wide_dtype(z.device)))
        return given
