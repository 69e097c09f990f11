"""What encoders, decoders, priors and likelihoods return: the right shape, or an error that says what it should be."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import pytest
import torch
from models import Decoder, Encoder
from torch import Tensor, nn

import fastvae
from fastvae import VAE, AggregatedPosterior, ExemplarPrior, MixturePrior, StandardNormalPrior, VampPrior, bounds

from .test_validation import raises

IMAGES = torch.rand(16, 8, 8)


class Returns(nn.Module):
    """A decoder or encoder that maps its input by a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: Tensor) -> Any:
        return self.function(value)


def constant(*event: int) -> Any:
    """z [N, D] -> zeros [N, *event]."""
    return lambda z: z.new_zeros(len(z), *event)


def pair(first: Any, second: Any) -> Any:
    return lambda z: (first(z), second(z))


def model(decoder: Any, likelihood: Any = "bernoulli", x: Tensor = IMAGES) -> VAE:
    encoder = Encoder(x[0].numel(), 3)
    return VAE(encoder, Returns(decoder), StandardNormalPrior(3), likelihood)


def passes(vae: VAE, x: Tensor) -> list[Any]:
    """Every way in which a VAE scores x."""
    return [
        lambda: vae(x),
        lambda: vae(x, num_samples=2),
        lambda: vae(x, bound="iwae", num_samples=3, chunk_size=2),
        lambda: vae.elbo(x, 2),
        lambda: vae.iwae(x, 2),
        lambda: vae.log_likelihood(x, 2),
    ]


class Absolute(fastvae.Likelihood):
    """A likelihood of one's own."""

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        return -(output - x).abs() - math.log(2)

    def mean(self, output: Tensor) -> Tensor:
        return output

    def sample(self, output: Tensor) -> Tensor:
        return output


ROW = torch.rand(16, 20)
BROADCASTS = {
    "a channel too many": (constant(1, 8, 8), "bernoulli", IMAGES, ["[3, 16, 1, 8, 8]", "[16, 8, 8]", "[N, 8, 8]"]),
    "one for all pixels": (constant(1), "bernoulli", ROW, ["[3, 16, 1]", "[16, 20]", "[N, 20]"]),
    "one for each row": (constant(8, 1), "bernoulli", IMAGES, ["[3, 16, 8, 1]", "[N, 8, 8]"]),
    "a mean for all": (pair(constant(1), constant(20)), "gaussian", ROW, ["(mean)", "[3, 16, 1]", "[N, 20]"]),
    "a variance for all": (pair(constant(20), constant(1)), "gaussian", ROW, ["(logvar)", "[3, 16, 1]", "[N, 20]"]),
    "a mean alone": (constant(1), "gaussian", ROW, ["(mean)", "[N, 20]"]),
    "a scale for all": (
        pair(constant(20), constant(1)), "discretized_logistic", ROW, ["(logscale)", "[3, 16, 1]", "[N, 20]"],
    ),
    "x without a dimension for pixels": (constant(1), "gaussian", torch.rand(16), ["[3, 16, 1]", "[16]", "[N]"]),
    "one's own, a channel too many": (
        constant(1, 8, 8), Absolute(), IMAGES, ["Absolute", "[3, 16, 8, 8]", "[3, 16, 16, 8, 8]"],
    ),
    "another size": (constant(7), "bernoulli", ROW, ["[3, 16, 7]", "[N, 20]"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROADCASTS)
def test_a_decoder_that_broadcasts(case: str) -> None:
    """Every x would be scored against the outputs for others."""
    decoder, likelihood, x, words = BROADCASTS[case]
    raises(ValueError, words, model(decoder, likelihood, x), x, num_samples=3)
    for way in passes(model(decoder, likelihood, x), x):
        raises(ValueError, words[-1:] if likelihood == "bernoulli" else [], way)


def test_a_single_image_with_a_channel_too_many() -> None:
    """B = 1, where all shapes broadcast: the number would be right, the next batch's would not."""
    raises(ValueError, ["[2, 1, 8, 8]"], model(constant(1, 8, 8)), IMAGES[:1], num_samples=2)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_right_shapes_give_the_known_number(likelihood: str) -> None:
    """The number that broadcasting got wrong: each image by itself, by torch.distributions; x of any shape."""
    for x in (IMAGES, ROW, torch.rand(16), torch.rand(16, 2, 1, 3)):
        event = x.shape[1:]
        got = model(constant(*event), likelihood, x)(x, num_samples=3).reconstruction
        if likelihood == "bernoulli":
            each = torch.full_like(x, math.log(0.5))
        else:
            each = torch.distributions.Normal(0.0, 1.0).log_prob(x)
        assert torch.allclose(got, each.reshape(16, -1).sum(1), rtol=1e-5)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "discretized_logistic"])
def test_a_decoder_that_returns_something_else(likelihood: str) -> None:
    """A pair where one tensor is meant, a tensor where a pair is: also where S = 2 would unpack it."""
    wrong = {
        "bernoulli": pair(constant(8, 8), constant(8, 8)),
        "gaussian": lambda z: (constant(8, 8)(z),) * 3,
        "discretized_logistic": constant(8, 8),
    }[likelihood]
    vae = model(wrong, likelihood)
    raises(TypeError, ["the decoder must return", "not a t"], vae, IMAGES, num_samples=2)
    raises(ValueError, ["the decoder must return [32, ...]", "[4, 8, 8]"],
           model(lambda z: torch.zeros(4, 8, 8)), IMAGES, num_samples=2)  # fmt: skip


def test_nested_outputs_reach_ones_own_likelihood() -> None:
    """A dictionary and a list of tensors, each with its samples apart, in float32 at least."""
    seen: list[Any] = []

    class Nested(Absolute):
        def log_prob(self, output: Any, x: Tensor) -> Tensor:
            seen.append(output)
            return super().log_prob(output["a"][0], x)

    def decoder(z: Tensor) -> Any:
        return {"a": [constant(8, 8)(z).bfloat16()], "b": constant(5)(z).double()}

    model(decoder, Nested())(IMAGES, num_samples=2)
    assert seen[0]["a"][0].shape == (2, 16, 8, 8) and seen[0]["a"][0].dtype == torch.float32
    assert seen[0]["b"].shape == (2, 16, 5) and seen[0]["b"].dtype == torch.float64


def test_half_precision_outputs_are_scored_in_float32() -> None:
    """The density of what a half precision decoder returns, not a density computed in half precision."""
    output = torch.randn(16, 20).bfloat16()
    vae = model(
        pair(lambda z: output.repeat(len(z) // 16, 1), lambda z: constant(20)(z).bfloat16() - 3), "gaussian", ROW
    )
    want = torch.distributions.Normal(output.float(), math.exp(-1.5)).log_prob(ROW).sum(1)
    assert torch.allclose(vae(ROW).reconstruction, want, rtol=1e-5)


ENCODERS = {
    "one tensor": (lambda x: x, TypeError, ["a tensor [2, 6]"]),
    "three": (lambda x: (x, x, x), TypeError, ["a tuple of 3"]),
    "a number": (lambda x: (x, 0.0), TypeError, ["a tuple of 2"]),
    "a distribution": (lambda x: torch.distributions.Normal(x, x.exp()), TypeError, ["a Normal"]),
    "logvar [B]": (lambda x: (x[:, :2], x[:, 0]), ValueError, ["mu [2, 2]", "logvar [2]"]),
    "logvar [B, 1]": (lambda x: (x, x[:, :1]), ValueError, ["mu [2, 6]", "logvar [2, 1]"]),
    "another D": (lambda x: (x, x[:, :3]), ValueError, ["mu [2, 6]", "logvar [2, 3]"]),
    "another B": (lambda x: (x[:1], x[:1]), ValueError, ["mu [1, 6]", "[2, 6]"]),
    "an image": (lambda x: (x[:, None], x[:, None]), ValueError, ["mu [2, 1, 6]"]),
}


@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_that_returns_something_else(case: str) -> None:
    """For every pass of a VAE, and wherever a prior encodes; two rows, which unpack in silence."""
    function, error, words = ENCODERS[case]
    words = ["the encoder must return (mu, logvar), both [B, D]", *words]
    encoder, x = Returns(function), torch.rand(2, 6)
    vae = VAE(encoder, Decoder(), StandardNormalPrior(3))
    for way in (*passes(vae, x), lambda: vae.reconstruct(x), lambda: AggregatedPosterior.of(encoder, x)):
        raises(error, words, way)
    for prior in (VampPrior(encoder, x), VampPrior(encoder, x, chunk_size=2), ExemplarPrior(encoder, x)):
        raises(error, words, prior.log_prob, torch.zeros(1, 3))
        raises(error, words, prior.sample, 2)


def test_lists_do() -> None:
    """A list of mu and logvar, as DataParallel and scripted modules return them."""
    vae = VAE(Returns(lambda x: [x[:, :3], x[:, 3:]]), Decoder(), StandardNormalPrior(3))
    assert vae(torch.rand(2, 6)).mu.shape == (2, 3)


@pytest.mark.parametrize("prior", [StandardNormalPrior(7), MixturePrior(torch.zeros(5, 7)),
                                   AggregatedPosterior(torch.zeros(5, 7), torch.zeros(()))])  # fmt: skip
def test_a_prior_of_another_dimension(prior: fastvae.Prior) -> None:
    """Of 7 dimensions under an encoder of 4, in every pass and in every measure."""
    vae, x = VAE(Encoder(6, 4), Decoder(4), prior), torch.rand(2, 6)
    for way in passes(vae, x):
        raises(ValueError, ["7"], way)
    for z in (torch.zeros(2, 4), torch.zeros(2, 8)):
        raises(ValueError, ["z must be [..., 7]", str(list(z.shape))], prior.log_prob, z)
        raises(ValueError, ["z must be [..., 7]", str(list(z.shape))], prior.marginal_log_prob, z)
    q = AggregatedPosterior(torch.zeros(5, 4), torch.zeros(()))
    for measure in (q.marginal_kl, q.dimension_wise_kl):
        raises(ValueError, ["z must be [..., 7]", "4]"], measure, prior, 10)


def test_the_standard_priors_dimension_is_named() -> None:
    raises(ValueError, ["mu must be [..., 7]", "[2, 4]", "latent_dim"],
           VAE(Encoder(6, 4), Decoder(4), StandardNormalPrior(7)), torch.rand(2, 6))  # fmt: skip


class OwnPrior(fastvae.Prior):
    """A standard normal whose results are wrong as told."""

    def __init__(self, log_prob: Any = lambda p: p, sample: Any = lambda z: z) -> None:
        super().__init__()
        self.wrong_log_prob, self.wrong_sample = log_prob, sample

    def log_prob(self, z: Tensor) -> Tensor:
        return self.wrong_log_prob(StandardNormalPrior(3).marginal_log_prob(z))

    def sample(self, n: int) -> Tensor:
        return self.wrong_sample(torch.randn(n, 3))


def test_a_prior_of_ones_own() -> None:
    """Right, it works everywhere; its log_prob not summed, summed too far, or no tensor: each pass refuses it."""
    x = torch.rand(4, 6).round()
    right = VAE(Encoder(), Decoder(), OwnPrior(lambda p: p.sum(-1)))
    for way in passes(right, x):
        way()
    assert right.sample(5).shape == (5, 6)
    for wrong, word in ((lambda p: p, "3]"), (lambda p: p.sum(), "[]"), (lambda p: p.sum(-1, keepdim=True), "1]")):
        for way in passes(VAE(Encoder(), Decoder(), OwnPrior(wrong)), x):
            raises(ValueError, ["must be", word, "of z"], way)
    raises(TypeError, ["must be a tensor"], VAE(Encoder(), Decoder(), OwnPrior(lambda p: 0.0)), x)
    raises(
        ValueError, ["sample(5)", "[5, D]", "[3]"], VAE(Encoder(), Decoder(), OwnPrior(sample=lambda z: z[0])).sample, 5
    )


def test_a_prior_whose_kl_is_wrong() -> None:
    class Wrong(OwnPrior):
        has_closed_form_kl = True

        def kl(self, mu: Tensor, logvar: Tensor, num_samples: int | None = None, **_: Any) -> tuple[Tensor, Tensor]:
            z, _ = fastvae.gaussian_rsample(mu, logvar, num_samples)
            return z, fastvae.gaussian_kl(mu, logvar)  # [B], not [S, B]

    raises(
        ValueError, ["kl must be [3, 4]", "[4]"], VAE(Encoder(), Decoder(), Wrong()), torch.rand(4, 6), num_samples=3
    )


def test_a_mixture_of_ones_own() -> None:
    """`components` is all that it takes; a shared logvar is broadcast."""

    class UnitVariances(fastvae.Mixture):
        def __init__(self) -> None:
            super().__init__()
            self.mu = nn.Parameter(10 * torch.arange(4.0)[:, None].expand(4, 3).clone())

        def components(self) -> tuple[Tensor, Tensor, Tensor]:
            return self.mu, self.mu.new_zeros(()), torch.tensor([0.5, 0.0, 0.25, 0.25]).log()

    prior = UnitVariances()
    z = prior.sample(4000)
    own = (z.mean(1) / 10).round().long().bincount(minlength=4)
    assert own[1] == 0 and abs(int(own[0]) - 2000) < 5 * math.sqrt(1000)
    want = fastvae.mixture_log_prob(z, prior.mu, torch.zeros(4, 3), prior.components()[2])
    for got in (prior.log_prob(z), prior.snapshot().log_prob(z), prior.density()(z)):
        assert torch.allclose(got, want, rtol=1e-5)
    assert prior.marginal_log_prob(z).shape == z.shape
    model = VAE(Encoder(), Decoder(), prior)
    for way in passes(model, torch.rand(4, 6).round()):
        way()


@pytest.mark.parametrize("base", [fastvae.Prior, fastvae.Mixture, fastvae.Likelihood])
def test_the_examples_of_the_docstrings(base: Any) -> None:
    """They run as they stand, and a VAE trains and samples with them."""
    example = textwrap.dedent(base.__doc__.partition("Example::\n")[2])
    names: dict[str, Any] = {"fastvae": fastvae, "torch": torch, "math": math}
    names |= {"encoder": Encoder(), "decoder": Decoder(), "prior": StandardNormalPrior(3)}
    exec(example, names)
    (own,) = [v for v in names.values() if isinstance(v, type) and issubclass(v, base)]
    if base is fastvae.Likelihood:
        vae = names["vae"]
    else:
        vae = VAE(Encoder(), Decoder(), own(3) if base is fastvae.Prior else own(torch.randn(5, 3)))
    assert isinstance(vae.likelihood, fastvae.Likelihood)
    for way in passes(vae, torch.rand(4, 6).round()):
        assert bool(torch.isfinite(torch.as_tensor(getattr(way(), "loss", 0.0))))
    assert vae.sample(5).shape == vae.sample(5, mean=True).shape == (5, 6)


def test_what_a_subclass_lacks() -> None:
    """An abstract method's name, when it is needed."""
    raises(NotImplementedError, ["Prior must define log_prob"], fastvae.Prior().log_prob, torch.zeros(2, 3))
    raises(NotImplementedError, ["Prior must define sample"], fastvae.Prior().sample, 2)
    raises(NotImplementedError, ["Mixture must define components"], fastvae.Mixture().log_prob, torch.zeros(2, 3))

    class Half(fastvae.Likelihood):
        def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
            return output

    raises(TypeError, ["Half", "mean"], Half)


class Duck:
    """Not a subclass, but with the methods."""

    log_prob, mean, sample = Absolute.log_prob, Absolute.mean, Absolute.sample


def test_what_a_vae_is_made_of() -> None:
    """Any object with the methods of a likelihood; what lacks one, a class, or a name for a prior is refused."""
    encoder, decoder, prior = Encoder(), Decoder(), StandardNormalPrior(3)
    VAE(encoder, decoder, prior, Duck())(torch.rand(2, 6))
    raises(TypeError, ["likelihood must", "no log_prob, mean, sample"], VAE, encoder, decoder, prior, object())
    raises(TypeError, ["likelihood must", "class Absolute itself"], VAE, encoder, decoder, prior, Absolute)
    raises(TypeError, ["prior must be a fastvae.Prior", "'vamp'", "log_prob"], VAE, encoder, decoder, "vamp")
    raises(TypeError, ["prior must", "class StandardNormalPrior itself"], VAE, encoder, decoder, StandardNormalPrior)
    raises(TypeError, ["prior must", "a Normal has no kl"], VAE, encoder, decoder, torch.distributions.Normal(0.0, 1.0))


def test_a_likelihood_with_parameters() -> None:
    """A module too: its parameters are the VAE's, and learn."""

    class Scaled(nn.Module, fastvae.Likelihood):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
            return torch.distributions.Laplace(output, self.log_scale.exp()).log_prob(x)

        def mean(self, output: Tensor) -> Tensor:
            return output

        def sample(self, output: Tensor) -> Tensor:
            return torch.distributions.Laplace(output, self.log_scale.exp()).sample()

    vae = VAE(Encoder(), Decoder(), StandardNormalPrior(3), Scaled())
    vae(torch.rand(4, 6)).loss.backward()
    assert "likelihood.log_scale" in vae.state_dict() and vae.likelihood.log_scale.grad.abs() > 0


def test_bounds_check_their_functions() -> None:
    """log p(x | z) and log p(z) of z [s, B, D] are [s, B]: what broadcasts to it is refused, and named."""
    mu, logvar = torch.zeros(4, 3), torch.zeros(4, 3)
    good = lambda z: z.sum(-1)  # noqa: E731
    for estimate in (bounds.elbo, bounds.iwae):
        raises(ValueError, ["log_likelihood of z [2, 4, 3] must be [2, 4], not [4]"],
               estimate, lambda z: good(z)[0], good, mu, logvar, 2)  # fmt: skip
        raises(ValueError, ["log_prior of z [2, 4, 3] must be [2, 4], not [2, 4, 1]"],
               estimate, good, lambda z: good(z)[..., None], mu, logvar, 2)  # fmt: skip


def test_reconstructions_have_the_shape_of_x() -> None:
    raises(
        ValueError,
        ["the likelihood's mean", "[16, 8, 8]", "[16, 1, 8, 8]"],
        model(constant(1, 8, 8)).reconstruct,
        IMAGES,
    )


@pytest.mark.parametrize("prior", [MixturePrior, AggregatedPosterior])
def test_the_logvar_of_components(prior: Any) -> None:
    """[D] wins where K = D; else a logvar [K] is refused, and [K, 1] named; what is no tensor is refused too."""
    mu = torch.zeros(7, 3)
    raises(ValueError, ["logvar must", "[7, 3]", "[7]", "[7, 1]", "logvar[:, None]"], prior, mu, torch.zeros(7))
    raises(ValueError, ["logvar must", "[7, 3]", "[2, 3]"], prior, mu, torch.zeros(2, 3))
    raises(TypeError, ["logvar must be a tensor"], prior, mu, 0.0)
    raises(TypeError, ["mu must be a tensor"], prior, [[0.0]], torch.zeros(1))
    raises(
        ValueError, ["logvar must", "[7]", "[7, 1]"], fastvae.mixture_log_prob, torch.zeros(2, 3), mu, torch.zeros(7)
    )
    raises(
        ValueError,
        ["prior_logvar[:, None]"],
        fastvae.mixture_kl,
        torch.zeros(2, 3),
        torch.zeros(2, 3),
        mu,
        torch.zeros(7),
    )
    square, logvar = torch.randn(3, 3), torch.tensor([0.0, 1.0, 2.0])
    z = torch.randn(5, 3)
    got = prior(square, logvar).log_prob(z)
    assert torch.equal(got, prior(square, logvar.expand(3, 3)).log_prob(z))
    assert torch.equal(got, fastvae.mixture_log_prob(z, square, logvar))
    assert not torch.allclose(got, prior(square, logvar[:, None]).log_prob(z))


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretized_logistic"])
def test_x_outside_the_unit_interval(likelihood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every x is looked at where that costs nothing; elsewhere the first one; none while a graph is traced."""
    decoder = constant(20) if likelihood == "bernoulli" else pair(constant(20), constant(20))
    raises(ValueError, ["x must be in [0, 1]", "-0.5 ... 1.5"], model(decoder, likelihood, ROW), 2 * ROW.round() - 0.5)
    vae = model(decoder, likelihood, ROW)
    vae(ROW)
    raises(ValueError, ["x must be in [0, 1]", "255"], vae, ROW.round() * 255)
    vae(torch.zeros(0, 20))
    outside = 2 * ROW
    compiled = torch.compile(vae, fullgraph=True, backend="aot_eager")
    assert bool(torch.isfinite(compiled(outside).loss))
    assert bool(
        torch.isfinite(torch.func.vmap(vae.likelihood.log_prob)(vae.decoder(torch.zeros(16, 3)), outside)).all()
    )

    monkeypatch.setattr("fastvae.likelihoods._READ_AT_NO_COST", ())
    vae = model(decoder, likelihood, ROW)
    for _ in range(2):  # a refused x is not the first one
        raises(ValueError, ["x must be in [0, 1]"], vae, outside)
    vae(ROW)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "aminmax", None)  # not called again
        vae(outside)
    model(constant(20), "gaussian", ROW)(outside)
