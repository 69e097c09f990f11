"""The gradients of a mixture's samples: one by one against the conditional distribution functions, and on average."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from fastvae.distributions import MixtureOfDiagNormals, batches, pathwise

Parameters = tuple[Tensor, Tensor, Tensor]


def overlapping(K: int, D: int, spread: float = 1.0) -> Parameters:
    """locs, scale and normalised log weights, float64."""
    torch.manual_seed(K + D)
    locs, scale = spread * torch.randn(K, D).double(), 0.4 + torch.rand(K, D).double()
    return locs, scale, torch.randn(K).double().log_softmax(0)


def conditional_cdfs(z: Tensor, locs: Tensor, scale: Tensor, log_weights: Tensor) -> Tensor:
    """S_d(z) = P(Z_d <= z_d | z_1 ... z_(d-1)) of one point z [D]: [D]."""
    found = []
    for d in range(len(z)):
        normal = Normal(locs[:, d], scale[:, d])
        found.append((log_weights.softmax(0) * normal.cdf(z[d])).sum())
        log_weights = log_weights + normal.log_prob(z[d])
    return torch.stack(found)


def gradients(grad: Tensor, z: Tensor, given: Parameters) -> Parameters:
    """Those of the samples z [M, D] by fastvae."""
    locs, scale, log_weights = given
    found = pathwise._gradients(grad[None], z[None], locs[None], scale[None], log_weights[None], True, True, True)
    return tuple(g[0] for g in found)  # type: ignore[return-value]


@pytest.mark.parametrize(("K", "D", "spread"), [(2, 1, 1.0), (1, 3, 1.0), (3, 2, 1.0), (5, 4, 2.0), (8, 6, 1.0)])
def test_the_weights_hold_the_conditional_distribution_functions(K: int, D: int, spread: float) -> None:
    """dz / dlog w = -(dS/dz)^-1 dS/dlog w, with the matrices in full."""
    given = overlapping(K, D, spread)
    z = MixtureOfDiagNormals(*given).sample((6,))
    grad = torch.randn_like(z)
    wanted = torch.zeros(K, dtype=torch.float64)
    for point, g in zip(z, grad, strict=True):
        of_z, _, _, of_weights = torch.autograd.functional.jacobian(conditional_cdfs, (point, *given))
        wanted -= torch.linalg.solve(of_z, of_weights).T @ g
    torch.testing.assert_close(gradients(grad, z, given)[2], wanted, rtol=1e-11, atol=1e-12)


def moved(z: Tensor, kept: Tensor, given: Parameters) -> Tensor:
    """The point, near z [D], whose conditional distribution functions are `kept`, by Newton's method."""
    for _ in range(20):
        slope = torch.autograd.functional.jacobian(lambda z: conditional_cdfs(z, *given), z)
        z = z - torch.linalg.solve(slope, conditional_cdfs(z, *given) - kept)
    return z


@pytest.mark.parametrize(("K", "D"), [(3, 1), (3, 2)])
def test_finite_differences(K: int, D: int) -> None:
    """Of the map from uniform numbers to z: in the weights, and in one dimension in all parameters."""
    given = overlapping(K, D)
    (z,) = MixtureOfDiagNormals(*given).sample((1,))
    grad = torch.randn_like(z)
    found = gradients(grad[None], z[None], given)
    kept, h = conditional_cdfs(z, *given), 1e-5
    for which in range(3) if D == 1 else [2]:
        for i in range(given[which].numel()):
            step = torch.zeros_like(given[which]).flatten()
            step[i] = h
            ends = []
            for sign in (1, -1):
                changed = list(given)
                changed[which] = given[which] + sign * step.view_as(given[which])
                ends.append(moved(z, kept, tuple(changed)))  # type: ignore[arg-type]
            difference = grad @ (ends[0] - ends[1]) / (2 * h)
            torch.testing.assert_close(found[which].flatten()[i], difference, rtol=1e-6, atol=1e-8)


def test_one_component_is_a_normal() -> None:
    locs, scale = torch.randn(1, 4, dtype=torch.float64), 0.5 + torch.rand(1, 4, dtype=torch.float64)
    given = locs.requires_grad_(), scale.requires_grad_(), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    z = MixtureOfDiagNormals(*given).rsample((7,))
    noise = ((z - locs) / scale).detach()
    grad = torch.randn_like(z)
    wanted = torch.autograd.grad(locs + scale * noise, given[:2], grad)
    found = torch.autograd.grad(z, given, grad)
    torch.testing.assert_close(found[:2], wanted)
    torch.testing.assert_close(found[2], torch.zeros_like(found[2]), rtol=0, atol=1e-12)


def exact_in_one_dimension(z: float, locs: list[float], scale: list[float], weights: list[float]) -> list[list[float]]:
    """dz / d(mu, sigma, log w)_k = -dF/dphi / p, by 700 digits; log w are normalised after they have moved."""
    with mpmath.workdps(700):
        n = [mpmath.npdf(z, m, s) for m, s in zip(locs, scale, strict=True)]
        above = [mpmath.erfc((mpmath.mpf(z) - m) / s / mpmath.sqrt(2)) / 2 for m, s in zip(locs, scale, strict=True)]
        p = mpmath.fsum(w * f for w, f in zip(weights, n, strict=True))
        total = mpmath.fsum(w * q for w, q in zip(weights, above, strict=True))
        r = [w * f / p for w, f in zip(weights, n, strict=True)]
        t = [(z - m) / s for m, s in zip(locs, scale, strict=True)]
        of_weights = [w * (q - total) / p for w, q in zip(weights, above, strict=True)]
        return [[float(v) for v in row] for row in (r, [a * b for a, b in zip(r, t, strict=True)], of_weights)]


@pytest.mark.parametrize("z", [-36.0, -20.0, -5.0, -0.5, 3.0, 9.5, 12.0, 18.0, 25.0, 41.0])
def test_tails(z: float) -> None:
    """Far out on either side and between the components, where Phi is 0 or 1 to all digits that float64 has."""
    locs, scale, weights = [0.0, 20.0], [1.0, 0.75], [0.25, 0.75]
    given = tuple(torch.tensor(v, dtype=torch.float64).view(2, -1) for v in (locs, scale, weights))
    found = gradients(
        torch.ones(1, 1, dtype=torch.float64),
        torch.full((1, 1), z).double(),
        (given[0], given[1], given[2][:, 0].log()),
    )
    wanted = exact_in_one_dimension(z, locs, scale, weights)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.flatten(), torch.tensor(other, dtype=torch.float64), rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("z", [-10.0, -4.0, 0.1, 3.5, 5.0, 7.0, 13.0])
def test_tails_in_float32(z: float) -> None:
    locs, scale, weights = [0.0, 8.0], [1.0, 0.75], [0.25, 0.75]
    given = tuple(torch.tensor(v).view(2, -1) for v in (locs, scale, weights))
    found = gradients(torch.ones(1, 1), torch.full((1, 1), z), (given[0], given[1], given[2][:, 0].log()))
    wanted = exact_in_one_dimension(z, locs, scale, weights)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.flatten(), torch.tensor(other), rtol=1e-4, atol=1e-30)


def test_a_component_farther_away_than_float32_reaches() -> None:
    """Its responsibility is 0, and its t would be infinite: 0 times infinity must not arise."""
    locs, scale = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 1.0], [1e-40, 1.0]])
    found = gradients(torch.ones(3, 2), 0.1 * torch.ones(3, 2), (locs, scale, torch.tensor([0.5, 0.5]).log()))
    torch.testing.assert_close(found[0], torch.tensor([[3.0, 3.0], [0.0, 0.0]]))
    assert all(bool(g.isfinite().all()) for g in found)


def test_float32_beside_float64() -> None:
    given = overlapping(200, 20, spread=2.0)
    z = MixtureOfDiagNormals(*given).sample((50,))
    grad = torch.randn_like(z)
    wanted = gradients(grad, z, given)
    found = gradients(grad.float(), z.float(), tuple(p.float() for p in given))  # type: ignore[arg-type]
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) < 2e-5 * float(other.abs().max())


def test_a_component_that_a_dimension_makes_small_and_the_next_one_large_again() -> None:
    """Its log pi falls to -5000 and comes back: to subtract what was added would leave no digit in float32."""
    locs = torch.tensor([[0.0, 0.0, 0.0], [100.0, 100.0, 0.5]]).double()
    given = locs, torch.ones(2, 3).double(), torch.tensor([0.5, 0.5]).double().log()
    z, grad = torch.tensor([[0.0, 100.0, 0.3]]).double(), torch.tensor([[0.0, 0.0, 1.0]]).double()
    narrow = gradients(grad.float(), z.float(), tuple(p.float() for p in given))  # type: ignore[arg-type]
    for one, other in zip(narrow[:2], gradients(grad, z, given)[:2], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def polynomial(z: Tensor) -> Tensor:
    return z.square().sum(-1) + z[..., 0] * z[..., -1] ** 2 - 2 * z[..., 0]


def expected_polynomial(q: MixtureOfDiagNormals) -> Tensor:
    """E[polynomial(z)], for D >= 2, by the moments of the components."""
    mu, square = q.locs, q.locs.square() + q.coord_scale.square()
    of_components = square.sum(-1) + mu[..., 0] * square[..., -1] - 2 * mu[..., 0]
    return (q.log_weights.exp() * of_components).sum(-1)


def directions(K: int, D: int) -> Parameters:
    """Along which gradients of many components are compared, each of which has a share of 1 / K."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*shape, generator=generator).double() for shape in ((K, D), (K, D), (K,)))  # type: ignore[return-value]


@pytest.mark.parametrize(("K", "samples", "rounds"), [(4, 4000, 40), (300, 1000, 30), (10_000, 100, 20)])
def test_mean_gradients_are_those_of_the_mean(K: int, samples: int, rounds: int) -> None:
    """In locs, scales and logits, of a polynomial whose mean is known.  K = 4: each number of them."""
    D = 2
    locs, scale, log_weights = overlapping(K, D)
    given = [p.requires_grad_() for p in (locs, scale, 3 + log_weights)]
    q = MixtureOfDiagNormals(*given)
    along = directions(K, D)

    def numbers(found: tuple[Tensor, ...]) -> Tensor:
        if K == 4:
            return torch.cat([g.flatten() for g in found])
        return torch.stack([(g * v).sum() for g, v in zip(found, along, strict=True)])

    wanted = numbers(torch.autograd.grad(expected_polynomial(q), given))
    rows = [numbers(torch.autograd.grad(polynomial(q.rsample((samples,))).mean(), given)) for _ in range(rounds)]
    found = torch.stack(rows)
    error = found.std(0) / math.sqrt(rounds)
    assert bool((error < 0.2 * (0.02 + found.abs().max())).all())  # it says something
    assert bool(((found.mean(0) - wanted).abs() < 5 * error).all())


def test_batches_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtures of a batch, weights by rows, and blocks of any size: the gradients are those one by one."""
    torch.manual_seed(0)
    locs, scale = torch.randn(5, 3).double(), 0.4 + torch.rand(2, 1, 5, 3).double()
    given = [p.requires_grad_() for p in (locs, scale, torch.randn(4, 5).double())]
    q = MixtureOfDiagNormals(*given)  # batch shape [2, 4]
    for chunk in (1, 40, 10**6):
        monkeypatch.setattr(batches, "chunk_on", lambda device, itemsize, chunk=chunk: chunk)
        torch.manual_seed(1)
        z = q.rsample((6,))
        grad = torch.randn_like(z)
        found = torch.autograd.grad(z, given, grad)
        wanted = [torch.zeros_like(p) for p in given]
        for i in range(2):
            for j in range(4):
                log_weights = given[2][j].log_softmax(0)
                of_locs, of_scale, of_weights = gradients(
                    grad[:, i, j], z[:, i, j].detach(), (locs.detach(), scale[i, 0].detach(), log_weights.detach())
                )
                (of_logits,) = torch.autograd.grad(log_weights, given[2], of_weights)
                wanted[0] += of_locs
                wanted[1][i, 0] += of_scale
                wanted[2] += of_logits
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("which", range(3))
def test_one_gradient_alone(which: int) -> None:
    given = list(overlapping(4, 3))
    q = MixtureOfDiagNormals(*given)
    torch.manual_seed(2)
    z = q.sample((5,))
    wanted = gradients(torch.ones_like(z), z, q_parameters(q))[which]
    given[which].requires_grad_()
    torch.manual_seed(2)
    (found,) = torch.autograd.grad(MixtureOfDiagNormals(*given).rsample((5,)).sum(), given[which])
    torch.testing.assert_close(found, wanted - (wanted.sum() * given[2].exp() if which == 2 else 0))


def q_parameters(q: MixtureOfDiagNormals) -> Parameters:
    return q.locs, q.coord_scale, q.log_weights


def test_differentiable_once_and_usable_in_place() -> None:
    locs, scale, log_weights = overlapping(3, 2)
    z = MixtureOfDiagNormals(locs.requires_grad_(), scale, log_weights).rsample((4,))
    (first,) = torch.autograd.grad(z.square().sum(), locs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        first.sum().backward()
    z = MixtureOfDiagNormals(locs, scale, log_weights).rsample((4,))
    z.mul_(2.0)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), locs)[0].sum(), torch.tensor(16.0).double())


def test_opcheck() -> None:
    for B, R, shared in ((1, 4, True), (3, 2, False), (2, 0, True)):
        own = 1 if shared else B
        arguments = torch.randn(B, R, 3), torch.randn(B, R, 3), torch.randn(own, 5, 3), 0.5 + torch.rand(own, 1, 3)
        for need in ((True, True, True), (False, True, False)):
            torch.library.opcheck(
                torch.ops.fastvae.mixture_samples_backward.default,
                (*arguments, torch.randn(B, 5).log_softmax(-1), *need),
            )
