"""Bad input: ValueError or TypeError that names the argument, what it got and what would be right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Encoder
from support import internals

import fastvae
from fastvae import VAE, MixturePrior, StandardNormalPrior, VampPrior

Z, MU, LOGVAR, WEIGHTS = torch.zeros(5, 3), torch.zeros(7, 3), torch.zeros(7, 3), torch.zeros(7)
META = torch.device("meta")
INDEX = torch.zeros(5, dtype=torch.int64)
OPERATIONS = [fastvae.mixture_log_prob, fastvae.mixture_log_prob_and_score]

# changed arguments, the error, words that its message must have
MIXTURE: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "z of another D": ({"z": torch.zeros(5, 4)}, ValueError, ["z must", "[..., 3]", "[5, 4]"]),
    "z without a dimension": ({"z": torch.zeros(())}, ValueError, ["z must", "[..., 3]", "[]"]),
    "no components": ({"mu": torch.zeros(0, 3)}, ValueError, ["mu must", "[0, 3]", "K >= 1"]),
    "no dimensions": (
        {"mu": torch.zeros(7, 0), "z": torch.zeros(5, 0)},
        ValueError,
        ["mu must", "D >= 1", "[7, 0]"],
    ),
    "mu with a batch": ({"mu": torch.zeros(2, 7, 3)}, ValueError, ["mu must", "[K, D]", "[2, 7, 3]"]),
    "mu of one dimension": ({"mu": torch.zeros(3)}, ValueError, ["mu must", "[K, D]", "[3]"]),
    "logvar of another K": ({"logvar": torch.zeros(6, 3)}, ValueError, ["logvar must", "[7, 3]", "[6, 3]"]),
    "logvar of another D": ({"logvar": torch.zeros(4)}, ValueError, ["logvar must", "3]", "[4]"]),
    "logvar [K]": ({"logvar": torch.zeros(7)}, ValueError, ["logvar must", "3]", "[7]"]),
    "logvar of more dimensions": ({"logvar": torch.zeros(1, 7, 3)}, ValueError, ["logvar must", "[1, 7, 3]"]),
    "weights of another K": ({"log_weights": torch.zeros(6)}, ValueError, ["log_weights must", "[7]", "[6]"]),
    "weights of two dimensions": (
        {"log_weights": torch.zeros(7, 1)},
        ValueError,
        ["log_weights", "[7]", "[7, 1]"],
    ),
    "integer z": ({"z": Z.long()}, TypeError, ["z must", "int64"]),
    "integer mu": ({"mu": MU.int()}, TypeError, ["mu must", "int32"]),
    "boolean logvar": ({"logvar": LOGVAR.bool()}, TypeError, ["logvar must", "bool"]),
    "complex weights": ({"log_weights": WEIGHTS.cfloat()}, TypeError, ["log_weights must", "complex64"]),
    "a list": ({"z": [[0.0, 0.0, 0.0]]}, TypeError, ["z must be a tensor", "list"]),
    "a number": ({"logvar": 0.0}, TypeError, ["logvar must be a tensor", "float"]),
    "mu elsewhere": ({"mu": MU.to(META)}, ValueError, ["mu is on meta", "z is on cpu"]),
    "weights elsewhere": ({"log_weights": WEIGHTS.to(META)}, ValueError, ["log_weights is on meta", "cpu"]),
    "exclude of another type": ({"exclude": INDEX.int()}, TypeError, ["exclude must", "int64", "int32"]),
    "floating exclude": ({"exclude": INDEX.float()}, TypeError, ["exclude must", "int64", "float32"]),
    "exclude of another shape": ({"exclude": INDEX[:4]}, ValueError, ["exclude must", "[5]", "[4]"]),
    "exclude not a tensor": ({"exclude": 3}, TypeError, ["exclude must be a tensor", "int"]),
    "exclude above K": ({"exclude": INDEX + 7}, ValueError, ["exclude must", "-1 ... 6", "7"]),
    "exclude below -1": ({"exclude": INDEX - 2}, ValueError, ["exclude must", "-1 ... 6", "-2"]),
    "exclude elsewhere": ({"exclude": INDEX.to(META)}, ValueError, ["exclude is on meta", "cpu"]),
    "unknown precision": ({"precision": "low"}, ValueError, ["precision must", "'highest'", "'low'"]),
    "unknown impl": ({"impl": "fast"}, ValueError, ["impl must", "'composite'", "'fast'"]),
}


def raises(error: type[Exception], words: list[str], call: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", MIXTURE)
def test_mixture(operation: Any, case: str) -> None:
    changed, error, words = MIXTURE[case]
    good: dict[str, Any] = {"z": Z, "mu": MU, "logvar": LOGVAR, "log_weights": WEIGHTS}
    operation(**good)
    raises(error, words, operation, **{**good, **changed})


@pytest.mark.parametrize("impl", ["reference", "composite"])
def test_every_backend_checks(impl: str) -> None:
    """Validation is in front of all of them."""
    raises(ValueError, ["z must"], fastvae.mixture_log_prob, torch.zeros(5, 4), MU, LOGVAR, impl=impl)
    raises(ValueError, ["mu must"], fastvae.gaussian_kl, torch.zeros(5, 0), torch.zeros(()), impl=impl)


GAUSSIAN: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "integer mu": ({"mu": Z.long()}, TypeError, ["mu must", "int64"]),
    "integer logvar": ({"logvar": Z.long()}, TypeError, ["logvar must", "int64"]),
    "a number": ({"logvar": 0.0}, TypeError, ["logvar must be a tensor", "float"]),
    "no dimensions": ({"mu": torch.zeros(5, 0)}, ValueError, ["mu must", "D >= 1", "[5, 0]"]),
    "a scalar mu": ({"mu": torch.zeros(())}, ValueError, ["mu must", "[..., D]", "[]"]),
    "logvar of another shape": (
        {"logvar": torch.zeros(5, 4)},
        ValueError,
        ["logvar must", "[5, 3]", "[5, 4]"],
    ),
    "a larger logvar": ({"logvar": torch.zeros(2, 5, 3)}, ValueError, ["logvar must", "[5, 3]", "[2, 5, 3]"]),
    "logvar elsewhere": ({"logvar": Z.to(META)}, ValueError, ["logvar is on meta", "mu is on cpu"]),
    "unknown impl": ({"impl": "fast"}, ValueError, ["impl must", "'fast'"]),
}


@pytest.mark.parametrize("operation", [fastvae.gaussian_rsample, fastvae.gaussian_kl])
@pytest.mark.parametrize("case", GAUSSIAN)
def test_gaussian(operation: Any, case: str) -> None:
    changed, error, words = GAUSSIAN[case]
    raises(error, words, operation, **{"mu": Z, "logvar": Z, **changed})


@pytest.mark.parametrize(
    ("num_samples", "error"),
    [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)],
)
def test_num_samples(num_samples: Any, error: type[Exception]) -> None:
    raises(error, ["num_samples must"], fastvae.gaussian_rsample, Z, Z, num_samples)
    raises(error, ["num_samples must"], fastvae.mixture_kl, Z, Z, MU, LOGVAR, None, num_samples)


def test_mixture_kl_names_its_own_arguments() -> None:
    """prior_mu and prior_logvar: a message about mu would point at the posterior."""
    raises(ValueError, ["prior_mu must", "[7, 4]"], fastvae.mixture_kl, Z, Z, torch.zeros(7, 4), torch.zeros(()))
    raises(ValueError, ["prior_logvar must", "[6, 3]"], fastvae.mixture_kl, Z, Z, MU, torch.zeros(6, 3))
    raises(TypeError, ["prior_mu must", "int64"], fastvae.mixture_kl, Z, Z, MU.long(), LOGVAR)
    raises(ValueError, ["exclude must", "[4]"], fastvae.mixture_kl, Z, Z, MU, LOGVAR, None, 2, exclude=INDEX[:4])


@pytest.mark.parametrize("impl", ["triton"])
def test_a_named_backend_that_cannot_run_raises(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says what would run."""
    internals.pretend(monkeypatch, "triton", missing="it is not there")
    for operation, args in (
        (fastvae.mixture_log_prob, (Z, MU, LOGVAR)),
        (fastvae.gaussian_rsample, (Z, Z)),
        (fastvae.gaussian_kl, (Z, Z)),
    ):
        raises(RuntimeError, [repr(impl), "composite"], operation, *args, impl=impl)


def test_the_compiled_backend_takes_cpu_tensors_only() -> None:
    raises(ValueError, ["impl='cpu'", "meta"], fastvae.gaussian_kl, Z.to(META), Z.to(META), impl="cpu")


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """impl='cpu' raises and says how to build it, None takes composite, and info() says so aloud."""
    internals.pretend_no_extension(monkeypatch, "the extension was not built")
    raises(RuntimeError, ["impl='cpu'", "not built", "pip install"], fastvae.gaussian_kl, Z, Z, impl="cpu")
    assert internals.choose(None, torch.device("cpu")) == "composite"
    assert fastvae.info()["extension"] == "missing" and "not built" in str(fastvae.info())


@pytest.mark.usefixtures("compiled")
def test_an_unknown_instruction_set_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt FASTVAE_CPU_ISA must not run something else in silence."""
    monkeypatch.setenv("FASTVAE_CPU_ISA", "avx1024")
    raises(RuntimeError, ["FASTVAE_CPU_ISA", "avx1024"], fastvae.mixture_log_prob, Z, MU, LOGVAR, impl="cpu")


@pytest.mark.usefixtures("compiled")
def test_the_default_is_the_compiled_backend() -> None:
    assert internals.choose(None, torch.device("cpu")) == "cpu"
    info = fastvae.info()
    assert info["extension"] == "built" and torch.ops.fastvae.cpu_isa() in info["impl='cpu'"]


def test_impl_none_elsewhere_and_info() -> None:
    """The table behind impl=None, and what is printed."""
    assert internals.choose(None, META) == "composite"
    for impl in ("reference", "composite"):
        assert internals.choose(impl, torch.device("cpu")) == impl
    info = fastvae.info()
    assert info["fastvae"] == fastvae.__version__ and info["torch"] == torch.__version__
    assert all(key in str(info) and value in str(info) for key, value in info.items())


def test_priors() -> None:
    encoder = Encoder()
    raises(ValueError, ["latent_dim", "0"], StandardNormalPrior, 0)
    raises(ValueError, ["mu must", "[3]"], MixturePrior, torch.zeros(3))
    raises(ValueError, ["mu must", "int64"], MixturePrior, MU.long())
    raises(ValueError, ["pseudo_inputs must", "[6]"], VampPrior, encoder, torch.zeros(6))
    raises(ValueError, ["pseudo_inputs must", "[0, 6]"], VampPrior, encoder, torch.zeros(0, 6))
    raises(ValueError, ["pseudo_inputs must", "uint8"], VampPrior, encoder, torch.zeros(5, 6, dtype=torch.uint8))
    raises(
        ValueError,
        ["value_range", "(1.0, 0.0)"],
        VampPrior,
        encoder,
        torch.zeros(5, 6),
        value_range=(1.0, 0.0),
    )
    raises(ValueError, ["chunk_size", "0"], VampPrior, encoder, torch.zeros(5, 6), chunk_size=0)


def test_vae() -> None:
    encoder, decoder = Encoder(), torch.nn.Linear(3, 6)
    raises(ValueError, ["encoder"], VAE, Encoder(), decoder, VampPrior(encoder, torch.zeros(5, 6)))
    prior = StandardNormalPrior(3)
    raises(ValueError, ["likelihood must", "bernoulli", "'binomial'"], VAE, encoder, decoder, prior, "binomial")
    model = VAE(encoder, decoder, prior)
    raises(ValueError, ["kl must", "'closed'"], model.elbo, torch.zeros(2, 6), kl="closed")
    raises(ValueError, ["num_samples", "0"], model.log_likelihood, torch.zeros(2, 6), 0)
