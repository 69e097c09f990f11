"""Priors that an encoder makes of inputs: exemplars, leave-one-out, components encoded by shares and in chunks."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from models import Decoder, Encoder
from torch import Tensor
from torch.distributions import Independent, Normal

from fastvae import VAE, ExemplarPrior, VampPrior, mixture_log_prob

N = 7


def made(**options: Any) -> tuple[ExemplarPrior, Tensor]:
    """An exemplar prior on seven points, in float64, and its data."""
    data = torch.rand(N, 6, dtype=torch.float64)
    return ExemplarPrior(Encoder().double(), data, **options), data


def log_components(prior: ExemplarPrior, z: Tensor) -> Tensor:
    """log N(z; component n), [..., N], by torch.distributions."""
    mu, logvar = (v.detach() for v in prior.encoder(prior.data))
    if prior.logvar is not None:
        logvar = prior.logvar.detach().expand(mu.shape)
    return Independent(Normal(mu, torch.exp(0.5 * logvar)), 1).log_prob(z[..., None, :])


@pytest.mark.parametrize("options", [{}, {"shared_variance": True}, {"chunk_size": 3}])
def test_all_points_are_components(options: dict[str, Any]) -> None:
    prior, _ = made(**options)
    z = torch.randn(2, 5, 3, dtype=torch.float64)
    want = torch.logsumexp(log_components(prior, z), -1) - math.log(N)
    for got in (prior.log_prob(z), prior.density()(z), prior.eval().density()(z), prior.snapshot().log_prob(z)):
        assert torch.allclose(got, want, rtol=1e-12, atol=0)
    mu, logvar, log_weights = prior.components()
    assert mu.shape == logvar.shape == (N, 3)
    assert float(log_weights.exp().sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    "options", [{}, {"shared_variance": True}, {"chunk_size": 2}, {"refresh": 0.3}, {"refresh": 0.3, "neighbours": 2}]
)
@pytest.mark.parametrize("training", [True, False])
def test_leave_one_out_is_the_mixture_without_that_component(options: dict[str, Any], training: bool) -> None:
    """The others weigh 1 / (N - 1); a row that is none of the points, -1, has all N."""
    prior, _ = made(**options)
    prior.train(training)
    index = torch.tensor([3, 0, -1, 6])
    z = torch.randn(2, 4, 3, dtype=torch.float64)
    got = prior.density(index, z[0])(z)
    mu, logvar, _ = (v.detach() for v in prior.components())
    for b, n in enumerate(index.tolist()):
        others = [k for k in range(N) if k != n]
        want = mixture_log_prob(z[:, b], mu[others], logvar[others])  # weights of one over how many there are
        assert torch.allclose(got[:, b], want, rtol=1e-14, atol=1e-14)


def test_leave_one_out_is_used_in_training() -> None:
    """The VAE hands the index on, to every bound, and the KL is higher than with one's own exemplar to rest on."""
    torch.manual_seed(1)
    data = torch.rand(N, 6).round()
    encoder = Encoder()
    model = VAE(encoder, Decoder(), ExemplarPrior(encoder, data))
    with torch.no_grad():
        encoder.logvar.bias.fill_(-8.0)
    index = torch.tensor([4, 2])
    for arguments in ({}, {"num_samples": 3, "gradient": "stl"}, {"bound": "iwae", "num_samples": 3}):
        torch.manual_seed(2)
        left_out = model(data[index], index=index, **arguments)
        torch.manual_seed(2)
        rested = model(data[index], **arguments)
        assert bool((left_out.kl > rested.kl + 10).all())
    left_out.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("subset", [None, 4])
def test_a_step_of_training_compiles_whole(subset: int | None) -> None:
    torch.manual_seed(1)
    data = torch.rand(N, 6).round()
    encoder = Encoder()
    model = VAE(encoder, Decoder(), ExemplarPrior(encoder, data, subset=subset))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    index = torch.tensor([4, -1])
    losses = []
    for run in (model, compiled):
        torch.manual_seed(2)
        losses.append(run(data[index], index=index).loss)
    assert torch.allclose(*losses)
    losses[1].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_subset() -> None:
    """In training so many components, drawn anew each time and none twice; in evaluation all of them."""
    prior, _ = made(subset=4)
    z, index = torch.randn(5, 3, dtype=torch.float64), torch.arange(5)
    parts = log_components(prior, z)
    seen = set()
    for _ in range(30):
        prior.encoder.rows.clear()
        got = prior.density(index)(z).detach()
        assert prior.encoder.rows == [4]
        matches = []
        for chosen in torch.combinations(torch.arange(N), 4).tolist():
            want = torch.stack(
                [
                    torch.logsumexp(parts[b, [k for k in chosen if k != b]], -1) - math.log(len(set(chosen) - {b}))
                    for b in range(5)
                ]
            )
            if torch.allclose(got, want, rtol=1e-12, atol=1e-12):
                matches.append(tuple(chosen))
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 10
    assert torch.allclose(prior.eval().density()(z), torch.logsumexp(parts, -1) - math.log(N), rtol=1e-12)


def test_a_subsets_bound_stays_a_bound() -> None:
    """E[log p of a subset] <= log p of all, here by more than five standard errors."""
    prior, _ = made(subset=2)
    with torch.no_grad():
        prior.encoder.mu.weight.mul_(5.0)
    z = torch.randn(20, 3, dtype=torch.float64)
    draws = torch.stack([prior.density()(z).detach().mean() for _ in range(300)])
    assert draws.mean() + 5 * draws.std() / math.sqrt(300) < prior.log_prob(z).mean()


@pytest.mark.parametrize("which", ["exemplar", "vamp"])
def test_refresh_takes_turns(which: str) -> None:
    """Every component once in 1 / refresh steps; what is not encoded stays as it was, and gives no gradient."""
    torch.manual_seed(0)
    encoder, data = Encoder(), torch.rand(10, 6)
    prior = ExemplarPrior(encoder, data, refresh=0.3) if which == "exemplar" else VampPrior(encoder, data, refresh=0.3)
    z = torch.randn(4, 3)
    before = prior.components()[0].detach()
    prior.density()  # encodes all ten, and the one that is over of them again
    assert encoder.rows[1:] == [10, 1]
    renewed = torch.zeros(10, dtype=torch.bool)
    for step in range(3):
        with torch.no_grad():
            encoder.mu.bias.add_(1.0)  # each step's encodings can be told
        encoder.rows.clear()
        mu = prior.step_components()[0]
        assert encoder.rows == [3]
        new = (mu.detach() - before)[:, 0].round() == step + 1
        assert int(new.sum()) == 3 and not bool((new & renewed).any())
        renewed |= new
        gradient = torch.autograd.grad(mu.sum(), encoder.mu.bias)[0]
        assert torch.equal(gradient, torch.full((3,), float(new.sum())))
    assert int(renewed.sum()) == 9  # the tenth was encoded by the call of density
    # outside training, and after a change of mode, all are as they are now
    for current in (prior.components()[0], prior.eval().step_components()[0], prior.train().step_components()[0]):
        assert torch.allclose(current, before + 3, atol=1e-5)
    assert prior.log_prob(z).shape == (4,)


def test_neighbours_are_encoded_anew() -> None:
    """Those nearest to each row, but for its own, besides the turn; they hold the gradient."""
    torch.manual_seed(0)
    encoder, data = Encoder(), torch.rand(50, 6)
    prior = ExemplarPrior(encoder, data, refresh=0.02, neighbours=3)
    mu = encoder(data)[0].detach()
    near, index = mu[[7, 30]] + 1e-3, torch.tensor([7, 30])
    prior.density(index, near)  # encodes all
    with torch.no_grad():
        encoder.mu.bias.add_(100.0)
    renewed = (prior._refreshed(index, near)[0].detach() - mu)[:, 0] > 50
    distance = torch.cdist(near, mu)
    distance[[0, 1], index] = math.inf
    nearest = distance.topk(3, 1, largest=False).indices
    assert bool(renewed[nearest].all())
    assert int(renewed.sum()) - nearest.unique().numel() in (0, 1)  # and the one whose turn it is


def test_neighbours_bring_the_gradient_back() -> None:
    """What the docstring says of the bias: the encoder's gradient by way of the components, against the whole one."""
    torch.manual_seed(0)
    whole_encoder, data = Encoder(), torch.rand(200, 6)
    with torch.no_grad():
        whole_encoder.mu.weight.mul_(8.0)
        whole_encoder.logvar.bias.fill_(-5.0)
    index = torch.arange(20)
    shares = {}
    for name, options in {
        "whole": {},
        "turns": {"refresh": 0.05},
        "neighbours": {"refresh": 0.05, "neighbours": 20},
    }.items():
        encoder = copy.deepcopy(whole_encoder)
        prior = ExemplarPrior(encoder, data, **options)
        mu, logvar = (v.detach() for v in encoder(data[index]))
        total = 0.0
        for _ in range(20 if options else 1):  # all turns
            torch.manual_seed(3)
            z = mu + torch.exp(0.5 * logvar) * torch.randn(20, 3)
            torch.manual_seed(len(prior._turns))
            loss = prior.density(index, mu)(z).sum()
            total = total + torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*encoder.parameters()])])
        shares[name] = total / (20 if options else 1)
    size = shares["whole"].norm()
    assert (shares["turns"] - 0.05 * shares["whole"]).norm() < 1e-3 * size  # a twentieth of it, no more
    assert (shares["neighbours"] - shares["whole"]).norm() < 0.1 * size


def test_state_and_copies() -> None:
    """The state holds neither data nor encoder; a copied VAE's prior has the copied encoder."""
    encoder, data = Encoder(), torch.rand(N, 6)
    model = VAE(encoder, Decoder(), ExemplarPrior(encoder, data, shared_variance=True, refresh=0.5))
    assert [name for name in model.state_dict() if name.startswith("prior")] == ["prior.logvar"]
    model(data, index=torch.arange(N)).loss.backward()
    assert model.prior.logvar.grad is not None
    copied = copy.deepcopy(model)
    assert copied.prior.encoder is copied.encoder
    z = torch.randn(4, 3)
    assert torch.equal(copied.prior.log_prob(z), model.prior.log_prob(z))
    assert model.double().prior.log_prob(z.double()).dtype == torch.float64
    assert copied.sample(3).shape == (3, 6)


def test_a_shared_variance_is_never_an_old_one() -> None:
    """With encodings kept between steps, the learned variance has its whole gradient and its present value."""
    prior, _ = made(shared_variance=True, refresh=0.3)
    whole, _ = made(shared_variance=True)
    z = torch.randn(4, 3, dtype=torch.float64)
    prior.density()
    assert prior.logvar is not None and whole.logvar is not None
    whole.data, whole.__dict__["encoder"] = prior.data, prior.encoder
    for one in (prior, whole):
        with torch.no_grad():
            one.logvar.fill_(-1.0)
        one.density()(z).sum().backward()
    assert torch.allclose(prior.logvar.grad, whole.logvar.grad, rtol=1e-12)


def test_samples_come_from_all_points() -> None:
    prior, _ = made()
    n = 20_000
    z = prior.sample(n)
    mu, logvar = (v.detach() for v in prior.encoder(prior.data))
    mean = mu.mean(0)
    variance = (mu.square() + logvar.exp()).mean(0) - mean.square()
    assert bool(((z.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all())


@pytest.mark.parametrize("K", [2000])
def test_chunks_give_a_paper_sized_encoders_gradients(K: int) -> None:
    """784-300-300-40, one step: chunked and unchunked agree to rounding in every parameter."""
    torch.manual_seed(0)
    encoder = Encoder(784, 40)
    encoder.hidden = torch.nn.Sequential(torch.nn.Linear(784, 300), torch.nn.Tanh(), torch.nn.Linear(300, 300))
    encoder.mu, encoder.logvar = torch.nn.Linear(300, 40), torch.nn.Linear(300, 40)
    inputs, x = torch.rand(K, 784), torch.rand(100, 784).round()
    results = []
    for chunk_size in (None, 300):
        own = copy.deepcopy(encoder)
        model = VAE(own, Decoder(40, 784), VampPrior(own, inputs, chunk_size=chunk_size))
        torch.manual_seed(1)
        model.decoder = Decoder(40, 784)
        torch.manual_seed(2)
        model(x).loss.backward()
        results.append([p.grad for p in model.parameters()])
    for whole, parts in zip(*results, strict=True):
        assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset": 1}, "subset must be 2 ... 7"),
        ({"subset": 8}, "subset must be 2 ... 7"),
        ({"refresh": 0.0}, "refresh must be above 0"),
        ({"refresh": 1.5}, "refresh must be above 0"),
        ({"neighbours": -1}, "neighbours must be at least 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"subset": 3, "refresh": 0.5}, "give one of them"),
        ({"data": torch.rand(1, 6)}, "N >= 2"),
        ({"data": torch.zeros(4, 6, dtype=torch.uint8)}, "floating"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    data = options.pop("data", torch.rand(N, 6))
    with pytest.raises(ValueError, match=message):
        ExemplarPrior(Encoder(), data, **options)


def test_training_without_index_warns_once() -> None:
    """In training with gradients, once for each prior; not in evaluation, nor where the index is given."""
    encoder, data = Encoder(), torch.rand(N, 6)
    model = VAE(encoder, Decoder(), ExemplarPrior(encoder, data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(data, index=torch.full((N,), -1))
        model.log_likelihood(data, 3)
        model.eval()(data)
        with torch.no_grad():
            model.train()(data)
        model.prior.log_prob(torch.zeros(2, 3))
        model.sample(2)
    with pytest.warns(UserWarning, match="ExemplarPrior in training without `index`") as caught:
        for arguments in ({}, {"bound": "iwae", "num_samples": 2}, {}):
            model(data, **arguments)
    assert len(caught) == 1
    fresh = VAE(encoder, Decoder(), ExemplarPrior(encoder, data))
    with pytest.warns(UserWarning, match="without `index`"):
        fresh.iwae(data, 2)


@pytest.mark.parametrize("arguments", [{}, {"num_samples": 3}, {"bound": "iwae", "num_samples": 3}])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_an_index_of_the_wrong_length(arguments: dict[str, Any], count: int) -> None:
    """Four rows and another number of indices, one among them, which would broadcast."""
    encoder, data = Encoder(), torch.rand(N, 6)
    model = VAE(encoder, Decoder(), ExemplarPrior(encoder, data))
    with pytest.raises(ValueError, match=rf"index must be \[B\] to match z .*4, 3\], not \[{count}\]"):
        model(data[:4], index=torch.arange(count), **arguments)
    with pytest.raises(TypeError, match="index must be a tensor, not a list"):
        model(data[:4], index=[0, 1, 2, 3], **arguments)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        (torch.tensor([0, 7]), r"index must be in -1 \.\.\. \d for N = \d, -1 for .*, and spans 0 \.\.\. 7"),
        (torch.tensor([-2, 0]), r"index must be in -1 \.\.\. \d for N = \d, -1 for .*, and spans -2 \.\.\. 0"),
        (torch.tensor([0.0, 1.0]), "index must be int64"),
    ],
)
def test_index_out_of_range(index: Tensor, told: str) -> None:
    prior, _ = made()
    with pytest.raises(ValueError, match=told):
        prior.density(index)
