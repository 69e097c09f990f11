"""Multi-sample bounds: against a model whose log p(x) is known, and their gradients against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import LinearGaussian, assert_gradient_of_few_samples, vae
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from fastvae import VAE, StandardNormalPrior, _few, bounds
from fastvae._few import resampled
from fastvae._noise import PartOfBatch, rows_of_batch
from fastvae.bounds import GRADIENTS, Bound, effective_sample_size
from fastvae.priors import Density


class First(nn.Module):
    """The first of what the module before it returns."""

    def forward(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0]


Z0, ONE = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)


class Known:
    """A linear Gaussian model with an encoder that is off, some of its data, and their log p(x)."""

    def __init__(self, off: float = 0.3, n: int = 1) -> None:
        self.linear = LinearGaussian(off=off)
        self.model: VAE = self.linear.vae(StandardNormalPrior(latent_dim=3))
        torch.manual_seed(5)
        marginal = self.linear.marginal(Z0, ONE)
        self.x = marginal.sample((n,)).detach()
        self.log_p = marginal.log_prob(self.x).detach()

    def repeated(self, bound: str, R: int, S: int, **more: Any) -> tuple[Bound, Tensor, Tensor]:
        """R independent bounds on the first x, as the rows of one batch, and the leaves mu, logvar [R, 3]."""
        mu, logvar = (v[:1].detach().expand(R, 3).clone().requires_grad_() for v in self.linear.encode(self.x))
        rows = self.x[:1].expand(R, -1)
        estimate = bounds.elbo if bound == "elbo" else bounds.iwae
        log_prior = self.model.prior.density()
        return estimate(lambda z: self.log_likelihood(rows, z), log_prior, mu, logvar, S, **more), mu, logvar

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        mean, logvar = self.linear(z)
        return Independent(Normal(mean, torch.exp(0.5 * logvar)), 1).log_prob(x)

    def gradients(self, bound: str, R: int, S: int, **more: Any) -> Tensor:
        """R estimates of the gradient in (mu, logvar): [R, 6]."""
        drawn, mu, logvar = self.repeated(bound, R, S, **more)
        return torch.cat(torch.autograd.grad(drawn.objective.sum(), (mu, logvar)), 1)


def test_exact_posterior_gives_log_p() -> None:
    """Every weight is p(x) then, so every bound is log p(x), whatever S, estimator and chunks are."""
    known = Known(off=0.0, n=6)
    for S in (1, 4):
        for gradient in GRADIENTS:
            for chunk_size in (None, 3):
                bound = known.model.iwae(known.x, S, gradient=gradient, chunk_size=chunk_size)
                assert torch.allclose(bound, known.log_p, rtol=1e-11, atol=0)
        assert torch.allclose(known.model.elbo(known.x, S, gradient="stl"), known.log_p, rtol=1e-11, atol=0)
        output = known.model(known.x, bound="iwae", num_samples=S)
        assert torch.allclose(output.effective_sample_size, torch.full((6,), float(S), dtype=torch.float64))


def test_iwae_rises_with_the_samples_towards_log_p() -> None:
    """E[IWAE_1] = ELBO < E[IWAE_4] < E[IWAE_16] < ... <= log p(x), told apart by more than five standard errors."""
    known, R = Known(), 4000
    means, errors = [], []
    elbo = known.repeated("elbo", R, 1)[0].objective.detach()
    means.append(elbo.mean())
    errors.append(elbo.std() / math.sqrt(R))
    for S in (1, 4, 16, 256):
        iwae = known.repeated("iwae", R, S)[0].objective.detach()
        means.append(iwae.mean())
        errors.append(iwae.std() / math.sqrt(R))
    assert abs(means[0] - means[1]) < 5 * math.hypot(errors[0], errors[1])
    for low, high, a, b in zip(means[1:], means[2:], errors[1:], errors[2:], strict=False):
        assert high - low > 5 * math.hypot(a, b)
    assert means[-1] < known.log_p[0] + 5 * errors[-1]
    assert known.log_p[0] - means[-1] < 0.02 * (known.log_p[0] - means[0])


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_dreg_has_the_plain_gradients_mean_and_less_variance(beta: float) -> None:
    """In the encoder's outputs; within five standard errors in each of six dimensions, at less than a tenth of it."""
    known, R = Known(), 40_000
    plain, dreg = (known.gradients("iwae", R, 5, gradient=name, beta=beta) for name in ("plain", "dreg"))
    error = ((plain.var(0) + dreg.var(0)) / R).sqrt()
    assert bool(((plain.mean(0) - dreg.mean(0)).abs() < 5 * error).all())
    assert bool((plain.mean(0).abs() > 5 * error).any())  # there is a gradient to agree on
    assert float(dreg.var(0).sum() / plain.var(0).sum()) < (0.1 if beta == 1 else 0.3)
    # sticking the landing is not that gradient
    stl = known.gradients("iwae", R, 5, gradient="stl", beta=beta)
    assert bool(((stl.mean(0) - dreg.mean(0)).abs() > 10 * error).any())


def test_stl_for_the_elbo() -> None:
    """The plain gradient's mean; and no variance at all where q is the posterior, where the plain one has some."""
    known, R = Known(), 40_000
    plain, stl = (known.gradients("elbo", R, 2, gradient=name) for name in ("plain", "stl"))
    error = ((plain.var(0) + stl.var(0)) / R).sqrt()
    assert bool(((plain.mean(0) - stl.mean(0)).abs() < 5 * error).all())
    exact = Known(off=0.0)
    assert float(exact.gradients("elbo", 100, 2, gradient="stl").abs().max()) < 1e-12
    assert float(exact.gradients("elbo", 100, 2, gradient="plain").std(0).min()) > 0.1


def test_the_models_own_gradient_is_the_same_for_every_estimator() -> None:
    """d log p(x, z): sum_s v_s d log w_s, by autograd through logsumexp at the very z that were drawn."""
    known = Known(n=4)
    W = known.linear.W
    results = []
    for gradient in GRADIENTS:
        torch.manual_seed(1)
        mu, logvar = (v.detach() for v in known.linear.encode(known.x))
        drawn = bounds.iwae(
            lambda z: known.log_likelihood(known.x, z), known.model.prior.density(), mu, logvar, 7, gradient=gradient
        )
        results.append(torch.autograd.grad(drawn.objective.sum(), W)[0])
    log_x = known.log_likelihood(known.x, drawn.z.detach())
    log_w = (
        log_x + known.model.prior.log_prob(drawn.z) - Independent(Normal(mu, (0.5 * logvar).exp()), 1).log_prob(drawn.z)
    )
    want = torch.autograd.grad((torch.logsumexp(log_w, 0) - math.log(7)).sum(), W)[0]
    for got in results:
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_is_reported_is_the_bound(gradient: str) -> None:
    """Value, loss and weights recomputed from z by torch.distributions; beta changes the loss alone."""
    known, S = Known(n=4), 9
    for beta in (1.0, 0.3):
        torch.manual_seed(2)
        output = known.model(known.x, bound="iwae", num_samples=S, gradient=gradient, beta=beta)
        q = Independent(Normal(output.mu, torch.exp(0.5 * output.logvar)), 1)
        log_x = known.log_likelihood(known.x, output.z)
        kl = q.log_prob(output.z) - known.model.prior.log_prob(output.z)
        assert torch.allclose(output.bound, torch.logsumexp(log_x - kl, 0) - math.log(S), rtol=1e-10, atol=0)
        objective = torch.logsumexp(log_x - beta * kl, 0) - math.log(S)
        assert torch.allclose(output.loss, -objective.mean(), rtol=1e-10, atol=0)
        assert torch.allclose(output.elbo, (log_x - kl).mean(0), rtol=1e-10, atol=0)
        v = torch.softmax(log_x - kl, 0)
        assert torch.allclose(output.effective_sample_size, 1 / v.square().sum(0), rtol=1e-10, atol=0)
        assert not output.bound.requires_grad
    torch.manual_seed(2)
    assert torch.equal(known.model.iwae(known.x, S, gradient=gradient), output.bound)


ESTIMATORS = [("elbo", "plain"), ("elbo", "stl"), ("iwae", "plain"), ("iwae", "stl"), ("iwae", "dreg")]


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(("bound", "gradient"), ESTIMATORS)
def test_another_loss_of_z(bound: str, gradient: str, chunk_size: int | None) -> None:
    """d z / d(mu, logvar) is the reparameterised sample's, alone and beside the objective, whose gradient stays."""
    known, S = Known(), 6
    weight = torch.randn(S, 4, 3, dtype=torch.float64)
    torch.manual_seed(3)
    drawn, *leaves = known.repeated(bound, 4, S, gradient=gradient, chunk_size=chunk_size)
    noise = drawn.z.detach() - leaves[0].detach()  # sigma eps
    want = weight.sum(0), (0.5 * weight * noise).sum(0)
    loss, objective = (weight * drawn.z).sum(), drawn.objective.sum()
    alone = torch.autograd.grad(loss, leaves, retain_graph=True)
    of_objective = torch.autograd.grad(objective, leaves, retain_graph=True)
    together = torch.autograd.grad(objective + loss, leaves)
    for got, both, other, exact in zip(alone, together, of_objective, want, strict=True):
        assert torch.allclose(got, exact, rtol=1e-12, atol=1e-12)
        assert torch.allclose(both, other + exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(("bound", "gradient"), ESTIMATORS)
def test_what_else_is_handed_out(bound: str, gradient: str, chunk_size: int | None) -> None:
    """The ELBO's terms have their own gradients, recomputed here at the same z; the IWAE bound's are constants."""
    known = Known()
    torch.manual_seed(3)
    drawn, mu, logvar = known.repeated(bound, 4, 6, gradient=gradient, chunk_size=chunk_size)
    assert not drawn.log_weights.requires_grad and not drawn.effective_sample_size.requires_grad
    if bound == "iwae":
        assert not drawn.log_likelihood.requires_grad and not drawn.kl.requires_grad
        return
    eps = (drawn.z - mu).detach() * (-0.5 * logvar.detach()).exp()
    z = mu + (0.5 * logvar).exp() * eps
    q = (mu, logvar) if gradient == "plain" else (mu.detach(), logvar.detach())
    kl = Independent(Normal(q[0], (0.5 * q[1]).exp()), 1).log_prob(z) - known.model.prior.log_prob(z)
    log_likelihood = known.log_likelihood(known.x[:1].expand(4, -1), z)
    for got, want in ((drawn.kl, kl), (drawn.log_likelihood, log_likelihood)):
        weight = torch.randn_like(got)
        gradients = (torch.autograd.grad((weight * v).sum(), (mu, logvar), retain_graph=True) for v in (got, want))
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(("bound", "gradient"), ESTIMATORS)
def test_what_a_vae_hands_out(bound: str, gradient: str, chunk_size: int | None) -> None:
    """z, mu and logvar have the encoder's whole gradient; for IWAE no other field but the loss has any."""
    model, x = vae("vamp").double(), torch.rand(3, 6).double().round()
    torch.manual_seed(3)
    output = model(x, bound=bound, num_samples=5, gradient=gradient, chunk_size=chunk_size)
    parameters = list(model.encoder.parameters())
    mu, logvar = model.encoder(x)
    z = mu + (0.5 * logvar).exp() * ((output.z - output.mu) * (-0.5 * output.logvar).exp()).detach()
    for got, want in ((output.z, z), (output.mu, mu), (output.logvar, logvar)):
        gradients = (
            torch.autograd.grad(v.square().sum(), parameters, retain_graph=True, materialize_grads=True)
            for v in (got, want)
        )
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(*gradients, strict=True))
    constants = {"log_weights", "effective_sample_size"}
    constants |= {"bound", "reconstruction", "kl", "elbo"} if bound == "iwae" else set()
    for name in ("loss", "bound", "reconstruction", "kl", "elbo", "log_weights", "effective_sample_size"):
        assert getattr(output, name).requires_grad == (name not in constants), name


def test_one_default_for_each_bound() -> None:
    """Doubly reparameterised for IWAE, plain for the ELBO, however the bound is asked for."""
    known = Known(n=4)

    def gradients(gradient: str | None, ask: Callable[[str | None], Tensor]) -> Tensor:
        torch.manual_seed(7)
        return torch.cat([g.flatten() for g in torch.autograd.grad(ask(gradient).sum(), [known.linear.W])])

    model, x = known.model, known.x
    asked: dict[str, list[Callable[[str | None], Tensor]]] = {
        "dreg": [
            lambda gradient: model(x, bound="iwae", num_samples=5, gradient=gradient).loss,
            lambda gradient: model.iwae(x, 5, gradient=gradient),
            lambda gradient: direct(bounds.iwae, gradient).objective,
        ],
        "plain": [
            lambda gradient: model(x, num_samples=5, kl="sample", gradient=gradient).loss,
            lambda gradient: model.elbo(x, 5, kl="sample", gradient=gradient),
            lambda gradient: direct(bounds.elbo, gradient).objective,
        ],
    }

    def direct(estimate: Callable[..., Bound], gradient: str | None) -> Bound:
        log_likelihood = lambda z: known.log_likelihood(x, z)  # noqa: E731
        return estimate(log_likelihood, model.prior.density(), *known.linear.encode(x), 5, gradient=gradient)

    for default, ways in asked.items():
        for ask in ways:
            got = gradients(None, ask)
            assert torch.equal(got, gradients(default, ask))
            assert not torch.allclose(got, gradients("plain" if default == "dreg" else "stl", ask))


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
@pytest.mark.parametrize("chunk_size", [1, 4, 10, 30])
def test_chunks_recompute_the_same_draws(bound: str, chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the chunks' activations kept and with them computed again: the same bound and gradients, bit for bit."""
    x, gradient = torch.rand(3, 6).round(), "dreg" if bound == "iwae" else "stl"
    results = []
    for keep in (False, True):
        if keep:
            monkeypatch.setattr("fastvae.bounds.checkpoint", lambda f, *args, use_reentrant: f(*args))
        torch.manual_seed(0)
        model = vae("vamp")
        output = model(x, bound=bound, num_samples=10, gradient=gradient, chunk_size=chunk_size)
        output.loss.backward()
        results.append((output.loss, output.z, *(p.grad for p in model.parameters())))
        chunks = -(-10 // chunk_size)
        assert max(model.decoder.rows) == 3 * min(chunk_size, 10)
        assert len(model.decoder.rows) == chunks * (1 if keep or chunks == 1 else 2)
        assert model.encoder.rows == [3, 5]  # the prior is encoded once, not for every chunk
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_chunks_keep_no_activations() -> None:
    """What autograd keeps of 400 draws in chunks of 4 is less than what 40 draws at once keep."""
    kept = {}
    for S, chunk_size in ((40, None), (400, 4)):
        model, x, sizes = vae("vamp"), torch.rand(3, 6).round(), []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(x, bound="iwae", num_samples=S, gradient="dreg", chunk_size=chunk_size)
        kept[S] = max(sizes)
    assert kept[400] <= 400 * 3 < kept[40] * 10  # the weights [S, B] alone; no [S, B, 3] or [S, B, 6]
    assert kept[40] >= 40 * 3 * 6


@pytest.mark.parametrize("count", [1, 3, 7, 8])
def test_few_weights_stand_for_all(count: int) -> None:
    """Each weight's mean is right, with the variance of the best threshold, which is found here by bisection."""
    torch.manual_seed(0)
    log_w = 3 * torch.randn(8, 5, dtype=torch.float64)
    log_w[:, 0] = 0.0
    log_w[4:, 1] = -math.inf
    v, R = torch.softmax(log_w, 0), 40_000
    s, kept = resampled(v.repeat_interleave(R, 1), count)  # R columns of each
    assert s.shape == kept.shape == (count, 5 * R)
    weights = torch.zeros(8, 5 * R, dtype=torch.float64).scatter_add_(0, s, kept).reshape(8, 5, R)
    assert torch.allclose(weights.sum(0), torch.ones(5, R, dtype=torch.float64))

    low, high = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    for _ in range(100):
        c = (low + high) / 2
        too_many = (v / c).clamp(max=1).sum(0) > count
        low, high = torch.where(too_many, c, low), torch.where(too_many, high, c)
    variance = torch.where(v < high, v * (high - v), 0.0)
    error = (variance / R).sqrt()
    assert bool(((weights.mean(-1) - v).abs() <= 5 * error + 1e-12).all())
    assert bool((variance.sum(0) > 0)[2:].all()) or count == 8  # there is something to see
    assert torch.allclose(weights.var(-1).sum(0), variance.sum(0), rtol=0.2, atol=1e-12)
    as_they_are = weights.std(-1) < 1e-12
    assert bool(as_they_are[v > high * (1 + 1e-9)].all())


def test_few_weights_where_almost_all_is_in_one() -> None:
    v = torch.softmax(torch.tensor([[-3e4, 0.0], [0.0, math.nan], [-200.0, 1.0], [-math.inf, 0.0]]), 0)
    s, weights = resampled(v, 3)
    assert weights[:, 0].tolist() == [1.0, 0.0, 0.0] and s[0, 0] == 1
    assert bool((s[1:, 0] == 1).all())  # not those whose gradient may be infinite
    assert bool(weights[:, 1].isnan().all())
    assert [part.shape for part in resampled(v[:, :0], 3)] == [(3, 0), (3, 0)]


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-24])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_few_weights_at_the_ends_of_the_random_number(
    count: int, number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no weight is never kept, and nothing is kept twice, wherever the sums are rounded."""
    monkeypatch.setattr(_few, "_uniform", lambda v: torch.full_like(v[:, 0], number))
    torch.manual_seed(0)
    log_w = 2 * torch.randn(12, 2000)
    log_w[[3, 7]] = -math.inf
    v = torch.softmax(log_w, 0)
    s, weights = resampled(v, count)
    assert bool((v.gather(0, s) > 0).all() and (weights > 0).all())
    assert bool((s.sort(0).values.diff(dim=0) > 0).all())


def test_few_weights_of_a_part_of_a_batch() -> None:
    v = torch.softmax(torch.randn(6, 5), 0)
    torch.manual_seed(0)
    whole = resampled(v, 2)
    torch.manual_seed(0)
    with rows_of_batch(PartOfBatch(3, 2, 5)):
        part = resampled(v[:, 3:], 2)
    for mine, of_all in zip(part, whole, strict=True):
        assert torch.equal(mine, of_all[:, 3:])


@pytest.mark.parametrize("beta", [1.0, 0.4])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_backward_pass_of_few_samples_has_the_gradient_of_all_as_its_mean(gradient: str, beta: float) -> None:
    """At the same draws; within five standard errors in each of six dimensions."""
    known, R = Known(), 20_000
    results = []
    for backward_samples in (None, 2):
        torch.manual_seed(2)
        more = {"gradient": gradient, "beta": beta, "backward_samples": backward_samples}
        results.append(known.gradients("iwae", R, 6, **more))
    of_all, of_few = results
    difference = of_few - of_all
    error = difference.std(0) / math.sqrt(R)
    assert bool((difference.mean(0).abs() < 5 * error).all())
    assert bool((of_all.mean(0).abs() > 20 * error).any())  # there is a gradient to agree on
    assert bool((difference.abs().max(0).values > 0).all())


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_only_few_samples_have_activations(gradient: str, chunk_size: int | None) -> None:
    """All else that is handed out is as without."""
    known, called = Known(n=3), []

    def drawn(**more: Any) -> tuple[Bound, Tensor]:
        torch.manual_seed(4)
        mu, logvar = (v.detach().clone().requires_grad_() for v in known.linear.encode(known.x))

        def log_likelihood(z: Tensor) -> Tensor:
            called.append((len(z), torch.is_grad_enabled()))
            return known.log_likelihood(known.x, z)

        drawn = bounds.iwae(log_likelihood, known.model.prior.density(), mu, logvar, 6, gradient=gradient, **more)
        return drawn, torch.autograd.grad(drawn.z.square().sum(), mu, retain_graph=True)[0]

    of_all, gradient_of_z = drawn()
    called.clear()
    of_few, gradient_of_z_again = drawn(backward_samples=2, chunk_size=chunk_size)
    assert called == [*[(6, False)] * (not chunk_size), *[(2, False)] * 3 * bool(chunk_size), (2, True)]
    for name in ("objective", "z", "log_likelihood", "kl"):
        assert torch.allclose(getattr(of_few, name), getattr(of_all, name), rtol=1e-12, atol=0), name
    assert torch.equal(gradient_of_z, gradient_of_z_again)
    assert not of_few.log_likelihood.requires_grad and not of_few.kl.requires_grad
    called.clear()
    with torch.no_grad():
        bounds.iwae(
            lambda z: called.append(len(z)) or known.log_likelihood(known.x, z),  # type: ignore[func-returns-value]
            known.model.prior.density(),
            *known.linear.encode(known.x),
            6,
            backward_samples=2,
        )
    assert called == [6]  # no gradient is wanted, so there is no second pass


def test_the_first_pass_decodes_what_a_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many samples of each x as make `rows_on` rows, one at least; the prior takes all of them together."""
    known = Known(n=3)
    density, called = known.model.prior.density(), []

    def of(name: str, of_z: Density) -> Density:
        return lambda z: called.append((name, len(z))) or of_z(z)  # type: ignore[func-returns-value]

    def drawn() -> Tensor:
        torch.manual_seed(4)
        log_likelihood = of("x", lambda z: known.log_likelihood(known.x, z))
        posterior = known.linear.encode(known.x)
        return bounds.iwae(log_likelihood, of("z", density), *posterior, 6, backward_samples=2).objective

    wanted = drawn()
    for rows, pieces in ((12, [4, 2]), (2, [1] * 6)):
        called.clear()
        monkeypatch.setattr(_few, "rows_on", lambda device, rows=rows: rows)
        assert torch.allclose(drawn(), wanted, rtol=1e-12, atol=0)
        assert called == [*[("x", piece) for piece in pieces], ("z", 6), ("x", 2), ("z", 2)]


@pytest.mark.parametrize("prior", ["standard", "vamp"])
def test_few_samples_of_a_vae(prior: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    assert_gradient_of_few_samples(vae(prior), torch.rand(4, 6), monkeypatch)


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.5),
        nn.BatchNorm1d(6),
        nn.RReLU(),
        nn.Sequential(nn.LSTM(6, 6, 2, dropout=0.5), First()),
        nn.TransformerEncoderLayer(6, 2, 8, dropout=0.5),
    ],
    ids=lambda module: type(module).__name__,
)
def test_few_samples_need_a_decoder_that_repeats_itself(module: nn.Module) -> None:
    model = vae()
    model.decoder = nn.Sequential(model.decoder, module)
    few: dict[str, Any] = {"bound": "iwae", "num_samples": 3, "backward_samples": 2}
    with pytest.raises(ValueError, match=r"not so with a \w+ in training mode"):
        model(torch.rand(2, 6), **few)
    model.eval()(torch.rand(2, 6), **few).loss.backward()


def test_few_samples_look_at_what_a_module_does() -> None:
    few: dict[str, Any] = {"bound": "iwae", "num_samples": 3, "backward_samples": 2}
    model = vae()
    model.decoder = nn.Sequential(model.decoder, nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0))
    model(torch.rand(2, 6), **few).loss.backward()  # it has dropout that drops nothing
    model.decoder = nn.Sequential(model.decoder, nn.BatchNorm1d(6, track_running_stats=False)).eval()
    with pytest.raises(
        ValueError, match="BatchNorm1d without running statistics"
    ):  # its statistics are always the batch's
        model(torch.rand(2, 6), **few)
    with pytest.raises(ValueError, match="backward_samples is for the IWAE bound"):
        model(torch.rand(2, 6), backward_samples=2)


@pytest.mark.parametrize("gradient", ["plain", "stl"])
def test_few_samples_under_transforms(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example's own gradient, by vmap of grad, is that of the batch."""
    monkeypatch.setattr(_few, "_uniform", lambda v: torch.full_like(v[:, 0], 0.3))
    known = Known(n=3)
    mu, logvar = (v.detach().clone().requires_grad_() for v in known.linear.encode(known.x))
    noise = torch.randn(6, 3, mu.shape[-1], dtype=mu.dtype)

    def objective(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        def sampler(mu: Tensor, logvar: Tensor, *_: object) -> tuple[Tensor, Tensor]:
            z = mu + torch.exp(0.5 * logvar) * noise
            return z, Normal(mu, torch.exp(0.5 * logvar), validate_args=False).log_prob(z).sum(-1)

        densities = (lambda z: -(z - 1).square().sum(-1)), (lambda z: -z.abs().sum(-1))
        return bounds.estimate("iwae", *densities, mu, logvar, gradient, 1.0, 6, None, 2, sampler).objective.sum()

    def of_one(*row: Tensor) -> Tensor:
        return objective(row[0][None], row[1][None], row[2][:, None])

    wanted = torch.autograd.grad(objective(mu, logvar, noise), mu)[0]
    each = torch.func.vmap(torch.func.grad(of_one), in_dims=(0, 0, 1))(mu.detach(), logvar.detach(), noise)
    assert torch.allclose(each, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backward_samples", [None, 2])
def test_dreg_is_not_differentiated_again(backward_samples: int | None) -> None:
    """The derivative of this estimator would not be the bound's second one."""
    known = Known(n=3)
    mu, logvar = (v.detach().clone().requires_grad_() for v in known.linear.encode(known.x))
    more: dict[str, Any] = {"gradient": "dreg", "backward_samples": backward_samples, "impl": "reference"}
    bound = bounds.iwae(lambda z: -z.square().sum(-1), lambda z: -z.square().sum(-1), mu, logvar, 4, **more)
    first = torch.autograd.grad(bound.objective.sum(), mu, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_few_samples_under_autocast() -> None:
    """Weights that autocast cast in the pass without activations have gradients in the other."""
    model = vae()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.rand(2, 6), bound="iwae", num_samples=4, backward_samples=2).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.decoder.parameters())


def test_effective_sample_size() -> None:
    log_w = torch.tensor([[0.0, 0.0, -2000.0], [0.0, -math.inf, -2001.0], [0.0, -math.inf, -9000.0]])
    v = math.exp(-1.0)
    want = [3.0, 1.0, (1 + v) ** 2 / (1 + v * v)]
    assert torch.allclose(effective_sample_size(log_w), torch.tensor(want))


@pytest.mark.parametrize(("bound", "gradient"), [("elbo", "stl"), ("iwae", "plain"), ("iwae", "dreg")])
def test_estimators_train_an_encoder(bound: str, gradient: str) -> None:
    """From an encoder that is off: KL(q || posterior), the ELBO's distance from log p(x), all but vanishes."""
    known = Known(n=64)
    mu, logvar = (v.detach().clone().requires_grad_() for v in known.linear.encode(known.x))

    def drawn(bound: str, S: int, gradient: str) -> Bound:
        estimate = bounds.elbo if bound == "elbo" else bounds.iwae
        log_prior = known.model.prior.density()
        return estimate(lambda z: known.log_likelihood(known.x, z), log_prior, mu, logvar, S, gradient=gradient)

    def distance() -> float:
        return float((known.log_p - drawn("elbo", 1000, "plain").objective.detach()).mean())

    before, optimizer = distance(), torch.optim.Adam((mu, logvar), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        (-drawn(bound, 5, gradient).objective.mean()).backward()
        optimizer.step()
    # the plain one never comes to rest, even at the posterior
    assert before > 0.3 and distance() < (0.5 if gradient == "plain" else 0.1) * before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bound": "vr"}, "bound must be one of 'elbo', 'iwae', not 'vr'"),
        ({"bound": "iwae", "gradient": "score"}, "gradient must be one of 'plain', 'stl', 'dreg', not 'score'"),
        ({"gradient": "dreg"}, "gradient='stl'"),
        ({"bound": "iwae", "num_samples": 0}, "num_samples must be at least 1, not 0"),
        ({"bound": "iwae", "chunk_size": 0}, "chunk_size must be at least 1 or None, not 0"),
        ({"bound": "iwae", "backward_samples": 0}, "backward_samples must be at least 1 or None, not 0"),
        ({"backward_samples": 2}, "backward_samples is for the IWAE bound"),
        ({"bound": "iwae", "kl": "analytic"}, "kl='analytic' is for bound='elbo'"),
        ({"gradient": "stl", "kl": "analytic"}, "kl='analytic' is for bound='elbo' with gradient='plain'"),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae()(torch.rand(2, 6), **arguments)


@pytest.mark.parametrize("name", ["num_samples", "chunk_size", "backward_samples"])
@pytest.mark.parametrize("wrong", [2.5, True, "2"])
def test_counts_that_are_no_integers(name: str, wrong: object) -> None:
    arguments: dict[str, Any] = {"bound": "iwae", "num_samples": 4} | {name: wrong}
    with pytest.raises(TypeError, match=f"{name} must be an integer.*, not {type(wrong).__name__}"):
        vae()(torch.rand(2, 6), **arguments)


@pytest.mark.parametrize(("gradient", "backward_samples"), [("dreg", None), ("dreg", 2), ("stl", 2), ("plain", 2)])
def test_under_compile(gradient: str, backward_samples: int | None) -> None:
    """The carrier and the choice of samples survive tracing: the same gradients as in eager mode, in one graph."""
    known = Known(n=4)
    mu, logvar = (v.detach().clone().requires_grad_() for v in known.linear.encode(known.x))

    def objective(mu: Tensor, logvar: Tensor) -> Tensor:
        log_likelihood = lambda z: -(z - 1).square().sum(-1)  # noqa: E731
        log_prior = lambda z: -z.abs().sum(-1)  # noqa: E731
        more: dict[str, Any] = {"gradient": gradient, "backward_samples": backward_samples}
        return bounds.iwae(log_likelihood, log_prior, mu, logvar, 6, **more).objective.sum()

    results = []
    for run in (objective, torch.compile(objective, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(run(mu, logvar), (mu, logvar)))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*results, strict=True))
