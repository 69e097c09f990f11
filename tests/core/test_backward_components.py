"""A backward pass of few of a mixture's encodings: an exact density, and a gradient whose mean is that of all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import Decoder, Encoder
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from fastvae import VAE, ExemplarPrior, VampPrior, _few
from fastvae._noise import PartOfBatch, rows_of_batch
from fastvae.em.responsibilities import responsibility_sums
from fastvae.priors import Density
from fastvae.priors.encoded import _OfFew

K = 12
INDEX = torch.tensor([4, -1, 9])

PRIORS = {
    "vamp": {},
    "vamp, learned weights": {"learn_weights": True},
    "exemplar": {},
    "exemplar, in chunks": {"chunk_size": 2},
    "exemplar, one variance": {"shared_variance": True},
    "exemplar, of a subset": {"subset": 9},
    "exemplar, one variance, of a subset": {"shared_variance": True, "subset": 9},
}


class Case:
    """A prior of twelve encoded inputs, and points z [2, 3, D]; in float64."""

    def __init__(self, which: str, reach: float = 2.0) -> None:
        torch.manual_seed(0)
        self.which, self.encoder, self.data = which, Encoder().double(), torch.rand(K, 6, dtype=torch.float64)
        with torch.no_grad():
            self.encoder.mu.weight.mul_(reach)
        self.z = torch.randn(2, 3, 3, dtype=torch.float64)

    def density(self, few: int | None, **options: Any) -> tuple[ExemplarPrior | VampPrior, Density]:
        options = {**PRIORS[self.which], "backward_components": few, **options}
        torch.manual_seed(1)  # the same subset
        if self.which.startswith("vamp"):
            prior: ExemplarPrior | VampPrior = VampPrior(self.encoder, self.data, **options)
            return prior, prior.density()
        prior = ExemplarPrior(self.encoder, self.data, **options)
        return prior, prior.density(INDEX)

    def gradients(self, few: int | None, **options: Any) -> tuple[Tensor, Tensor]:
        """Of log p(z): it and its gradient in z and in weights or a shared variance; and that by way of the encodings.

        Rows differ in what arrives for them.  Both are flat.
        """
        prior, density = self.density(few, **options)
        z = self.z.clone().requires_grad_()
        log_prob = density(z)
        beside = [z, *(p for name, p in prior.named_parameters() if name != "pseudo_inputs")]
        encoded = [*self.encoder.parameters(), *(p for n, p in prior.named_parameters() if n == "pseudo_inputs")]
        arriving = torch.linspace(0.5, 2.0, log_prob.numel(), dtype=log_prob.dtype).view_as(log_prob)
        found = torch.autograd.grad((log_prob * arriving).sum(), [*beside, *encoded], allow_unused=True)
        flat = [g.flatten() for g in found if g is not None]
        n = len(beside)
        return torch.cat([log_prob.detach().flatten(), *flat[:n]]), torch.cat(flat[n:])


def by_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choices come from a generator of their own, so that a seed decides all else."""
    choice = torch.Generator().manual_seed(3)
    monkeypatch.setattr(_few, "_uniform", lambda v: torch.rand(len(v), dtype=v.dtype, generator=choice))


@pytest.mark.parametrize("which", PRIORS)
def test_the_mean_gradient_is_that_of_all(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the choices of 4 components; and all that does not go by way of the encodings is exact each time."""
    case = Case(which)
    by_generator(monkeypatch)
    exact, of_all = case.gradients(None)
    drawn = []
    for _ in range(400):
        beside, of_few = case.gradients(4)
        assert torch.allclose(beside, exact, rtol=1e-10, atol=1e-12)
        drawn.append(of_few)
    directions = torch.stack((of_all / of_all.norm(), torch.randn_like(of_all), torch.randn_like(of_all)))
    difference = (torch.stack(drawn) - of_all) @ directions.T
    error = difference.std(0) / math.sqrt(len(drawn))
    assert 0 < error[0] < 0.1 * of_all.norm()
    assert bool((difference.mean(0).abs() < 5 * error).all())


@pytest.mark.parametrize("which", PRIORS)
@pytest.mark.parametrize("few", [K, K + 1, 10**9])
def test_all_components_are_no_few(which: str, few: int) -> None:
    case = Case(which)
    for got, wanted in zip(case.gradients(few), case.gradients(None), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("which", PRIORS)
def test_it_is_exact_where_few_have_a_part(which: str) -> None:
    """Components far apart, and rows beside three of them: the others' responsibilities are 0, or below a rounding."""
    case = Case(which, reach=400.0)
    with torch.no_grad():
        case.z = case.encoder(case.data)[0][[0, 5, 7, 5, 0, 0]].view(2, 3, 3) + 0.1 * case.z
    for got, wanted in zip(case.gradients(3), case.gradients(None), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize("absent", ["excluded", "of weight 0"])
def test_a_component_that_does_not_count_takes_no_place(absent: str) -> None:
    """Rows beside component 0, which they leave out: the gradient is exact with places for the two others alone."""
    case = Case("vamp" if absent == "of weight 0" else "exemplar", reach=400.0)
    with torch.no_grad():
        mu = case.encoder(case.data)[0]
        case.z = (mu[0] + torch.tensor([[1e-3], [-1e-3]]) * (mu[5] - mu[0])).double()
    weights = torch.ones(K).index_fill(0, torch.tensor(0), 0.0)

    def gradient(few: int | None) -> Tensor:
        if absent == "of weight 0":
            density = VampPrior(case.encoder, case.data, probs=weights, backward_components=few).density()
        else:
            density = ExemplarPrior(case.encoder, case.data, backward_components=few).density(torch.tensor([0, 0]))
        return torch.autograd.grad(density(case.z).sum(), case.encoder.mu.weight)[0]

    part = responsibility_sums(case.z, *case.encoder(case.data), weights.log().double())
    places = int((part > 0).sum())
    assert places < K - 1
    assert torch.allclose(gradient(places), gradient(None), rtol=1e-9)


def test_the_choice_is_by_the_priors_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spied(*arguments: Any, **options: Any) -> Tensor:
        seen.append(options)
        return responsibility_sums(*arguments, **options)

    monkeypatch.setattr("fastvae.priors.encoded.responsibility_sums", spied)
    options = {"impl": "composite", "precision": "highest", "dense_backward": True}
    Case("vamp").density(4, **options)[1](torch.randn(2, 3, dtype=torch.float64))
    assert seen == [options]


@pytest.mark.parametrize("which", PRIORS)
def test_few_rows_are_encoded_with_a_gradient(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass takes what a cache holds, and once a density is evaluated without gradients there is no second."""
    case = Case(which)
    rows, called = case.encoder.rows, []
    case.encoder.register_forward_hook(lambda *_: called.append(torch.is_grad_enabled()))
    monkeypatch.setattr("fastvae.priors.encoded.rows_on", lambda _: 5)
    taken = PRIORS[which].get("subset", K)
    size = PRIORS[which].get("chunk_size", 5)
    pieces = [len(piece) for piece in torch.arange(taken).split(size)]
    second = [min(size, 4), *[size] * (2 // size)] if "chunk_size" in PRIORS[which] else [4]
    _, density = case.density(4)
    assert (rows, called) == (pieces, [False] * len(pieces))
    with torch.no_grad():
        density(case.z)
    assert rows == pieces
    density(case.z)
    assert (rows, called) == (pieces + second, [False] * len(pieces) + [True] * len(second))


@pytest.mark.parametrize("which", ["vamp", "exemplar"])
def test_outside_of_a_step_of_training_all_are_encoded(which: str) -> None:
    case = Case(which)
    of_all, _ = case.density(None)
    of_few, _ = case.density(4)

    def gradient(log_prob: Tensor) -> Tensor:
        return torch.autograd.grad(log_prob.sum(), case.encoder.mu.weight)[0]

    wanted = gradient(of_all.log_prob(case.z))
    assert torch.allclose(gradient(of_few.log_prob(case.z)), wanted, rtol=1e-12)
    assert torch.allclose(gradient(of_few.eval().density()(case.z)), wanted, rtol=1e-12)
    case.encoder.rows.clear()
    with torch.no_grad():
        of_few.train().density()(case.z)
    assert case.encoder.rows == [K]


@pytest.mark.parametrize("kind", [VampPrior, ExemplarPrior])
def test_a_step_of_a_vae_encodes_few_with_a_gradient(kind: type) -> None:
    called = []
    encoder = Encoder()
    encoder.register_forward_hook(lambda _, inputs, output: called.append((len(inputs[0]), torch.is_grad_enabled())))
    model = VAE(encoder, Decoder(), kind(encoder, torch.rand(K, 6), backward_components=4))
    model(torch.rand(3, 6), index=torch.arange(3))
    assert called == [(3, True), (K, False), (4, True)]
    called.clear()
    model.eval()(torch.rand(3, 6))
    assert called == [(3, True), (K, True)]


def test_scales_beyond_float16() -> None:
    """What arrives for a component is tiny, and its scale is larger than float16 can say."""
    of_all = torch.zeros(3, 2, dtype=torch.float16)
    few = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    through = _OfFew.apply(of_all, few, torch.tensor([1]), torch.full((1, 1), 2.0**17))
    (gradient,) = torch.autograd.grad((through.float() * 2.0**-15).sum(), few)
    assert torch.equal(gradient, torch.full((1, 2), 4.0, dtype=torch.float16))


@pytest.mark.parametrize("which", ["vamp", "exemplar"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_samples": 3, "chunk_size": 2},
        {"bound": "iwae", "num_samples": 5, "backward_samples": 2},
        {"bound": "iwae", "num_samples": 5, "gradient": "stl"},
    ],
    ids=str,
)
def test_a_vae_trains_with_it(which: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is the same number as with all components in backward, and every parameter has a gradient."""
    monkeypatch.setattr(_few, "_uniform", lambda v: torch.full_like(v[:, 0], 0.3))  # so that z alone is drawn
    losses = []
    for few in (None, 4):
        torch.manual_seed(0)
        encoder, data = Encoder(), torch.rand(K, 6)
        prior = (VampPrior if which == "vamp" else ExemplarPrior)(encoder, data, backward_components=few)
        model = VAE(encoder, Decoder(), prior)
        torch.manual_seed(1)
        loss = model(data[:2], index=torch.arange(2), **arguments).loss
        loss.backward()
        losses.append(loss.detach())
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert torch.allclose(*losses, rtol=1e-6)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("which", ["vamp", "exemplar, one variance, of a subset"])
def test_under_compile(which: str, impl: str | None) -> None:
    """In one graph, and backward has the components that were chosen in forward, not others drawn anew."""
    case = Case(which)
    prior, _ = case.density(4, impl=impl, chunk_size=8)

    def log_prob(z: Tensor) -> Tensor:
        return prior.density(None if which == "vamp" else INDEX)(z).sum()

    results = []
    for run in (log_prob, torch.compile(log_prob, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        case.encoder.rows.clear()
        results.append(torch.autograd.grad(run(case.z), [*case.encoder.parameters()], allow_unused=True))
        assert max(case.encoder.rows) <= 8
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-9, atol=1e-12)


class Step(nn.Module):
    """z -> sum log p(z), as a module that has the prior's encoder."""

    def __init__(self, encoder: nn.Module, prior: ExemplarPrior | VampPrior) -> None:
        super().__init__()
        self.encoder, self.prior = encoder, prior

    def forward(self, z: Tensor) -> Tensor:
        return self.prior.density(INDEX)(z).sum()


@pytest.mark.parametrize("impl", [None, "reference"])
def test_gradients_by_torch_func(impl: str | None) -> None:
    """`torch.func.grad` of the encoder's weights, as `functional_call` puts them in."""
    case = Case("exemplar")
    prior, _ = case.density(4, impl=impl)
    weights = dict(case.encoder.named_parameters())

    def log_prob(weights: dict[str, Tensor]) -> Tensor:
        named = {f"encoder.{n}": w for n, w in weights.items()}
        return torch.func.functional_call(Step(case.encoder, prior), named, (case.z,))

    torch.manual_seed(3)
    wanted = torch.autograd.grad(log_prob(weights), [*weights.values()])
    torch.manual_seed(3)
    found = torch.func.grad(log_prob)({n: w.detach() for n, w in weights.items()})
    for name, gradient in zip(weights, wanted, strict=True):
        assert torch.allclose(found[name], gradient, rtol=1e-10, atol=1e-12)


def test_each_rows_own_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """By vmap of grad, each row with a choice of its own, as by one call a row."""
    case = Case("exemplar")
    prior, _ = case.density(4)
    monkeypatch.setattr(_few, "_uniform", lambda v: torch.full_like(v[:, 0], 0.3))

    def log_prob(bias: Tensor, z: Tensor) -> Tensor:
        weights = {"encoder.mu.bias": bias}
        return torch.func.functional_call(Step(case.encoder, prior), weights, (z,))

    gradient, bias = torch.func.grad(log_prob), case.encoder.mu.bias.detach()
    each = torch.func.vmap(gradient, in_dims=(None, 0), randomness="different")(bias, case.z)
    for got, z in zip(each, case.z, strict=True):
        assert torch.allclose(got, gradient(bias, z), rtol=1e-10, atol=1e-12)


def test_under_autocast() -> None:
    """Weights that autocast cast in the pass without activations have gradients in the other."""
    encoder, data = Encoder(), torch.rand(K, 6)
    prior = ExemplarPrior(encoder, data, backward_components=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob = prior.density(torch.arange(3))(torch.randn(3, 3))
    assert log_prob.dtype == torch.float32
    log_prob.sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in encoder.parameters())


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.BatchNorm1d(6)], ids=lambda module: type(module).__name__)
def test_it_needs_an_encoder_that_repeats_itself(module: nn.Module) -> None:
    encoder = nn.Sequential(module, Encoder())
    prior = ExemplarPrior(encoder, torch.rand(K, 6), backward_components=4)
    wanted = rf"calls the encoder twice for the same input.*not so with a {type(module).__name__} in training mode"
    with pytest.raises(ValueError, match=wanted):
        prior.density(INDEX)
    encoder.eval()
    prior.density(INDEX)(torch.randn(3, 3)).sum().backward()


@pytest.mark.parametrize(
    ("few", "options", "message"),
    [
        (0, {}, "backward_components must be at least 1, not 0"),
        (2.0, {}, "backward_components must be an integer, not float"),
        (2, {"refresh": 0.5}, "backward_components and refresh are two ways"),
    ],
)
@pytest.mark.parametrize("kind", [VampPrior, ExemplarPrior])
def test_mistakes(kind: type, few: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kind(Encoder(), torch.rand(K, 6), backward_components=few, **options)


@pytest.mark.parametrize("given", [{"labels": torch.arange(K) % 2}, {"probs": torch.ones(2, K)}], ids=str)
def test_conditional_priors_do_not_have_it(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="backward_components is not for a conditional prior"):
        VampPrior(Encoder(), torch.rand(K, 6), backward_components=4, **given)
    prior = VampPrior(Encoder(), torch.rand(K, 6), **given)
    prior.backward_components = 4
    with pytest.raises(ValueError, match="backward_components is not for a conditional prior"):
        prior.density(y=torch.tensor([0]))


@pytest.mark.parametrize("excluding", [False, True])
def test_sums_of_responsibilities(each_impl: str, excluding: bool) -> None:
    """Against a softmax of torch.distributions' densities; a component of weight 0 has none."""
    rng = torch.Generator().manual_seed(5)
    z, mu, logvar = (torch.randn(n, 3, generator=rng) for n in (10, 7, 7))
    log_weights = torch.log_softmax(torch.randn(7, generator=rng).index_fill(0, torch.tensor(2), -math.inf), 0)
    exclude = torch.randint(-1, 7, (10,), generator=rng) if excluding else None
    a = log_weights + Independent(Normal(mu, torch.exp(0.5 * logvar)), 1).log_prob(z[:, None])
    if exclude is not None:
        a = a.masked_fill(exclude[:, None] == torch.arange(7), -math.inf)
    got = responsibility_sums(z, mu, logvar, log_weights, exclude, impl=each_impl)
    assert torch.allclose(got, torch.softmax(a, 1).sum(0), rtol=1e-5, atol=1e-6)
    assert got[2] == 0
    alike = responsibility_sums(z, mu, logvar[0, 0], impl=each_impl)
    assert alike.sum() == pytest.approx(10, rel=1e-5)
    nowhere = torch.full((2,), -math.inf)
    assert torch.equal(responsibility_sums(z, mu[:2], logvar[:2], nowhere, impl=each_impl), torch.zeros(2))


def test_the_choice_of_a_part_of_a_batch() -> None:
    """Ranks that share a batch's noise choose components each for itself."""
    case = Case("exemplar")
    _, density = case.density(4)
    with rows_of_batch(PartOfBatch(first=2, rows=3, of=9)):
        density(case.z).sum().backward()
