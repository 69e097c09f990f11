"""Annealed importance sampling and HMC: against linear-Gaussian VAEs, whose log p(x) and p(z | x) are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import Decoder, Encoder, LinearGaussian, vae
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae import VAE, HierarchicalVAE, MixturePrior, StandardNormalPrior, annealing, hmc
from fastvae.hmc import Target

ZERO, ONE = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)


class Bad(LinearGaussian):
    """An encoder that is `shift` off and too sure: its variances are exp(widen) times the exact ones."""

    def __init__(self, shift: float = 0.0, widen: float = 0.0) -> None:
        super().__init__()
        self.shift, self.widen = shift, widen

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = super().encode(x)
        return mu + self.shift, logvar + self.widen


def problem(shift: float = 0.0, widen: float = 0.0, count: int = 10) -> tuple[VAE, Tensor, Tensor]:
    """A VAE with a standard normal prior, x [count, 6] of it, and log p(x)."""
    linear = Bad(shift, widen)
    marginal = linear.marginal(ZERO, ONE)
    x = marginal.sample((count,)).detach()
    return linear.vae(StandardNormalPrior(3)), x, marginal.log_prob(x).detach()


def with_mixture(count: int = 8) -> tuple[VAE, Tensor, Tensor]:
    """The same with three components in the prior: log p(x) is that of three Gaussians."""
    linear = Bad(0.3)
    prior = MixturePrior(1.5 * torch.randn(3, 3), 0.5 * torch.randn(3, 3), probs=torch.tensor([0.5, 0.2, 0.3]))
    model = linear.vae(prior)
    mu, logvar, log_weights = (v.detach() for v in prior.components())
    marginals = [linear.marginal(m, v.exp()) for m, v in zip(mu, logvar, strict=True)]
    x = torch.stack([marginals[i % 3].sample() for i in range(count)]).detach()
    log_p = torch.stack([m.log_prob(x) for m in marginals], -1) + log_weights
    return model, x, log_p.logsumexp(-1).detach()


@pytest.mark.parametrize("start", hmc.STARTS)
@pytest.mark.parametrize("make", [problem, with_mixture])
def test_a_known_log_likelihood(make: Any, start: str) -> None:
    """Each within five of its own standard errors, which are small."""
    model, x, want = make()
    found = annealing.log_likelihood(model, x, num_chains=32, temperatures=60, leapfrog_steps=4, start=start)
    assert found.log_likelihood.shape == (len(x),) and found.log_likelihood.dtype == torch.float64
    assert float(found.standard_error.max()) < 0.6 and float(found.standard_error.mean()) < 0.25
    assert bool(((found.log_likelihood - want).abs() < 5 * found.standard_error + 1e-6).all())
    assert bool(((found.acceptance > 0.4) & (found.acceptance < 0.9)).all())
    assert bool((found.effective_sample_size > 3).all())


@pytest.mark.parametrize("start", hmc.STARTS)
def test_weights_are_unbiased(start: str) -> None:
    """E[w] = p(x) and, from exact posterior draws, E[1 / w] = 1 / p(x): also for few, rough steps."""
    model, _, _ = problem(shift=0.2, widen=0.5)
    exact = LinearGaussian()
    x = exact.b.detach() + torch.tensor([[0.2], [-0.1]])  # not so far out that a prior's draw says nothing
    want = exact.marginal(ZERO, ONE).log_prob(x).detach()
    chains, schedule = 20_000, torch.tensor([0.0, 0.03, 0.08, 0.16, 0.3, 0.5, 0.75, 1.0]).double()
    target = Target(model, x, start)
    with torch.no_grad():
        steps = annealing._pilot(target, schedule, 2, 0.65, lambda: None) * 1.5  # rejects often
        forward = annealing._anneal(target, target.begin(chains), schedule, steps, 2, lambda: None)
        z, _ = fastvae.gaussian_rsample(*exact.encode(x), chains)
        backward = annealing._anneal(target, target(z), schedule.flip(0), steps.flip(0), 2, lambda: None)
    assert float(forward.acceptance.max()) < 0.9
    for log_w in (forward.log_weights - want, backward.log_weights + want):
        ratio = log_w.exp()  # mean 1
        error = ratio.std(0) / math.sqrt(chains)
        assert float(error.max()) < 0.06 and bool(((ratio.mean(0) - 1).abs() < 5 * error).all())
        assert float(ratio.std(0).min()) > 0.1  # far from a constant


@pytest.mark.parametrize("start", hmc.STARTS)
def test_bounds_enclose(start: str) -> None:
    """Lower <= log p(x) <= upper in the mean, and more temperatures bring both nearer."""
    model, _, _ = problem(shift=1.0, widen=-1.0)
    marginal, gaps = LinearGaussian().marginal(ZERO, ONE), []
    for T in (5, 60):
        found = annealing.bidirectional_bounds(model, 60, num_chains=4, temperatures=T, leapfrog_steps=3, start=start)
        want = marginal.log_prob(found.x).detach()
        for below in (want - found.lower, found.upper - want):
            assert below.shape == (60,)
            assert float(below.mean()) > -3 * float(below.std()) / math.sqrt(60)
        assert torch.equal(found.forward.log_likelihood, found.lower)
        assert torch.equal(found.backward.log_likelihood, -found.upper)
        for chains in (found.forward, found.backward):  # the standard errors are of these very estimates
            spread = chains.log_weights.exp().std(0) / chains.log_weights.exp().mean(0) / 2  # of four chains
            assert torch.allclose(chains.standard_error, spread)
        gaps.append(float((found.upper - found.lower).mean()))
    assert 0 < gaps[1] < 0.5 * gaps[0] and gaps[1] < 0.5


def test_better_than_importance_sampling_where_the_encoder_is_bad() -> None:
    """At the cost of 5,000 gradients, where 5,000 samples from a bad encoder are many nats off."""
    model, x, want = problem(shift=3.0, widen=-3.0)
    sampled = model.log_likelihood(x, 5000).double() - want
    # 6 chains and 4 of the pilot run, 100 temperatures, 5 leapfrog steps
    annealed = annealing.log_likelihood(model, x, num_chains=6, temperatures=100, leapfrog_steps=5, start="prior")
    error = annealed.log_likelihood - want
    assert float(sampled.mean()) < -10
    assert float(error.abs().mean()) < 0.5
    from_encoder = annealing.log_likelihood(model, x, num_chains=2, temperatures=100, leapfrog_steps=5)
    assert float(sampled.mean()) + 5 < float((from_encoder.log_likelihood - want).mean()) < 0


def test_one_temperature_is_importance_sampling() -> None:
    model, x, _ = problem(shift=0.5)
    torch.manual_seed(3)
    found = annealing.log_likelihood(model, x, num_chains=50, temperatures=1)
    torch.manual_seed(3)
    with torch.no_grad():
        annealing._pilot(Target(model, x, "posterior"), torch.tensor([0.0, 1.0]), 1, 0.5, lambda: None)
        z, log_q = fastvae.gaussian_rsample(*model.encoder(x), 50)
        want = model._log_likelihood_of(x, z) + model.prior.log_prob(z) - log_q
    assert torch.allclose(found.log_weights, want, rtol=1e-10) and torch.equal(found.z, z)
    assert bool(found.acceptance.isnan().all())


def test_other_likelihoods_priors_and_dtypes() -> None:
    """Bernoulli in float32, a VampPrior, a prior of one's own by autograd, a model in bfloat16."""

    class Laplace(fastvae.Prior):
        def log_prob(self, z: Tensor) -> Tensor:
            return torch.distributions.Laplace(0.0, 1.0).log_prob(z).sum(-1)

        def sample(self, n: int) -> Tensor:
            return torch.distributions.Laplace(0.0, 1.0).sample((n, 3))

    def by_the_prior(model: VAE) -> Tensor:
        z = model.prior.sample(100_000)
        with torch.no_grad():
            log_x = torch.cat([model._log_likelihood_of(row, z[:, None]) for row in x.split(1)], 1)
        return fastvae.bounds.log_mean_exp(log_x)

    x = torch.rand(4, 6).round()
    for model in (vae(), vae("vamp"), VAE(Encoder(), Decoder(), Laplace())):
        want = by_the_prior(model)
        for start in hmc.STARTS[isinstance(model.prior, Laplace) :]:  # whose tails no Gaussian covers
            found = annealing.log_likelihood(model, x, num_chains=16, temperatures=30, leapfrog_steps=3, start=start)
            assert found.log_likelihood.dtype == torch.float32
            assert bool(((found.log_likelihood - want).abs() < 5 * found.standard_error + 0.02).all())
        assert all(p.grad is None for p in model.parameters())
    half = vae().bfloat16()
    found = annealing.log_likelihood(half, x.bfloat16(), num_chains=16, temperatures=30, leapfrog_steps=3)
    want = by_the_prior(half.float())
    assert float((found.log_likelihood - want).abs().max()) < 0.5


class Calls(TorchDispatchMode):
    """Which of the library's operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_the_score_comes_with_the_density(compiled: None) -> None:
    """One pass over the components for a gradient: no backward of the mixture, and pseudo-inputs encoded once."""
    model, x = vae("vamp"), torch.rand(4, 6).round()
    with Calls() as calls:
        annealing.log_likelihood(model, x, num_chains=3, temperatures=4, leapfrog_steps=2)
    mixture = {name for name in calls.names if "mixture_log_prob" in name}
    assert mixture and all("score" in name for name in mixture)
    assert len(model.encoder.rows) == 2  # x, and the pseudo-inputs


def test_memory_and_progress() -> None:
    """No more rows at once than log_likelihood decodes; each step is told."""
    model, told = vae(), []
    rows = fastvae._few.rows_on(torch.device("cpu"))
    for x, chains in ((torch.rand(500, 6).round(), 10), (torch.rand(2, 6).round(), rows + 1)):
        model.decoder.rows.clear()
        told.clear()
        annealing.log_likelihood(
            model, x, num_chains=chains, temperatures=3, leapfrog_steps=1, progress=lambda *done: told.append(done)
        )
        assert max(model.decoder.rows) <= rows
        assert [done for done, _ in told] == list(range(1, told[-1][1] + 1))


def test_deterministic() -> None:
    model, x = vae("vamp"), torch.rand(3, 6).round()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found = annealing.log_likelihood(model, x, num_chains=3, temperatures=5, leapfrog_steps=2)
        bounds = annealing.bidirectional_bounds(model, 2, num_chains=3, temperatures=5, leapfrog_steps=2)
        draws = hmc.sample_posterior(model, x, 4, warmup=9, leapfrog_steps=2)
        results.append((found.log_weights, found.z, bounds.x, bounds.upper, draws.z, draws.step_size))
    assert all(torch.equal(one, same) for one, same in zip(*results[:2], strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(*results[1:], strict=True) if one.shape != (2, 6))


def test_no_and_inference_mode_and_no_points() -> None:
    model, x = vae("vamp"), torch.rand(3, 6).round()
    with torch.inference_mode():
        found = annealing.log_likelihood(model, x + 0, num_chains=3, temperatures=5, leapfrog_steps=2)
    assert bool(found.log_likelihood.isfinite().all()) and not found.log_likelihood.requires_grad
    empty = annealing.log_likelihood(model, x[:0], num_chains=3, temperatures=5, leapfrog_steps=2)
    assert empty.log_likelihood.shape == (0,) and empty.log_weights.shape == (3, 0)
    one = annealing.log_likelihood(model, x[:1], num_chains=1, temperatures=2, leapfrog_steps=1)
    assert one.log_weights.shape == (1, 1)


def test_a_start_that_is_narrow_beyond_reason() -> None:
    """log q(z | x) is of the order -10^8 at the posterior: beside it float32 would lose all of log p(x, z)."""
    model, x, _ = problem(widen=-18.0, count=2)
    mu, logvar = (v.detach() for v in LinearGaussian().encode(x))
    found = hmc.sample_posterior(model.float(), x.float(), 250, num_chains=8, warmup=200, leapfrog_steps=5)
    assert float(found.r_hat.max()) < 1.05
    assert torch.allclose(found.z.flatten(0, 1).var(0).double().log(), logvar, atol=0.4)
    assert float(((found.z.mean((0, 1)) - mu).abs() / (0.5 * logvar).exp()).max()) < 0.3


class HalfNormal(StandardNormalPrior):
    def log_prob(self, z: Tensor) -> Tensor:
        return torch.where(z[..., 0] > 0, super().log_prob(z) + math.log(2), -math.inf)


def test_where_the_density_is_zero() -> None:
    """A chain that proposes a z of no density stays; one that begins there has weight 0; NaN stays in its point."""

    x = torch.ones(2, 6)
    model = VAE(Encoder(), Decoder(), HalfNormal(3))
    found = annealing.log_likelihood(model, x, num_chains=60, temperatures=20, leapfrog_steps=3)
    assert bool((found.log_weights == -math.inf).any()) and not bool(found.log_weights.isnan().any())
    there = found.z[..., 0] > 0
    assert float(there.float().mean()) > 0.9  # chains that began elsewhere found their way, without a weight
    assert bool(((found.log_weights == -math.inf) | there).all())
    want = model.log_likelihood(x, 100_000)
    assert bool(((found.log_likelihood - want).abs() < 5 * found.standard_error).all())

    class Partly(Decoder):
        def forward(self, z: Tensor) -> Tensor:
            logits = super().forward(z).unflatten(0, (-1, 2)).clone()
            logits[:, 1] *= math.nan
            return logits.flatten(0, 1)

    partly = annealing.log_likelihood(VAE(Encoder(), Partly(), StandardNormalPrior(3)), x, num_chains=3, temperatures=5)
    assert partly.log_likelihood.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"num_chains": 0}, ValueError, "num_chains must be at least 1"),
        ({"num_chains": 2.0}, TypeError, "num_chains must be an integer"),
        ({"leapfrog_steps": 0}, ValueError, "leapfrog_steps must be at least 1"),
        ({"temperatures": 0}, ValueError, "temperatures must be at least 1"),
        ({"temperatures": 3.0}, TypeError, "temperatures must be an integer"),
        ({"temperatures": torch.tensor([0.0, 0.5])}, ValueError, r"must increase from 0 to 1.*0, 0.5 \.\.\. 0.5"),
        ({"temperatures": torch.tensor([0.0, 0.5, 0.5, 1.0])}, ValueError, "must increase from 0 to 1"),
        ({"temperatures": torch.tensor([0.0, torch.nan, 1.0])}, ValueError, "must increase from 0 to 1"),
        ({"temperatures": torch.tensor([1.0])}, ValueError, r"floating \[T \+ 1\]"),
        ({"temperatures": torch.tensor([0, 1])}, ValueError, r"floating \[T \+ 1\].*int64"),
        ({"start": "encoder"}, ValueError, "start must be one of 'posterior', 'prior', not 'encoder'"),
        ({"acceptance": 1.0}, ValueError, "acceptance must be between 0 and 1"),
        ({"x": [[0.0]]}, TypeError, "x must be a tensor"),
        ({"num_chains": None}, TypeError, "num_chains must be an integer, not NoneType"),
        ({"x": torch.tensor(0.5)}, ValueError, r"x must be \[B, \*x_shape\], not \[\]"),
    ],
)
def test_mistakes(more: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        annealing.log_likelihood(**({"vae": vae(), "x": torch.rand(2, 6)} | more))


def two_levels() -> HierarchicalVAE:
    return HierarchicalVAE(Encoder(), Encoder(9, 2), Encoder(3, 2), Decoder(5), StandardNormalPrior(3))


def conditional() -> VAE:
    return VAE(Encoder(), Decoder(), MixturePrior(torch.zeros(2, 3), labels=torch.tensor([0, 1])))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (conditional, r"vae must have a prior p\(z\), not p\(z \| y\) as this MixturePrior; vae.log_likelihood"),
        (Decoder, "vae must be a fastvae.VAE; a Decoder has no encoder"),
        (two_levels, "vae must have one level of latents, not two as a HierarchicalVAE; vae.log_likelihood"),
    ],
)
def test_other_models(make: Any, message: str) -> None:
    """Each function refuses them before it draws anything."""
    x = torch.rand(2, 6)
    for call in (annealing.log_likelihood, annealing.bidirectional_bounds, hmc.sample_posterior):
        with pytest.raises(TypeError, match=message):
            call(make(), 2 if call is annealing.bidirectional_bounds else x)


def test_a_decoder_without_a_gradient() -> None:
    class Cut(Decoder):
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z.detach()).detach()

    with pytest.raises(ValueError, match=r"log p\(x \| z\) has no gradient in z"):
        annealing.log_likelihood(VAE(Encoder(), Cut(), StandardNormalPrior(3)), torch.rand(2, 6))


class TestPosterior:
    def test_moments(self) -> None:
        """Of a known posterior, from an encoder that is far off; R-hat near 1, many effective draws."""
        model, x, _ = problem(shift=2.0, widen=-3.0, count=4)
        found = hmc.sample_posterior(model, x, 300, num_chains=4, warmup=150, leapfrog_steps=5)
        mu, logvar = (v.detach() for v in LinearGaussian().encode(x))
        assert found.z.shape == (300, 4, 4, 3)
        assert float(found.r_hat.max()) < 1.03 and float(found.effective_sample_size.min()) > 100
        error = (logvar.exp() / found.effective_sample_size).sqrt()
        assert bool(((found.z.mean((0, 1)) - mu).abs() < 5 * error).all())
        assert torch.allclose(found.z.flatten(0, 1).var(0).log(), logvar, atol=0.35)
        assert abs(float(found.acceptance.mean()) - 0.8) < 0.1 and found.step_size.shape == (4, 4)

    def test_starts_outside_the_support(self) -> None:
        """Chains begin again until they are inside, or they would stay where the density is zero for ever."""

        model = VAE(Encoder(), Decoder(), HalfNormal(3))
        found = hmc.sample_posterior(model, torch.rand(3, 6), 20, num_chains=16, warmup=30, leapfrog_steps=3)
        assert bool((found.z[..., 0] > 0).all()) and bool((found.acceptance > 0).all())

    def test_no_start_inside(self) -> None:
        with pytest.raises(ValueError, match=r"not finite at any of 100 draws of the start 'posterior', for 1 of 2 x"):
            hmc.sample_posterior(vae(), torch.stack((torch.rand(6), torch.full((6,), math.nan))), 5, warmup=5)

    @pytest.mark.parametrize("value", [math.nan, 1.0])
    def test_no_draws_to_speak_of(self, value: float) -> None:
        z = torch.full((20, 4), value)
        assert bool(hmc.effective_sample_size(z).isnan()) and bool(hmc.r_hat(z).isnan())

    def test_chains_that_disagree(self) -> None:
        z = torch.randn(500, 4, 2, dtype=torch.float64)
        assert float(hmc.r_hat(z).max()) < 1.01
        assert bool((hmc.effective_sample_size(z) > 1500).all())
        z[:, 0, 1] += 3
        assert float(hmc.r_hat(z)[0]) < 1.01 and float(hmc.r_hat(z)[1]) > 1.3
        assert float(hmc.effective_sample_size(z)[1]) < 20
        z[250:, :, 0] += 3  # a trend that all chains share
        assert float(hmc.r_hat(z)[0]) > 1.3

    def test_effective_draws_of_a_known_process(self) -> None:
        """z_t = rho z_(t-1) + noise: S C (1 - rho) / (1 + rho)."""
        S, C = 5000, 6
        for rho in (-0.4, 0.0, 0.6, 0.9):
            noise = torch.randn(S, C, dtype=torch.float64)
            z = [noise[0] / math.sqrt(1 - rho**2)]
            for step in noise[1:]:
                z.append(rho * z[-1] + step)
            want = S * C * (1 - rho) / (1 + rho)
            assert float(hmc.effective_sample_size(torch.stack(z))) == pytest.approx(want, rel=0.12)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: hmc.r_hat(torch.zeros(3, 2)), ValueError, r"z must be \[S, C, \.\.\.\], at least 4 draws"),
            (lambda: hmc.effective_sample_size(torch.zeros(9)), ValueError, r"z must be \[S, C"),
            (lambda: hmc.r_hat([1.0]), TypeError, "z must be a tensor"),
            (lambda: hmc.r_hat(torch.zeros(9, 2).long()), TypeError, "z must be a floating tensor"),
            (lambda: hmc.sample_posterior(vae(), torch.rand(2, 6), 0), ValueError, "num_samples must be at least 1"),
            (lambda: hmc.sample_posterior(vae(), torch.rand(2, 6), warmup=0), ValueError, "warmup must be at least 1"),
        ],
    )
    def test_mistakes(self, call: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            call()

    def test_short_runs(self) -> None:
        """A warm-up too short to choose a scale by; one chain; no points."""
        x = torch.rand(2, 6).round()
        for warmup in (1, 2, 3, 7):
            found = hmc.sample_posterior(vae(), x, 5, num_chains=1, warmup=warmup, leapfrog_steps=1)
            assert bool(found.z.isfinite().all()) and bool((found.step_size > 0).all())
        assert hmc.sample_posterior(vae(), x[:0], 5, warmup=60).z.shape == (5, 4, 0, 3)
