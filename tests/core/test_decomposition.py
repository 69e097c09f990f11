"""Total correlation and the parts of the KL: against Gaussians with known ones, and sums over all components."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import fastvae
from fastvae import AggregatedPosterior, decompose_kl, total_correlation


def densities(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z_d; n), [M, N, D]."""
    return Normal(mu, (0.5 * logvar).exp()).log_prob(z[:, None])


def by_hand(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """(log q(z), sum_d log q(z_d)) with weights [M, N] or [N], holding [M, N, D] numbers."""
    each = densities(z, mu, logvar)
    joint = (each.sum(-1) + log_weights).logsumexp(-1)
    return joint, (each + log_weights[..., None]).logsumexp(-2).sum(-1)


class Correlated:
    """q(z | x_n) = N(m_n, s2 I) of m_n ~ N(0, C), with C = (1 - r) I + r: for large N, q(z) = N(0, C + s2 I)."""

    s2 = 0.1

    def __init__(self, r: float, D: int, N: int, dtype: torch.dtype = torch.float64) -> None:
        rng = torch.Generator().manual_seed(5)
        self.r = torch.tensor(r, dtype=dtype, requires_grad=True)
        C = (1 - self.r) * torch.eye(D, dtype=dtype) + self.r
        self.mu = torch.randn(N, D, generator=rng, dtype=dtype) @ torch.linalg.cholesky(C).T
        self.logvar = torch.full((D,), math.log(self.s2), dtype=dtype)
        covariance = C + self.s2 * torch.eye(D, dtype=dtype)
        self.total_correlation = 0.5 * (covariance.diagonal().log().sum() - torch.logdet(covariance))

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """(z [count, D], log q(z | x_n) [count]) with n uniform."""
        index = torch.randint(len(self.mu), (count,))
        return fastvae.gaussian_rsample(self.mu[index], self.logvar)


def test_a_known_total_correlation_and_its_gradient(compiled: None) -> None:
    """Value and d TC / dr of the closed form; with constant components the gradient is the same, on average."""
    known = Correlated(0.6, D=3, N=20_000)
    (want,) = torch.autograd.grad(known.total_correlation, known.r, retain_graph=True)
    z, _ = known.draw(6_000)
    values = total_correlation(z, known.mu.detach(), known.logvar)
    error = float(values.detach().std()) / math.sqrt(len(z))
    assert error < 0.02
    assert abs(float((values.mean() - known.total_correlation).detach())) < 5 * error + 0.01
    gradients = torch.stack(
        [torch.autograd.grad(part.mean(), known.r, retain_graph=True)[0] for part in values.split(200)]
    )
    error = float(gradients.std()) / math.sqrt(len(gradients))
    assert error < 0.05 * float(want)
    assert abs(float(gradients.mean() - want)) < 5 * error


def test_which_components_may_be_constants() -> None:
    """Unbiased: gradients by way of all components, or of none.  Biased: by way of those that a row's batch holds."""
    N, B, D, draws = 6, 2, 2, 50_000
    mu = torch.randn(N, D, dtype=torch.float64)
    logvar = torch.full((N, D), -0.5, dtype=torch.float64, requires_grad=True)
    batch = torch.rand(draws, N).argsort(1)[:, :B]  # [draws, B] of N without repetition

    def of_batch_alone(z: Tensor, rows: Tensor) -> Tensor:
        held = (rows[..., None] == torch.arange(N)).any(1)[:, None, :, None]  # [draws, 1, N, 1]
        each = Normal(mu, torch.exp(0.5 * torch.where(held, logvar, logvar.detach()))).log_prob(z[..., None, :])
        return each.sum(-1).logsumexp(-1) - each.logsumexp(-2).sum(-1)  # but for a constant

    def gradient(values: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Of the mean over draws, in logvar [N, D], and its standard error."""
        parts = []
        for rows in batch.chunk(50):
            z, _ = fastvae.gaussian_rsample(mu[rows], logvar[rows])  # [draws, B, D]
            parts += torch.autograd.grad(values(z, rows).mean(), logvar)
        gradients = torch.stack(parts)
        return gradients.mean(0), gradients.std(0) / math.sqrt(len(gradients))

    def agree(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
        """The largest difference in standard errors."""
        return float(((one[0] - other[0]).abs() / (one[1].square() + other[1].square()).sqrt()).max())

    full = gradient(lambda z, _: total_correlation(z, mu, logvar))
    path = gradient(lambda z, _: total_correlation(z, mu, logvar.detach()))
    of_batch = gradient(of_batch_alone)
    assert agree(full, (torch.zeros(()), full[1])) > 20, "no gradient that chance does not explain"
    assert agree(full, path) < 5
    assert agree(full, of_batch) > 8


@pytest.mark.parametrize("impl", ["composite", "cpu"])
def test_sums_over_all_components(impl: str, request: pytest.FixtureRequest) -> None:
    """Values and gradients of all three parts in all arguments."""
    if impl == "cpu":
        request.getfixturevalue("compiled")
    N, D, M = 30, 4, 11
    leaves = [torch.randn(M, D), torch.randn(M), torch.randn(N, D), 0.5 * torch.randn(N, D), torch.randn(N)]
    leaves = [v.to(torch.float64).requires_grad_() for v in leaves]
    upstream = torch.randn(3, M, dtype=torch.float64)
    log_weights = torch.log_softmax(leaves[4], 0)
    terms = decompose_kl(*leaves[:4], log_weights, impl=impl)
    joint, marginals = by_hand(leaves[0], *leaves[2:4], log_weights)
    log_prior = Normal(0.0, 1.0).log_prob(leaves[0]).sum(-1)
    wanted = (leaves[1] - joint, joint - marginals, marginals - log_prior)
    for got, want in zip(terms, wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-10)
    totals = [(torch.stack(v) * upstream).sum() for v in (terms, wanted)]
    grads = [torch.autograd.grad(total, leaves, retain_graph=True) for total in totals]
    for got, want in zip(*grads, strict=True):
        assert torch.allclose(got, want, rtol=1e-8, atol=1e-10)
    assert torch.allclose(sum(terms), leaves[1] - log_prior, rtol=1e-10)
    assert torch.allclose(total_correlation(leaves[0], *leaves[2:4], log_weights, impl=impl), terms.total_correlation)
    other = decompose_kl(*leaves[:4], log_weights, log_prior=log_prior - 1, impl=impl)
    assert torch.allclose(other.dimension_wise_kl, terms.dimension_wise_kl + 1)


def test_gradcheck() -> None:
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 2), (5, 2), (5, 2))]
    assert torch.autograd.gradcheck(total_correlation, leaves)
    own = torch.tensor([2, -1, 0, 4])
    assert torch.autograd.gradcheck(lambda *v: total_correlation(*v, exclude=own), leaves)


@pytest.mark.parametrize("weighted", [False, True])
def test_leaving_each_point_out(weighted: bool) -> None:
    """What is left is normalised, so that it is a mixture of the other points; -1 leaves nothing out."""
    N, D = 9, 3
    mu, logvar = torch.randn(N, D, dtype=torch.float64), torch.randn(N, D, dtype=torch.float64)
    weights = torch.log_softmax(torch.randn(N, dtype=torch.float64), 0) if weighted else None
    z, log_q = fastvae.gaussian_rsample(mu, logvar)
    own = torch.arange(N)
    own[4] = -1
    terms = decompose_kl(z, log_q, mu, logvar, weights, exclude=own)
    full = torch.full((N,), -math.log(N), dtype=torch.float64) if weights is None else weights
    left = full.expand(N, N).masked_fill(own[:, None] == torch.arange(N), -torch.inf)
    joint, marginals = by_hand(z, mu, logvar, torch.log_softmax(left, -1))
    assert torch.allclose(terms.mutual_information, log_q - joint, rtol=1e-10, atol=1e-12)
    assert torch.allclose(terms.total_correlation, joint - marginals, rtol=1e-10, atol=1e-12)
    assert torch.allclose(total_correlation(z, mu, logvar, weights, exclude=own), terms.total_correlation)
    assert torch.allclose(sum(terms), log_q - Normal(0.0, 1.0).log_prob(z).sum(-1))


def test_leaving_out_almost_all_the_weight() -> None:
    """1 - w is taken of log w, in which float32 knows a weight near 1 to every digit."""
    log_weights = torch.tensor([-1e-9, math.log(1e-9)])
    z, mu, own = torch.randn(4, 2), torch.randn(2, 2), torch.zeros(4, dtype=torch.int64)
    terms = decompose_kl(z, torch.zeros(4), mu, torch.zeros(1), log_weights, exclude=own)
    want = Normal(mu[1], 1.0).log_prob(z).sum(-1)  # all that is left
    assert torch.allclose(-terms.mutual_information, want, atol=1e-5)
    assert torch.allclose(terms.total_correlation, torch.zeros(4), atol=1e-5)


def test_a_penalty_makes_the_dimensions_independent(compiled: None) -> None:
    """The recipe of the guide, with a memory of the posteriors: an encoder that mixes what it could keep apart."""
    N, B = 1000, 100
    sources = torch.randn(N, 2)
    mixing = torch.tensor([[1.0, 0.7], [0.5, 1.0]], requires_grad=True)
    logvar = torch.full((2,), -2.0)

    def encode(x: Tensor) -> Tensor:
        return x @ torch.nn.functional.normalize(mixing).T  # of unit variance, so that no dimension can vanish

    before = AggregatedPosterior(encode(sources), logvar).total_correlation()
    q = AggregatedPosterior(encode(sources), logvar)
    optimizer = torch.optim.Adam([mixing], lr=0.02)
    for _ in range(8):
        for index in torch.randperm(N).split(B):
            mu = encode(sources[index])
            z, _ = fastvae.gaussian_rsample(mu, logvar)
            q.update(index, mu, logvar)
            optimizer.zero_grad()
            total_correlation(z, *q.components()).mean().backward()
            optimizer.step()
    after = AggregatedPosterior(encode(sources), logvar).total_correlation()
    assert float(before.value) > 0.4 and float(after.value) < 0.05


def test_a_small_data_set_lies_between_both(compiled: None) -> None:
    """The population's total correlation is between that with and that without each point's own posterior."""
    known = Correlated(0.5, D=8, N=300)
    mu = known.mu.detach()
    index = torch.arange(300).repeat(20)
    z, _ = fastvae.gaussian_rsample(mu[index], known.logvar)
    with_own = float(total_correlation(z, mu, known.logvar).mean())
    without = float(total_correlation(z, mu, known.logvar, exclude=index).mean())
    population = float(known.total_correlation.detach())
    assert without < population - 0.5 < population + 0.5 < with_own


def test_minibatch_estimates_are_nats_off(compiled: None) -> None:
    """Minibatch weighted sampling (Chen et al. 2018) against the same draws' terms over the whole data set."""
    known = Correlated(0.5, D=10, N=20_000, dtype=torch.float32)
    N, B = len(known.mu), 100
    mu, errors = known.mu.detach(), []
    for _ in range(10):
        rows = mu[torch.randperm(N)[:B]]
        z, log_q = fastvae.gaussian_rsample(rows, known.logvar)
        exact = decompose_kl(z, log_q, mu, known.logvar)
        each = densities(z, rows, known.logvar)
        joint = each.sum(-1).logsumexp(-1) - math.log(N * B)
        marginals = (each.logsumexp(-2) - math.log(N * B)).sum(-1)
        errors.append(torch.stack([(log_q - joint) - exact[0], (joint - marginals) - exact[1]]).mean(1))
    want = by_hand(z[:20].double(), mu.double(), known.logvar.double(), torch.full((N,), -math.log(N)).double())
    assert float((exact.total_correlation[:20] - (want[0] - want[1])).abs().max()) < 1e-4
    information, correlation = (abs(float(e)) for e in torch.stack(errors).mean(0))
    assert information > 2 and correlation > 8


def test_one_point_and_independent_dimensions() -> None:
    """No information and no correlation in a single posterior; none at all in any one dimension."""
    z, log_q = fastvae.gaussian_rsample(torch.zeros(50, 3), torch.zeros(3))
    terms = decompose_kl(z, log_q, torch.zeros(1, 3), torch.zeros(3))
    assert all(float(part.abs().max()) < 1e-5 for part in terms)
    z = torch.randn(50, 1)
    assert float(total_correlation(z, torch.randn(9, 1), torch.zeros(())).abs().max()) < 1e-5
    assert total_correlation(z[:0], torch.randn(9, 1), torch.zeros(())).shape == (0,)
    assert total_correlation(torch.zeros(4, 2, 3), torch.zeros(5, 3), torch.zeros(3)).shape == (4, 2)


class TestAggregatedPosterior:
    """What it has for training with a penalty: a memory, marginals, draws of their product."""

    def test_marginals(self) -> None:
        mu, logvar = torch.randn(40, 3), torch.randn(40, 3)
        q, z = AggregatedPosterior(mu, logvar, impl="composite"), torch.randn(7, 3)
        want = q.marginal_log_prob(z)
        for d in (0, 2, -1):
            one = q.marginal(d)
            assert torch.allclose(one.log_prob(z[:, [d]]), want[:, d], rtol=1e-5) and one.backend_options["impl"]
        pair = q.marginal([2, 0])
        expected = by_hand(z[:, [2, 0]], mu[:, [2, 0]], logvar[:, [2, 0]], torch.full((40,), -math.log(40)))[0]
        assert torch.allclose(pair.log_prob(z[:, [2, 0]]), expected, rtol=1e-5)
        for wrong in (3, [], [0, 5], 1.0, "0"):
            with pytest.raises(ValueError, match="dimensions must be"):
                q.marginal(wrong)  # type: ignore[arg-type]

    def test_draws_of_the_product(self) -> None:
        """The variances of q(z), and no correlation, where q(z) has one of 0.9."""
        m = torch.randn(2000, 1)
        q = AggregatedPosterior(torch.cat([m, -2 * m], 1), torch.tensor([0.01, 0.04]).log())
        torch.manual_seed(1)
        z = q.sample_marginals(20_000)
        assert abs(float(torch.corrcoef(z.T)[0, 1])) < 0.03 < 0.9 < -float(torch.corrcoef(q.sample(20_000).T)[0, 1])
        assert torch.allclose(z.var(0), q.mu.var(0) + torch.tensor([0.01, 0.04]), rtol=0.05)
        torch.manual_seed(1)
        assert torch.equal(q.sample_marginals(20_000), z) and q.sample_marginals(0).shape == (0, 2)

    def test_memory(self) -> None:
        """Posteriors are replaced, without changing what the caller or a graph holds."""
        mu, logvar = torch.zeros(5, 2), torch.zeros(5, 2)
        q = AggregatedPosterior(mu, logvar)
        z = torch.randn(3, 2, requires_grad=True)
        value = total_correlation(z, *q.components()).sum()
        new = torch.ones(2, 2, requires_grad=True)
        q.update(torch.tensor([3, 1]), new, torch.full((2,), -1.0))
        value.backward()
        assert not mu.any() and not q.mu.requires_grad
        assert q.mu.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1], [0, 0]]
        assert q.logvar[:, 0].tolist() == [0, -1, 0, -1, 0]
        q.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2), torch.zeros(0, 2))
        assert "mu" in q.state_dict()

    @pytest.mark.parametrize(
        ("index", "mu", "message"),
        [
            (torch.tensor([5]), torch.zeros(1, 2), "index must be in 0 ... 4"),
            (torch.tensor([-1]), torch.zeros(1, 2), "index must be in 0 ... 4"),
            (torch.tensor([0.0]), torch.zeros(1, 2), "index must be int64"),
            (torch.tensor([[0]]), torch.zeros(1, 2), "index must be int64"),
            (torch.tensor([0, 1]), torch.zeros(1, 2), r"mu for index \[2\] must be \[2, 2\]"),
        ],
    )
    def test_mistakes(self, index: Tensor, mu: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            AggregatedPosterior(torch.zeros(5, 2), torch.zeros(2)).update(index, mu, torch.zeros(2))


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"log_q": torch.zeros(4)}, ValueError, r"log_q for z \[3, 2\] must be \[3\], not \[4\]"),
        ({"log_q": torch.zeros(3, 1)}, ValueError, r"log_q for z \[3, 2\] must be \[3\]"),
        ({"log_prior": torch.zeros(())}, ValueError, r"log_prior for z \[3, 2\] must be \[3\]"),
        ({"z": torch.zeros(3, 4)}, ValueError, r"z must be \[..., 2\]"),
        ({"exclude": torch.zeros(3)}, TypeError, "exclude must be an int64"),
        ({"exclude": torch.zeros(3).long(), "mu": torch.zeros(1, 2)}, ValueError, "exclude leaves nothing"),
        ({"impl": "abacus"}, ValueError, "impl must be one of"),
    ],
)
def test_mistakes(more: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"z": torch.zeros(3, 2), "log_q": torch.zeros(3), "mu": torch.zeros(5, 2), "logvar": torch.zeros(2)}
    with pytest.raises(error, match=message):
        decompose_kl(**(call | more))
