"""The estimator is one of scikit-learn's kind, and finds what scikit-learn's own finds."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.mixture import GaussianMixture as Theirs
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from fastvae.sklearn import GaussianMixture


@parametrize_with_checks([GaussianMixture()])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_it_keeps_the_rules_of_scikit_learn(estimator, check) -> None:
    check(estimator)


def rows(N: int = 400, dtype: type = np.float64) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = 3 * rng.standard_normal((4, 3))
    return (centres[rng.integers(4, size=N)] + rng.standard_normal((N, 3))).astype(dtype)


@pytest.fixture(params=[np.float64, np.float32])
def both(request: pytest.FixtureRequest) -> tuple[np.ndarray, GaussianMixture, Theirs]:
    """(X, ours, scikit-learn's), from the same start."""
    X = rows(dtype=request.param)
    start = {
        "means_init": X[:4],
        "precisions_init": np.full((4, 3), 0.5, X.dtype),
        "weights_init": np.array([0.1, 0.2, 0.3, 0.4], X.dtype),
    }
    ours = GaussianMixture(4, **start, max_iter=200)
    return X, ours.fit(X), Theirs(4, covariance_type="diag", **start, max_iter=200).fit(X)


def test_all_that_scikit_learn_gives(both: tuple[np.ndarray, GaussianMixture, Theirs]) -> None:
    X, ours, theirs = both
    tolerance = 1e-8 if X.dtype == np.float64 else 2e-3
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"):
        assert getattr(ours, name).dtype == X.dtype
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=tolerance, atol=tolerance)
    assert ours.n_iter_ == theirs.n_iter_ and ours.converged_ and len(ours.lower_bounds_) == ours.n_iter_
    assert abs(ours.lower_bound_ - theirs.lower_bound_) < tolerance and ours.n_features_in_ == 3
    test = rows(50, X.dtype)[::-1]
    np.testing.assert_allclose(ours.score_samples(test), theirs.score_samples(test), rtol=tolerance)
    np.testing.assert_allclose(ours.predict_proba(test), theirs.predict_proba(test), atol=tolerance)
    assert ours.predict_proba(test).dtype == ours.score_samples(test).dtype == X.dtype
    assert (ours.predict(test) == theirs.predict(test)).all()
    for name in ("score", "bic", "aic"):
        assert getattr(ours, name)(test) == pytest.approx(getattr(theirs, name)(test), rel=tolerance)


def test_responsibilities_of_narrow_components_are_exact() -> None:
    """Points that repeat make components of a standard deviation of 1e-3 among means that are 1e6 apart."""
    rng = np.random.default_rng(0)
    points = 1e6 * rng.standard_normal((30, 2))
    X = np.concatenate([np.repeat(points, 20, 0), points + 1e-3 * rng.standard_normal((30, 2))])
    mixture = GaussianMixture(31, means_init=np.concatenate([points, points[:1] + 1e-3]), random_state=0).fit(X)
    t = (X[:, None] - mixture.means_) / np.sqrt(mixture.covariances_)
    with np.errstate(divide="ignore"):  # of a component that died
        log_weights = np.log(mixture.weights_)
    exponents = log_weights - 0.5 * (np.log(mixture.covariances_) + t**2).sum(-1)
    wanted = np.exp(exponents - exponents.max(1, keepdims=True))
    wanted /= wanted.sum(1, keepdims=True)
    np.testing.assert_allclose(mixture.predict_proba(X), wanted, atol=1e-9)
    assert ((wanted > 0.01) & (wanted < 0.99)).any()  # two components share a point


def test_fit_predict_pickle_clone_and_pipeline() -> None:
    X = rows()
    mixture = GaussianMixture(4, random_state=3)
    labels = mixture.fit_predict(X)
    assert (labels == mixture.predict(X)).all() and (clone(mixture).fit(X).predict(X) == labels).all()
    assert (pickle.loads(pickle.dumps(mixture)).predict(X) == labels).all()
    search = GridSearchCV(GaussianMixture(random_state=0), {"n_components": np.arange(1, 5)}, cv=3).fit(X)
    assert search.best_params_["n_components"] >= 3
    assert make_pipeline(StandardScaler(), GaussianMixture(4, random_state=0)).fit(X).score(X) > -5


def test_samples() -> None:
    mixture = GaussianMixture(4, random_state=0).fit(rows())
    X, labels = mixture.sample(50_000)
    assert X.shape == (50_000, 3) and (np.diff(labels) >= 0).all()
    assert np.abs(np.bincount(labels) / 50_000 - mixture.weights_).max() < 0.01
    for k in range(4):
        np.testing.assert_allclose(X[labels == k].mean(0), mixture.means_[k], atol=0.1)
        np.testing.assert_allclose(X[labels == k].var(0), mixture.covariances_[k], rtol=0.1)
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        mixture.sample(0)


def test_warm_start_goes_on() -> None:
    X = rows()
    mixture = GaussianMixture(4, random_state=0, warm_start=True, max_iter=1, tol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        bounds = [mixture.fit(X).lower_bound_ for _ in range(5)]
        whole = GaussianMixture(4, random_state=0, max_iter=5, tol=0).fit(X)
    assert bounds == pytest.approx(whole.lower_bounds_, rel=1e-12)


def test_what_is_refused() -> None:
    X = rows(20)
    with pytest.raises(NotFittedError):
        GaussianMixture().predict(X)
    with pytest.warns(ConvergenceWarning, match="did not converge in max_iter = 1"):
        GaussianMixture(2, max_iter=1).fit(X)
    for options, message in (
        ({"covariance_type": "full"}, "covariance_type must be 'diag', not 'full'"),
        ({"init_params": "random"}, "init_params must be one of"),
        ({"n_components": 0}, "n_components must be at least 1, not 0"),
        ({"n_components": 21}, "X must have at least n_components = 21 rows"),
        ({"means_init": X[:3]}, r"means_init must be \[1, 3\], not \[3, 3\]"),
        ({"precisions_init": -X[:1]}, "precisions_init must be positive"),
        ({"precisions_init": np.zeros((1, 3))}, "precisions_init must be positive"),
        ({"weights_init": [np.nan]}, "weights_init contains NaN"),
        ({"reg_covar": -1.0}, "reg_covar must be finite and >= 0"),
        ({"impl": "numpy"}, "impl must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianMixture(**options).fit(X)
    with pytest.raises(TypeError, match="n_components must be an integer, not str"):
        GaussianMixture("2").fit(X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="n_samples must be an integer, not float"):
        GaussianMixture().fit(X).sample(2.0)  # type: ignore[arg-type]


def test_without_scikit_learn() -> None:
    script = """
import sys
sys.modules["sklearn"] = sys.modules["numpy"] = None
import fastvae
try:
    import fastvae.sklearn
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 'fastvae.sklearn needs scikit-learn 1.6 or newer; pip install "fastvae-kernels[sklearn]"' in done.stdout
