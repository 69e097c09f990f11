"""A VAE given y: known log-likelihoods, what encoder, decoder and prior are called with, sampling, and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import Decoder, Encoder, LinearGaussian
from torch import Tensor, nn

from fastvae import (
    VAE,
    ExemplarPrior,
    HierarchicalVAE,
    MixturePrior,
    Prior,
    StandardNormalPrior,
    TrainingStep,
    VampPrior,
    reference,
)

L = 3


class GivenLabel(nn.Module):
    """x [B, 6] and y int64 [B] -> (mu, logvar) [B, D], or z and y -> logits; notes the y of each call."""

    def __init__(self, inputs: int, outputs: int, pair: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs + L, outputs * (1 + pair))
        self.pair = pair
        self.given: list[Tensor] = []

    def forward(self, x: Tensor, y: Tensor) -> Any:
        self.given.append(y)
        together = self.layer(torch.cat([x, nn.functional.one_hot(y, L).to(x)], -1))
        return together.chunk(2, -1) if self.pair else together


class Shifted(LinearGaussian):
    """x = W z + b + c_y + noise, and z ~ N(m_y, v): log p(x | y) and the posterior are known."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__(off=off)
        rng = torch.Generator().manual_seed(3)
        self.c, self.m = (torch.randn(L, n, generator=rng, dtype=torch.float64) for n in (6, 3))
        self.v = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def posterior(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        precision = 1 / self.v + self.W.square().sum(0) / self.variance
        mu = ((x - self.b - self.c[y]) @ self.W / self.variance + self.m[y] / self.v) / precision
        return mu, (-precision.log() + self.off).expand_as(mu)

    def forward(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mean, logvar = super().forward(z)
        return mean + self.c[y], logvar

    def conditional_vae(self, prior: Prior) -> VAE:
        encoder = nn.Module()
        encoder.forward = self.posterior  # type: ignore[method-assign]
        return VAE(encoder, self, prior.double(), likelihood="gaussian")


def test_known_log_likelihood_of_gaussians() -> None:
    """With the exact posterior every bound is log p(x | y) itself, whatever the draws."""
    model, y = Shifted(), torch.tensor([2, 0, 1, 1, 0])
    x = torch.randn(5, 6, dtype=torch.float64)
    vae = model.conditional_vae(MixturePrior(model.m, model.v.log(), labels=torch.arange(L)))
    want = torch.stack(
        [model.marginal(model.m[k], model.v).log_prob(row - model.c[k]) for row, k in zip(x, y, strict=True)]
    )
    for got in (
        vae.elbo(x, y=y),
        vae.elbo(x, 3, gradient="stl", chunk_size=2, y=y),
        vae.iwae(x, 4, y=y),
        vae.log_likelihood(x, 7, y=y),
        vae(x, y, bound="iwae", num_samples=2).bound,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shared", [False, True])
def test_known_log_likelihood_of_mixtures(shared: bool) -> None:
    """p(z | y) of several components: its own ones, or all with the label's weights."""
    model, y = Shifted(off=1.5), torch.tensor([2, 0, 1, 1, 0])
    x = torch.randn(5, 6, dtype=torch.float64)
    mu, logvar = torch.randn(6, 3, dtype=torch.float64), 0.3 * torch.randn(6, 3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 0])
    probs = torch.rand(L, 6) if shared else torch.rand(6)
    prior = MixturePrior(mu, logvar, probs=probs, labels=None if shared else labels)
    weights = (probs if shared else torch.where(labels == torch.arange(L)[:, None], probs, 0.0)).double()
    weights = weights / weights.sum(1, keepdim=True)  # [L, K]
    want = torch.stack(
        [
            sum(
                weights[k, j] * model.marginal(mu[j], logvar[j].exp()).log_prob(row - model.c[k]).exp()
                for j in range(6)
            ).log()
            for row, k in zip(x, y.tolist(), strict=True)
        ]
    )
    got = model.conditional_vae(prior).log_likelihood(x, 40_000, y=y)
    torch.testing.assert_close(got, want.detach(), rtol=0, atol=0.05)


def by_sub_mixtures(prior: MixturePrior | VampPrior, z: Tensor, y: Tensor) -> Tensor:
    """The specification, with the components of each row's label cut out."""
    mu, logvar, log_weights = prior.components()
    logvar = logvar.expand(mu.shape)
    rows = []
    for m, label in enumerate(y.tolist()):
        own = torch.ones(len(mu), dtype=torch.bool) if log_weights.ndim == 2 else prior.component_labels() == label
        chosen = (log_weights[label] if log_weights.ndim == 2 else log_weights)[own]
        rows.append(reference.mixture_log_prob(z[..., m, :], mu[own], logvar[own], torch.log_softmax(chosen, 0)))
    return torch.stack(rows, -1)


def conditional_priors(encoder: nn.Module) -> dict[str, MixturePrior | VampPrior]:
    u, labels = torch.rand(7, 6), torch.tensor([2, 0, 1, 0, 1, 2, 2])
    return {
        "own": VampPrior(encoder, u, labels=labels, learn_weights=True, probs=torch.rand(7)),
        "chunks": VampPrior(encoder, u, labels=labels, chunk_size=3),
        "weights": VampPrior(encoder, u, labels=labels, probs=torch.rand(L, 7), learn_weights=True),
        "mixture": MixturePrior(torch.randn(7, 3), labels=labels),
    }


@pytest.mark.parametrize("name", ["own", "chunks", "weights", "mixture"])
def test_prior_given_labels(name: str) -> None:
    """Densities and gradients, and those of the snapshot and of a density for a step."""
    encoder = GivenLabel(6, 3, pair=True).double()
    prior = conditional_priors(encoder)[name].double()
    z, y = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([1, 0, 2, 2, 0])
    assert prior.conditional
    want = by_sub_mixtures(prior, z, y)
    leaves = [z, *(p for p in (*prior.parameters(), *encoder.parameters()) if p.requires_grad)]
    leaves = leaves if name != "mixture" else leaves[:4]
    gradients = torch.autograd.grad(want.square().sum(), leaves)
    for density in (prior.density(y=y), lambda z: prior.log_prob(z, y)):
        got = density(z)
        torch.testing.assert_close(got, want)
        for g, w in zip(torch.autograd.grad(got.square().sum(), leaves), gradients, strict=True):
            torch.testing.assert_close(g, w)
    torch.testing.assert_close(prior.snapshot().density(y=y)(z), want.detach(), check_dtype=True)
    if name != "weights":  # without y all components count
        torch.testing.assert_close(prior.distribution().log_prob(z), prior.log_prob(z))
        whole = reference.mixture_log_prob(z, *prior.components())
        torch.testing.assert_close(prior.log_prob(z), whole)
        assert prior.sample(4).shape == (4, 3)


def test_components_are_encoded_with_their_labels() -> None:
    encoder, u = GivenLabel(6, 3, pair=True), torch.rand(7, 6)
    labels = torch.tensor([2, 0, 1, 0, 1, 2, 2])
    prior = VampPrior(encoder, u, labels=labels, chunk_size=3, refresh=0.5)
    mu, _, _ = prior.components()
    torch.testing.assert_close(mu, encoder(u, labels)[0])
    assert torch.equal(torch.cat(encoder.given[:3]), labels)
    index = torch.tensor([5, 1, 2])
    torch.testing.assert_close(prior.component_parameters(index)[0], mu[index])
    torch.testing.assert_close(prior.train().step_components()[0], mu)  # by turns, nothing having changed


@pytest.mark.parametrize("name", ["own", "weights", "mixture"])
def test_samples_given_labels(name: str) -> None:
    """Draws come from the label's components, by their weights."""
    mu = 100.0 * torch.eye(3).repeat(2, 1)  # components 0 and 3 at one place, and so on
    labels = torch.arange(6) % 3
    if name == "weights":
        prior = MixturePrior(mu, probs=torch.eye(3).repeat(1, 2))
    elif name == "own":
        prior = MixturePrior(mu, labels=labels, probs=torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0, 1.0]))
    else:
        prior = MixturePrior(mu + torch.arange(6)[:, None] // 3 * 50.0, labels=labels)
    y = torch.randint(3, (3000,))
    z = prior.sample(3000, y)
    assert torch.equal(z.argmax(1), y)
    if name == "mixture":
        assert abs(float((z.amax(1) > 125).float().mean()) - 0.5) < 0.05  # both of its components
    assert prior.sample(0, y[:0]).shape == (0, 3)


def model(prior: str = "own") -> VAE:
    encoder = GivenLabel(6, 3, pair=True)
    chosen = StandardNormalPrior(3) if prior == "standard" else conditional_priors(encoder)[prior]
    return VAE(encoder, GivenLabel(3, 6, pair=False), chosen)


@pytest.mark.parametrize("prior", ["own", "weights", "mixture", "standard"])
def test_every_row_meets_its_own_y(prior: str) -> None:
    """A batch gives what its rows give one by one, with S samples too; decoder rows are in the order of z."""
    vae, y, x = model(prior), torch.tensor([1, 0, 2, 2]), torch.rand(4, 6)
    torch.manual_seed(1)
    output = vae(x, y, num_samples=3)
    assert torch.equal(vae.decoder.given[-1], y.repeat(3))
    for b in range(4):
        z = output.z[:, b : b + 1]
        log_x = vae.likelihood.log_prob(vae.decoder(z[:, 0], y[b].expand(3)), x[b]).sum(-1)
        torch.testing.assert_close(output.reconstruction[b], log_x.mean())
        if prior != "standard":
            log_p = vae.prior.density(y=y[b : b + 1])(z)
            q = torch.distributions.Normal(output.mu[b], (0.5 * output.logvar[b]).exp())
            torch.testing.assert_close(output.kl[b], (q.log_prob(z).sum(-1) - log_p).mean())
    torch.testing.assert_close(vae.reconstruct(x, y)[:1], vae.reconstruct(x[:1], y[:1]))
    assert vae.sample(5, y=torch.tensor([0, 1, 2, 0, 1]), mean=True).shape == (5, 6)


def test_gradients_reach_everything() -> None:
    vae, y, x = model(), torch.tensor([1, 0, 2, 2]), torch.rand(4, 6)
    vae(x, y, bound="iwae", num_samples=4).loss.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name


class CovariatePrior(Prior):
    """p(z | y) = N(A y, I) for covariates y [B, 2]."""

    conditional = True

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(2, 3)

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return torch.distributions.Normal(self.map(y), 1.0).log_prob(z).sum(-1)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor) -> Tensor:  # type: ignore[override]
        return torch.normal(self.map(y), 1.0)


class WithCovariates(nn.Module):
    def __init__(self, inputs: int, outputs: int, pair: bool) -> None:
        super().__init__()
        self.layer, self.pair = nn.Linear(inputs + 2, outputs * (1 + pair)), pair

    def forward(self, x: Tensor, y: Tensor) -> Any:
        together = self.layer(torch.cat([x, y], -1))
        return together.chunk(2, -1) if self.pair else together


def test_covariates_and_a_prior_of_ones_own() -> None:
    vae = VAE(WithCovariates(6, 3, True), WithCovariates(3, 6, False), CovariatePrior())
    x, y = torch.rand(5, 6), torch.randn(5, 2)
    for output in (vae(x, y, num_samples=2), vae(x, y, bound="iwae", num_samples=3, chunk_size=2)):
        output.loss.backward()
        assert output.bound.shape == (5,)
    assert vae.log_likelihood(x, 10, y=y).shape == (5,) and vae.sample(5, y=y).shape == (5, 6)


def test_without_y_nothing_is_passed() -> None:
    """Encoders, decoders and priors of one argument, as ever; state_dict without labels."""
    encoder = Encoder()
    vae = VAE(encoder, Decoder(), VampPrior(encoder, torch.rand(5, 6)))
    vae(torch.rand(4, 6)).loss.backward()
    assert not vae.prior.conditional
    assert list(vae.prior.state_dict()) == ["pseudo_inputs", "logits"]


def test_labels_are_saved() -> None:
    vae, other = model(), model()
    assert isinstance(vae.prior, VampPrior) and isinstance(other.prior, VampPrior)
    vae.prior.labels = vae.prior.labels.flip(0)
    other.load_state_dict(vae.state_dict())
    assert torch.equal(other.prior.labels, vae.prior.labels)


@pytest.mark.parametrize("labels", [[5, 6, 7], [-1, 0, 1]])
def test_labels_of_a_mixture_of_ones_own_are_numbered_from_0(labels: list[int]) -> None:
    class Own(MixturePrior):
        def component_labels(self) -> Tensor:
            return torch.tensor(labels)

    prior = Own(torch.zeros(3, 2), labels=torch.arange(3))
    for use in (
        lambda: prior.log_prob(torch.zeros(1, 2), torch.tensor([0])),
        lambda: prior.sample(1, torch.tensor([0])),
    ):
        with pytest.raises(ValueError, match=r"component_labels\(\) must be numbered 0 ... L - 1"):
            use()


def test_training_step_passes_y() -> None:
    torch.manual_seed(2)
    vae, y = model(), torch.tensor([1, 0, 2, 2])
    step = TrainingStep(vae, torch.optim.Adam(vae.parameters(), lr=0.01), num_samples=2)
    images = torch.rand(4, 6)
    first = float(step(images, y).loss)
    assert torch.equal(vae.decoder.given[-1], y.repeat(2))
    losses = [float(step(images, y=y).loss) for _ in range(200)]
    assert sum(losses[-20:]) / 20 < first - 0.3


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["weights", "own", "mixture"])
def test_compiles_without_a_break(kind: str) -> None:
    vae, y, x = model(kind), torch.tensor([1, 0, 2, 2]), torch.rand(4, 6)
    for module in (vae.encoder, vae.decoder):
        module.given = _Nothing()
    compiled = torch.compile(vae, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    got = compiled(x, y)
    torch.manual_seed(0)
    torch.testing.assert_close(got.loss, vae(x, y).loss)


@pytest.mark.parametrize("kind", ["weights", "own", "mixture"])
def test_exported_with_any_batch(kind: str) -> None:
    vae = model(kind).eval()
    for module in (vae.encoder, vae.decoder):
        module.given = _Nothing()
    batch = torch.export.Dim("batch")
    x, y = torch.rand(4, 6), torch.tensor([1, 0, 2, 2])
    program = torch.export.export(vae, (x, y), dynamic_shapes={"x": {0: batch}, "y": {0: batch}}).module()
    x, y = torch.rand(7, 6), torch.tensor([1, 0, 2, 2, 0, 0, 1])
    torch.manual_seed(0)
    got = program(x, y)
    torch.manual_seed(0)
    torch.testing.assert_close(got.bound, vae(x, y).bound)


class _Nothing(list):  # type: ignore[type-arg]
    def append(self, _: Tensor) -> None: ...


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda vae, x, y: vae(x), ValueError, "the VampPrior is conditional: give y, a row for each x"),
        (lambda vae, x, y: vae.sample(3), ValueError, "the VampPrior is conditional: give y, a row for each draw"),
        (lambda vae, x, y: vae(x, [0, 1]), TypeError, "y must be a tensor, not a list"),
        (lambda vae, x, y: vae(x, y[:3]), ValueError, r"y must be \[4, ...\], a row for each x, not \[3\]"),
        (lambda vae, x, y: vae.log_likelihood(x, 5, y=y[:3]), ValueError, r"y must be \[4, ...\]"),
        (lambda vae, x, y: vae.sample(3, y=y), ValueError, r"y must be \[3, ...\], a row for each draw, not \[4\]"),
        (lambda vae, x, y: vae.prior.log_prob(x[:, :3], y + 3), ValueError, r"y must be in 0 ... 2.*spans 3 ... 5"),
        (lambda vae, x, y: vae.prior.log_prob(x[:, :3], y.float()), ValueError, r"y must be int64 \[B\].*float32"),
        (lambda vae, x, y: vae.prior.log_prob(x[:3, :3], y), ValueError, r"y must be \[B\] to match z.*not \[4\]"),
        (lambda vae, x, y: vae.prior.sample(2, y), ValueError, r"y must be \[2\], not \[4\]"),
        (lambda vae, x, y: MixturePrior(x, labels=y).fit(x), ValueError, "a conditional MixturePrior cannot be fitted"),
        (lambda vae, x, y: MixturePrior(x).log_prob(x, y), ValueError, "this MixturePrior is not conditional"),
        (lambda vae, x, y: MixturePrior(x).kl(x, x, y=y), ValueError, "this MixturePrior is not conditional"),
        (lambda vae, x, y: StandardNormalPrior(6).kl(x, x, y=y), ValueError, "StandardNormalPrior is not conditional"),
        (lambda vae, x, y: StandardNormalPrior(6).density(y=y), ValueError, "StandardNormalPrior is not conditional"),
        (lambda vae, x, y: ExemplarPrior(nn.Identity(), x).density(y=y), ValueError, "is not conditional"),
        (lambda vae, x, y: MixturePrior(x, probs=torch.ones(2, 4)).log_prob(x), ValueError, "depend on y: give y"),
        (lambda vae, x, y: MixturePrior(x, probs=torch.ones(2, 4)).sample(3), ValueError, "depend on y: give y"),
        (lambda vae, x, y: MixturePrior(x, probs=torch.ones(2, 4)).distribution(), ValueError, "depend on y"),
        (lambda vae, x, y: MixturePrior(x, probs=torch.ones(2, 4)).marginal_log_prob(x), ValueError, "depend on y"),
        (lambda vae, x, y: MixturePrior(x, probs=torch.ones(2, 4), labels=y), ValueError, "labels and probs"),
        (lambda vae, x, y: MixturePrior(x, probs=torch.zeros(2, 4)), ValueError, "probs must be finite"),
        (lambda vae, x, y: MixturePrior(x, labels=y[:3]), ValueError, r"labels must be \[4\], a label for each"),
        (lambda vae, x, y: MixturePrior(x, labels=y.int()), TypeError, "labels must be an int64 tensor"),
        (lambda vae, x, y: MixturePrior(x, labels=y - 1), ValueError, "labels must be numbered 0 ... L - 1"),
        (lambda vae, x, y: MixturePrior(x, labels=y + 1), ValueError, "labels must be numbered 0 ... L - 1"),
        (
            lambda vae, x, y: MixturePrior(x, labels=y, probs=torch.tensor([1.0, 0, 1, 1])),
            ValueError,
            "whose weight is not 0; they span 0 ... 2, and 2 of them",
        ),
    ],
)
def test_mistakes(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(model(), torch.rand(4, 6), torch.tensor([1, 0, 2, 2]))


def test_a_label_without_mass_stays_finite() -> None:
    """Rows far from every component of their label: -inf or very low, but no NaN in any gradient."""
    prior = MixturePrior(torch.zeros(2, 2), labels=torch.arange(2))
    z = torch.tensor([[1e6, 0.0], [0.0, 0.0]], requires_grad=True)
    value = prior.log_prob(z, torch.tensor([0, 1]))
    far, near = value.tolist()
    assert far < -1e11 and math.isclose(near, -math.log(2 * math.pi), rel_tol=1e-6)
    value.sum().backward()
    assert z.grad is not None and bool(z.grad.isfinite().all())


def test_two_levels_take_no_y() -> None:
    encoder = Encoder()
    vae = HierarchicalVAE(encoder, nn.Identity(), nn.Identity(), nn.Identity(), StandardNormalPrior(3))
    for call in (lambda: vae(torch.rand(2, 6), torch.arange(2)), lambda: vae.sample(2, y=torch.arange(2))):
        with pytest.raises(ValueError, match="a HierarchicalVAE is not conditional, and takes no y"):
            call()
