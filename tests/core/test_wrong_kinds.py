"""What is no dense tensor, and groups that number nothing: the errors that the docstrings promise, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastvae

Z, MU, LOGVAR, WEIGHTS = torch.zeros(5, 3), torch.zeros(7, 3), torch.zeros(7, 3), torch.zeros(7)
GROUPS = torch.zeros(7, dtype=torch.int64)
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "mixture_log_prob": (fastvae.mixture_log_prob, {"z": Z, "mu": MU, "logvar": LOGVAR, "log_weights": WEIGHTS}),
    "mixture_log_prob_and_score": (
        fastvae.mixture_log_prob_and_score,
        {"z": Z, "mu": MU, "logvar": LOGVAR, "log_weights": WEIGHTS},
    ),
    "mixture_marginal_log_prob": (
        fastvae.mixture_marginal_log_prob,
        {"z": Z, "mu": MU, "logvar": LOGVAR, "log_weights": WEIGHTS},
    ),
    "total_correlation": (fastvae.total_correlation, {"z": Z, "mu": MU, "logvar": LOGVAR, "log_weights": WEIGHTS}),
    "decompose_kl": (
        fastvae.decompose_kl,
        {"z": Z, "log_q": Z[:, 0], "mu": MU, "logvar": LOGVAR, "log_weights": WEIGHTS},
    ),
    "mixture_responsibilities": (
        fastvae.mixture_responsibilities,
        {"z": Z, "mu": MU, "logvar": LOGVAR, "log_weights": WEIGHTS},
    ),
    "gaussian_rsample": (fastvae.gaussian_rsample, {"mu": Z, "logvar": Z}),
    "gaussian_kl": (fastvae.gaussian_kl, {"mu": Z, "logvar": Z}),
    "mixture_kl": (
        fastvae.mixture_kl,
        {"mu": Z, "logvar": Z, "prior_mu": MU, "prior_logvar": LOGVAR, "log_weights": WEIGHTS},
    ),
    "grouped_mixture_log_prob": (
        fastvae.grouped_mixture_log_prob,
        {"z": Z, "mu": MU, "logvar": LOGVAR, "groups": GROUPS, "log_weights": WEIGHTS},
    ),
}
ARGUMENTS = [(name, argument) for name, (_, arguments) in CALLS.items() for argument in arguments]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_no_tensor(name: str, argument: str) -> None:
    call, arguments = CALLS[name]
    call(**arguments)
    wrong: list[Any] = [[0.0], 1.0, "tensor"]
    if argument != "log_weights":
        wrong.append(None)
    for value in wrong:
        with pytest.raises(TypeError, match=f"{argument} must be a tensor, not {type(value).__name__}"):
            call(**{**arguments, argument: value})


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_sparse_tensors(name: str, argument: str) -> None:
    call, arguments = CALLS[name]
    value = arguments[argument]
    for sparse in (value.to_sparse(), value.to_sparse_csr() if value.ndim == 2 else value.to_sparse()):
        with pytest.raises(TypeError, match=f"{argument} must be a dense tensor, not torch.sparse"):
            call(**{**arguments, argument: sparse})


def test_exclude() -> None:
    arguments = CALLS["mixture_log_prob"][1]
    for value, words in (
        (torch.zeros(5, dtype=torch.int64).to_sparse(), "exclude must be a dense tensor"),
        ([0] * 5, "exclude must be a tensor, not list"),
    ):
        with pytest.raises(TypeError, match=words):
            fastvae.mixture_log_prob(**arguments, exclude=value)


def test_groups_that_number_nothing() -> None:
    """2^40 is an identifier and no number of a group: a result with a column for each would fill the machine."""
    arguments = CALLS["grouped_mixture_log_prob"][1]
    groups = GROUPS.clone()
    groups[3] = 2**40
    with pytest.raises(ValueError, match=r"groups must be numbered from 0.*1099511627776.*torch.unique"):
        fastvae.grouped_mixture_log_prob(**{**arguments, "groups": groups})
    for num_groups, error, words in (
        (0, ValueError, "num_groups must be at least 1"),
        (2.0, TypeError, "num_groups must be an integer"),
        (True, TypeError, "num_groups must be an integer"),
    ):
        with pytest.raises(error, match=words):
            fastvae.grouped_mixture_log_prob(**arguments, num_groups=num_groups)
    groups[3] = 1000  # empty groups are fine: their density is zero
    assert fastvae.grouped_mixture_log_prob(**{**arguments, "groups": groups}).shape == (5, 1001)
