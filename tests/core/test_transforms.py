"""torch.func: vmap and grad give what loops and autograd give; what is not there raises and names what has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

import fastvae

B, M, K, D = 6, 4, 5, 3
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own

Operation = Callable[..., Tensor]


def log_prob(z: Tensor, mu: Tensor, impl: str) -> Tensor:
    return fastvae.mixture_log_prob(z, mu, 0.1 * mu, torch.log_softmax(mu.sum(-1), 0), impl=impl)


def shared(z: Tensor, mu: Tensor, impl: str) -> Tensor:
    return fastvae.mixture_log_prob(z, mu, mu[0], impl=impl)


def excluding(z: Tensor, mu: Tensor, impl: str) -> Tensor:
    return fastvae.mixture_log_prob(z, mu, 0.1 * mu, exclude=(z[..., 0] > 0).long(), impl=impl)


def score(z: Tensor, mu: Tensor, impl: str) -> Tensor:
    return fastvae.mixture_log_prob_and_score(z, mu, 0.1 * mu, impl=impl)[0]


def closed_form(z: Tensor, mu: Tensor, impl: str) -> Tensor:
    return fastvae.gaussian_kl(z, mu.mean(0), impl=impl)


def grouped(z: Tensor, mu: Tensor, impl: str) -> Tensor:
    groups = torch.tensor([0, 2, 2, 0, 3])
    return fastvae.grouped_mixture_log_prob(z, mu, 0.1 * mu, groups, impl=impl)[..., 2]


def marginal(z: Tensor, mu: Tensor, impl: str) -> Tensor:
    return fastvae.mixture_marginal_log_prob(z, mu, 0.1 * mu, impl=impl)[..., 1]


def sample(z: Tensor, mu: Tensor, impl: str) -> Tensor:
    x, log_q = fastvae.gaussian_rsample(z, 0.1 * z + mu.mean(0), 2, impl=impl)
    return x.sum(-1) + log_q


def sampled_kl(z: Tensor, mu: Tensor, impl: str) -> Tensor:
    x, kl = fastvae.mixture_kl(z, mu.mean(0), mu, 0.1 * mu, impl=impl)
    return x.sum(-1) + kl


DENSITIES: list[Operation] = [log_prob, shared, excluding, score, closed_form, grouped, marginal]
SAMPLERS: list[Operation] = [sample, sampled_kl]


@pytest.fixture(params=["composite", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("compiled")
    return request.param


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(B, M, D), torch.randn(K, D)


def gradients(operation: Operation, z: Tensor, mu: Tensor, impl: str) -> tuple[Tensor, ...]:
    z, mu = z.clone().requires_grad_(), mu.clone().requires_grad_()
    return torch.autograd.grad(operation(z, mu, impl).sum(), (z, mu))


@pytest.mark.parametrize("operation", DENSITIES)
def test_vmap_is_the_loop(operation: Operation, backend: str) -> None:
    z, mu = inputs()
    want = torch.stack([operation(one, mu, backend) for one in z])
    torch.testing.assert_close(vmap(lambda one: operation(one, mu, backend))(z), want)
    across = vmap(lambda one: operation(one, mu, backend), in_dims=1, out_dims=1)(z.movedim(0, 1).contiguous())
    torch.testing.assert_close(across.movedim(1, 0), want)
    every_mu = torch.stack([mu + b for b in range(B)])
    want = torch.stack([operation(one, of_one, backend) for one, of_one in zip(z, every_mu, strict=True)])
    torch.testing.assert_close(vmap(lambda one, of_one: operation(one, of_one, backend))(z, every_mu), want)


@pytest.mark.parametrize("operation", DENSITIES)
def test_gradients_of_each_of_a_batch(operation: Operation, backend: str) -> None:
    """grad within vmap, in the rows and in the parameters; and grad around vmap."""
    z, mu = inputs()

    def total(one: Tensor, mu: Tensor) -> Tensor:
        return operation(one, mu, backend).sum()

    want = [gradients(operation, one, mu, backend) for one in z]
    got = vmap(grad(total, argnums=(0, 1)), in_dims=(0, None))(z, mu)
    for i in range(2):
        torch.testing.assert_close(got[i], torch.stack([g[i] for g in want]))
    torch.testing.assert_close(vmap(grad(total), in_dims=(0, None))(z, mu), got[0])
    around = grad(lambda mu: vmap(total, in_dims=(0, None))(z, mu).sum())(mu)
    torch.testing.assert_close(around, got[1].sum(0), rtol=1e-4, atol=1e-5)


def test_jacobian_is_the_score(backend: str) -> None:
    z, mu = inputs()
    jacobian = jacrev(lambda z: log_prob(z, mu, backend))(z[0])  # [M, M, D]
    want = gradients(log_prob, z[0], mu, backend)[0]
    torch.testing.assert_close(jacobian, torch.diag_embed(want.T).permute(1, 2, 0))


@pytest.mark.parametrize("operation", SAMPLERS)
def test_samplers(operation: Operation, backend: str) -> None:
    """The noise of vmap follows its `randomness`; gradients are those of the same seed."""
    z, mu = inputs()
    same = vmap(lambda one: operation(one, mu, backend), randomness="same")(z[:1].expand(B, M, D))
    torch.testing.assert_close(same, same[:1].expand_as(same))
    different = vmap(lambda one: operation(one, mu, backend), randomness="different")(z[:1].expand(B, M, D))
    assert not torch.isclose(different[0], different[1]).any()
    torch.manual_seed(5)
    got = grad(lambda z, mu: operation(z, mu, backend).sum(), argnums=(0, 1))(z[0], mu)
    torch.manual_seed(5)
    for g, w in zip(got, gradients(operation, z[0], mu, backend), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("operation", DENSITIES + SAMPLERS)
def test_what_is_not_there_raises(operation: Operation, backend: str) -> None:
    """A tangent or a second derivative is never lost in silence, and the error names what has it."""
    z, mu = inputs()

    def total(z: Tensor, impl: str = backend) -> Tensor:
        return operation(z, mu, impl).sum()

    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"jvp.*impl='reference'"):
        total(forward_ad.make_dual(z, z))
    with pytest.raises(NotImplementedError, match=r"jvp.*impl='reference'"):
        jvp(total, (z,), (z,))
    with pytest.raises(RuntimeError, match=r"differentiated once.*impl='reference'"):
        grad(lambda z: grad(total)(z).square().sum())(z)
    if operation in DENSITIES:  # a sampler's noise has no place in the Hessian's vmap
        with pytest.raises((NotImplementedError, RuntimeError), match="impl='reference'"):
            hessian(total)(z[0])


def test_reference_has_what_the_kernels_lack() -> None:
    z, mu = inputs()

    def total(z: Tensor) -> Tensor:
        return log_prob(z, mu, "reference").sum()

    assert hessian(total)(z[0]).abs().sum() > 0
    value, tangent = jvp(total, (z,), (z,))
    torch.testing.assert_close(tangent, (gradients(log_prob, z, mu, "reference")[0] * z).sum())
    assert value == total(z)


def test_no_transform_no_tangent_no_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a transform the Functions of torch.func, ten times as slow to call, are not met."""
    from fastvae import transforms

    def forbidden(*_: Any) -> None:
        raise AssertionError("a Function for torch.func was called")

    monkeypatch.setattr(transforms, "call", forbidden)
    z, mu = inputs()
    for operation in DENSITIES + SAMPLERS:
        gradients(operation, z, mu, "composite")
        with forward_ad.dual_level():  # no argument has a tangent
            operation(z, mu, "composite")
    with pytest.raises(AssertionError, match=r"torch\.func"):
        vmap(lambda one: log_prob(one, mu, "composite"))(z)
