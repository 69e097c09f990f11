"""Priors: parameters, state, and draws that follow the weights."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
from models import Encoder, vamp_prior
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.optim.swa_utils import AveragedModel

import fastvae
from fastvae import VAE, ExemplarPrior, Mixture, MixturePrior, StandardNormalPrior, VampPrior, log_weights_of
from fastvae.distributions.draws import draw_components


def mixture_prior(K: int = 4, D: int = 2) -> MixturePrior:
    """Far apart components of unequal weight, so that a draw tells where it came from."""
    mu = 100.0 * torch.arange(K)[:, None] + torch.randn(K, D)
    prior = MixturePrior(mu, torch.randn(K, D))
    with torch.no_grad():
        prior.logits.copy_(torch.log(torch.arange(1.0, K + 1)))
    return prior


def as_torch(prior: MixturePrior | VampPrior) -> MixtureSameFamily:
    mu, logvar, log_weights = (v.detach().double() for v in prior.components())
    return MixtureSameFamily(
        Categorical(logits=log_weights),
        Independent(Normal(mu, torch.exp(0.5 * logvar)), 1),
        validate_args=False,
    )


def test_log_prob_is_that_of_torch() -> None:
    standard = StandardNormalPrior(latent_dim=3).double()
    mixture, vamp = mixture_prior().double(), vamp_prior(dtype=torch.float64)
    unit = Independent(Normal(torch.zeros(3), torch.ones(3)), 1)
    for prior, want in ((standard, unit), (mixture, as_torch(mixture)), (vamp, as_torch(vamp))):
        z = prior.sample(5)
        assert torch.allclose(prior.log_prob(z), want.log_prob(z), rtol=1e-12, atol=0)
        assert prior.log_prob(z.reshape(1, 5, -1)).shape == (1, 5)


def test_kl_is_log_q_minus_log_p() -> None:
    """The standard normal's is its closed form, the same for every sample."""
    mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
    for prior in (StandardNormalPrior(latent_dim=3), vamp_prior(), MixturePrior(torch.randn(5, 3))):
        for num_samples in (None, 6):
            torch.manual_seed(3)
            z, kl = prior.kl(mu, logvar, num_samples)
            assert z.shape == ((4, 3) if num_samples is None else (6, 4, 3)) and kl.shape == z.shape[:-1]
            if prior.has_closed_form_kl:
                unit = Normal(0.0, 1.0)
                want = torch.distributions.kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), unit).sum(-1)
                want = want.expand(kl.shape)
            else:
                want = Independent(Normal(mu, torch.exp(0.5 * logvar)), 1).log_prob(z) - prior.log_prob(z)
            assert torch.allclose(kl, want, rtol=1e-4, atol=1e-4)  # float32 throughout, numbers below 100


@pytest.mark.parametrize("which", ["mixture", "vamp"])
def test_samples_have_the_mixtures_moments(which: str) -> None:
    """Mean and variance of each dimension within five standard errors of the mixture's own."""
    prior = mixture_prior() if which == "mixture" else vamp_prior()
    n = 40_000
    z, want = prior.sample(n).double(), as_torch(prior)
    assert z.shape == (n, want.mean.shape[0]) and not z.requires_grad
    error = (want.variance / n).sqrt()
    assert bool(((z.mean(0) - want.mean).abs() < 5 * error).all())
    centred = (z - want.mean).square()
    assert bool(((centred.mean(0) - want.variance).abs() < 5 * centred.std(0) / math.sqrt(n)).all())


def test_standard_normal_samples() -> None:
    prior = StandardNormalPrior(latent_dim=3).double()
    z = prior.sample(40_000)
    assert z.shape == (40_000, 3) and z.dtype == torch.float64
    assert float(z.mean(0).abs().max()) < 5 / 200 and float((z.var(0) - 1).abs().max()) < 5 * math.sqrt(2) / 200


def test_components_are_drawn_by_their_weight() -> None:
    """Chi-square over four components: 40 has a probability of 1e-8 with 3 degrees of freedom."""
    prior = mixture_prior(4)
    n = 10_000
    own = (prior.sample(n)[:, 0] / 100).round().long().clamp(0, 3)
    expected = n * torch.arange(1.0, 5.0) / 10
    assert float(((own.bincount(minlength=4) - expected).square() / expected).sum()) < 40
    # the order is random too: the sequence of components repeats itself no more often than chance has it
    repeats = (own[1:] == own[:-1]).double().mean()
    chance = 0.1**2 + 0.2**2 + 0.3**2 + 0.4**2
    assert abs(float(repeats) - chance) < 5 * math.sqrt(chance * (1 - chance) / n) * 1.5  # overlapping pairs


def test_more_components_than_multinomial_takes() -> None:
    """K above 2^24: by the weights, from either end, without one of weight zero; by torch's seed."""
    K = 2**24 + 9
    weights = {3: 0.25, 2**24 + 2: 0.5, K - 1: 0.25}

    class Huge(Mixture):
        def component_log_weights(self) -> Tensor:
            log_weights = torch.full((K,), -math.inf)
            log_weights[list(weights)] = torch.tensor(list(weights.values())).log()
            return log_weights

        def component_parameters(self, index: Tensor) -> tuple[Tensor, Tensor]:
            self.drawn = index
            return index[:, None].double(), torch.full((len(index), 1), -20.0)

    prior, n = Huge(), 4000
    torch.manual_seed(1)
    z = prior.sample(n)
    assert z.shape == (n, 1) and torch.equal(z[:, 0].round().long(), prior.drawn)
    components, counts = prior.drawn.unique(return_counts=True)
    assert components.tolist() == sorted(weights)
    for k, count in zip(components.tolist(), counts.tolist(), strict=True):
        assert abs(count - n * weights[k]) < 5 * math.sqrt(n * weights[k] * (1 - weights[k]))
    torch.manual_seed(1)
    assert torch.equal(prior.sample(n), z)


def test_draws_are_fine_enough_for_many_components() -> None:
    """Equal weights: 24 bits of a float32 would reach every second one of 2^25 components alone, or fewer."""
    K = 2**25
    drawn = draw_components(torch.zeros(1).expand(K), 4000)
    assert int(drawn.min()) >= 0 and int(drawn.max()) < K
    assert abs(int((drawn % 2).sum()) - 2000) < 5 * math.sqrt(1000)
    assert abs(float(drawn.double().mean()) / K - 0.5) < 5 / math.sqrt(12 * 4000)


@pytest.mark.parametrize("bad", [[-math.inf, -math.inf], [0.0, math.nan], [0.0, math.inf]])
def test_weights_that_cannot_be_drawn_from(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="log weights must hold no NaN"):
        draw_components(torch.tensor(bad), 3)


def test_no_component_of_weight_zero_is_drawn() -> None:
    """Neither the first nor the last, where a uniform number of exactly 0, or one rounded up to the total, falls."""
    log_weights = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    assert set(draw_components(log_weights, 1000).tolist()) == {1, 3}
    for extreme in (0.0, 1 - 2.0**-53, 1.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda n, u=extreme, **_: torch.full((n,), u, dtype=torch.float64))
            assert set(draw_components(log_weights, 4).tolist()) <= {1, 3}


def test_sampling_nothing() -> None:
    for prior in (StandardNormalPrior(latent_dim=2), mixture_prior(), vamp_prior()):
        z = prior.sample(0)
        assert z.ndim == 2 and len(z) == 0


def test_pseudo_inputs_come_from_data_or_noise_and_stay_in_range() -> None:
    """They start as given, a copy; wherever they leave the range, the encoder sees its edge."""
    data = torch.rand(5, 6)
    prior = vamp_prior()
    prior = VampPrior(prior.encoder, data)
    assert torch.equal(prior.pseudo_inputs, data) and prior.pseudo_inputs.data_ptr() != data.data_ptr()
    noise = 0.5 + 3 * torch.randn(50, 6)
    for low, high in ((0.0, 1.0), (-1.0, 1.0)):
        seen: list[Tensor] = []
        encoder = Encoder()
        encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # noqa: B023
        with pytest.warns(UserWarning, match="value_range"):
            prior = VampPrior(encoder, noise, value_range=(low, high))
        prior.components()
        prior.sample(30)
        prior.inputs()
        assert len(seen) == 2
        for x in seen:
            assert x.min().item() == low and x.max().item() == high


def test_pseudo_inputs_keep_their_shape() -> None:
    """Images are given to the encoder as images."""
    encoder = Encoder(inputs=12)
    prior = VampPrior(encoder, torch.rand(5, 3, 2, 2))
    mu, logvar, log_weights = prior.components()
    assert mu.shape == logvar.shape == (5, 3) and log_weights.shape == (5,)
    assert prior.sample(4).shape == (4, 3)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 7])
def test_chunks_give_the_same_density_and_gradients(chunk_size: int) -> None:
    """K = 5 in chunks below, at and above it; the encoder never sees more rows than a chunk."""
    torch.manual_seed(0)
    whole = vamp_prior(learn_weights=True, dtype=torch.float64)
    encoder = copy.deepcopy(whole.encoder)
    parts = VampPrior(encoder, whole.pseudo_inputs, learn_weights=True, chunk_size=chunk_size)
    z = torch.randn(4, 3, dtype=torch.float64)
    results = []
    for prior in (whole, parts):
        prior.encoder.rows.clear()
        log_prob = prior.log_prob(z)
        leaves = [*prior.parameters(), *prior.encoder.parameters()]
        results.append((log_prob, *torch.autograd.grad(log_prob.sum(), leaves)))
    # matrix products of other heights may round otherwise in the last place
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(*results, strict=True))
    assert max(parts.encoder.rows) <= chunk_size
    # each pseudo-input once forward; with several chunks, once more in backward
    assert sum(parts.encoder.rows) == (5 if chunk_size >= 5 else 10)


def test_learned_weights() -> None:
    """They start equal, are parameters only when asked for, stay normalised, and drive the draws."""
    fixed, learned = vamp_prior(), vamp_prior(learn_weights=True)
    assert [name for name, _ in fixed.named_parameters()] == ["pseudo_inputs"]
    assert {name for name, _ in learned.named_parameters()} == {"pseudo_inputs", "logits"}
    for prior in (fixed, learned):
        assert torch.allclose(prior.component_log_weights(), torch.full((5,), -math.log(5)))
    learned.log_prob(torch.randn(4, 3)).sum().backward()
    assert learned.logits.grad is not None and bool(learned.logits.grad.any())
    with torch.no_grad():
        learned.logits.copy_(torch.tensor([3.0, -1.0, 0.0, 2.0, 1.0]))
    assert abs(float(learned.components()[2].exp().sum()) - 1) < 1e-6
    with torch.no_grad():
        learned.logits.copy_(torch.tensor([-50.0, -50.0, 50.0, -50.0, -50.0]))
    seen: list[Tensor] = []
    learned.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    learned.sample(20)
    assert torch.equal(seen[0], learned.inputs()[2].expand(20, 6))


def test_mixture_priors_parameters() -> None:
    prior = MixturePrior(torch.randn(4, 2), torch.tensor(0.5))
    assert {name for name, _ in prior.named_parameters()} == {"mu", "logvar", "logits"}
    assert prior.logvar.shape == (4, 2)
    prior.log_prob(torch.randn(3, 2)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in prior.parameters())
    assert "logits" not in dict(MixturePrior(torch.randn(4, 2), learn_weights=False).named_parameters())


@pytest.mark.parametrize("learn_weights", [True, False])
def test_weights_to_start_from(learn_weights: bool) -> None:
    """probs, whatever they sum to; a weight of zero is absent from density, draws and training, with no NaN."""
    probs = torch.tensor([3.0, 0.0, 1.0])
    mu = torch.tensor([[0.0], [50.0], [100.0]])
    vamp = VampPrior(Encoder(inputs=1), torch.rand(3, 1), learn_weights=learn_weights, probs=probs)
    assert torch.allclose(vamp.component_log_weights().exp(), probs / 4)
    prior = MixturePrior(mu, learn_weights=learn_weights, probs=probs)
    assert ("logits" in dict(prior.named_parameters())) == learn_weights
    assert torch.allclose(prior.components()[2].exp(), probs / 4)
    z = prior.sample(4000)
    counts = (z[:, 0] / 50).round().long().bincount(minlength=3)
    assert counts[1] == 0 and abs(int(counts[0]) - 3000) < 5 * math.sqrt(750)
    torch_mixture = MixtureSameFamily(Categorical(probs), Independent(Normal(mu, torch.ones(3, 1)), 1))
    assert torch.allclose(prior.log_prob(z), torch_mixture.log_prob(z), atol=1e-4)
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (-prior.log_prob(z).mean()).backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in prior.parameters())
        optimizer.step()
    assert prior.components()[2][1] == -math.inf and bool(torch.isfinite(prior.log_prob(z)).all())


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (torch.ones(4), r"probs must be \[3\], a weight for each component, not \[4\]"),
        (torch.ones(3, 1), r"probs must be \[3\]"),
        (torch.tensor([1.0, -1.0, 1.0]), "probs must be finite weights >= 0"),
        (torch.tensor([1.0, math.nan, 1.0]), "probs must be finite weights >= 0"),
        (torch.tensor([1.0, math.inf, 1.0]), "probs must be finite weights >= 0"),
        (torch.zeros(3), "not all 0"),
    ],
)
def test_weights_that_are_none(probs: Tensor, message: str) -> None:
    for make in (lambda: MixturePrior(torch.zeros(3, 2), probs=probs),
                 lambda: VampPrior(Encoder(), torch.zeros(3, 6), probs=probs)):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="probs must be a tensor, not a list"):
        MixturePrior(torch.zeros(3, 2), probs=[0.5, 0.25, 0.25])  # type: ignore[arg-type]


def derivative_by_weights(z: Tensor, mu: Tensor, logvar: Tensor, probs: Tensor) -> Tensor:
    """sum_m N_k(z_m) / p(z_m), [K], in float64 by torch.distributions."""
    log_normal = Independent(Normal(mu.double(), (0.5 * logvar.double()).exp()), 1).log_prob(z.double()[:, None])
    log_p = torch.logsumexp(log_normal + probs.double().log(), 1)
    return (log_normal - log_p[:, None]).exp().sum(0)


def test_gradient_by_weights(each_impl: str) -> None:
    """N_k / p where w_k > 0; 0, and not the NaN of probs.log(), where w_k = 0, though N_k / p is not 0 there."""
    z, mu, logvar = torch.randn(20, 2), torch.randn(4, 2), torch.randn(4, 2)
    probs = torch.tensor([0.4, 0.0, 0.3, 0.2], requires_grad=True)
    log_weights = log_weights_of(probs)
    assert torch.equal(log_weights, probs.log())
    log_prob = fastvae.mixture_log_prob(z, mu, logvar, log_weights, impl=each_impl)
    (got,) = torch.autograd.grad(log_prob.sum(), probs)
    want = derivative_by_weights(z, mu, logvar, probs.detach())
    assert torch.allclose(got[[0, 2, 3]].double(), want[[0, 2, 3]], rtol=1e-4)
    assert got[1] == 0 and float(want[1]) > 1
    naive = fastvae.mixture_log_prob(z, mu, logvar, probs.log(), impl=each_impl)
    assert bool(torch.autograd.grad(naive.sum(), probs)[0].isnan()[1])


def test_gradient_by_small_weights() -> None:
    """What the docstring says of dense_backward: the whole N_k / p of a weight of 1e-12 comes back with it."""
    z, mu, logvar = torch.randn(1000, 3), torch.randn(64, 3), torch.zeros(())
    probs = torch.full((64,), 1 / 63)
    probs[5] = 1e-12
    probs.requires_grad_()
    log_prob = fastvae.mixture_log_prob(z, mu, logvar, log_weights_of(probs), dense_backward=True)
    (got,) = torch.autograd.grad(log_prob.sum(), probs)
    assert torch.allclose(got.double(), derivative_by_weights(z, mu, logvar, probs.detach()), rtol=1e-4)


def test_log_weights_of_odd_input() -> None:
    assert log_weights_of(torch.tensor([[1.0, 0.0]]).double()).tolist() == [[0.0, -math.inf]]
    with pytest.raises(ValueError, match=r"probs must be >= 0, but the smallest is -0\.5"):
        log_weights_of(torch.tensor([1.0, -0.5]))
    with pytest.raises(TypeError, match=r"probs must be a floating tensor, not torch\.int64"):
        log_weights_of(torch.tensor([1, 0]))
    with pytest.raises(TypeError, match="probs must be a tensor"):
        log_weights_of([1.0])  # type: ignore[arg-type]
    compiled = torch.compile(log_weights_of, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.tensor([1.0, 0.0])), torch.tensor([0.0, -math.inf]))


def test_pseudo_inputs_outside_their_range_warn() -> None:
    """With the argument, the share and the span; not where all lie inside, nor on a device without values."""
    inputs = torch.linspace(-1, 1, 40).reshape(10, 4)
    message = r"value_range is \(0.0, 1.0\), but 50.00% of the values in pseudo_inputs lie outside .*-1 ... 1"
    with pytest.warns(UserWarning, match=message) as caught:
        VampPrior(Encoder(inputs=4), inputs)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VampPrior(Encoder(inputs=4), inputs, value_range=(-1.0, 1.0))
        VampPrior(Encoder(inputs=4), inputs.clamp(0, 1))
        VampPrior(Encoder(inputs=4), inputs.to("meta"))


def encoded_vae(which: str) -> VAE:
    encoder, data = Encoder(), torch.rand(5, 6)
    prior = VampPrior(encoder, data) if which == "vamp" else ExemplarPrior(encoder, data, refresh=0.5)
    return VAE(encoder, nn.Linear(3, 6), prior)


@pytest.mark.parametrize("which", ["vamp", "exemplar"])
def test_the_prior_follows_the_encoder(which: str) -> None:
    """Another encoder is the prior's at once, without what the old one encoded; state_dict and copies stay right."""
    model, other, z = encoded_vae(which), Encoder(), torch.randn(4, 3)
    names = set(model.state_dict())
    model(torch.rand(4, 6), index=torch.arange(4))  # exemplars are kept from now on
    model.encoder = other
    assert model.prior.encoder is other and set(model.state_dict()) == names
    inputs = model.prior.data if which == "exemplar" else model.prior.inputs()
    want = MixturePrior(*other(inputs)).log_prob(z)
    assert torch.allclose(model.prior.log_prob(z), want, rtol=1e-5)
    assert torch.allclose(model.prior.density()(z), want, rtol=1e-5)
    copied = copy.deepcopy(model)
    assert copied.prior.encoder is copied.encoder and copied.encoder is not other
    average = AveragedModel(model)
    average.update_parameters(model)
    assert average.module.prior.encoder is average.module.encoder
    fresh = encoded_vae(which)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.encoder.mu.weight, other.mu.weight)
    # the prior's own attribute, too, stays out of its state
    model.prior.encoder = model.encoder
    assert set(model.state_dict()) == names


def test_a_wrapped_encoder_is_followed() -> None:
    """torch.compile's and DistributedDataParallel's wrappers train the same weights for posterior and prior."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        x = torch.rand(4, 6).round()
        model = encoded_vae("vamp")
        results = []
        for wrap in (None, nn.parallel.DistributedDataParallel, partial(torch.compile, backend="eager")):
            wrapped = copy.deepcopy(model)
            inner = wrapped.encoder
            if wrap is not None:
                wrapped.encoder = wrap(inner)
            assert wrapped.prior.encoder is wrapped.encoder
            torch.manual_seed(0)
            wrapped(x).loss.backward()
            results.append([p.grad for p in (*inner.parameters(), *wrapped.prior.parameters())])
        for other in results[1:]:
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.distributed.destroy_process_group()


def test_a_prior_left_on_another_encoder_is_refused() -> None:
    """By whatever way: a prior that is assigned, one shared with a VAE that moved on, a registry written to."""
    model = encoded_vae("vamp")
    with pytest.raises(ValueError, match="the prior's encoder must be the VAE's encoder"):
        model.prior = VampPrior(Encoder(), torch.rand(5, 6))
    assert model.prior.encoder is model.encoder
    model.prior = StandardNormalPrior(3)  # any other prior may come
    model.encoder = Encoder()
    model = encoded_vae("vamp")
    shared = VAE(model.encoder, model.decoder, model.prior)
    shared.encoder = Encoder()
    by_registry = encoded_vae("vamp")
    by_registry._modules["encoder"] = Encoder()
    for stale in (model, by_registry):
        with pytest.raises(ValueError, match="the prior's encoder must be the VAE's encoder"):
            stale(torch.rand(4, 6))


def test_snapshot_is_the_prior_without_its_encoder() -> None:
    """The same density for many calls, from one pass of the encoder; learned weights too."""
    prior = vamp_prior(learn_weights=True)
    with torch.no_grad():
        prior.logits.copy_(torch.randn(5))
    z = torch.randn(4, 3)
    want = prior.log_prob(z).detach()
    prior.encoder.rows.clear()
    frozen = prior.snapshot()
    assert torch.equal(frozen.log_prob(z), frozen.log_prob(z))
    assert prior.encoder.rows == [5]
    assert torch.allclose(frozen.log_prob(z), want, rtol=1e-6)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_state_dict_holds_the_encoder_once_and_loads() -> None:
    torch.manual_seed(0)
    encoder = Encoder()
    model = VAE(encoder, nn.Linear(3, 6), VampPrior(encoder, torch.rand(5, 6), learn_weights=True))
    state = model.state_dict()
    assert sum("hidden.weight" in key for key in state) == 1
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
    assert {"prior.pseudo_inputs", "prior.logits"} <= set(state)
    other_encoder = Encoder()
    fresh = VAE(other_encoder, nn.Linear(3, 6), VampPrior(other_encoder, torch.rand(5, 6), learn_weights=True))
    z = torch.randn(4, 3)
    assert not torch.equal(fresh.prior.log_prob(z), model.prior.log_prob(z))
    fresh.load_state_dict(state)
    assert torch.equal(fresh.prior.log_prob(z), model.prior.log_prob(z))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_vampprior_shares_the_copied_encoder(how: str) -> None:
    encoder = Encoder()
    model = VAE(encoder, nn.Linear(3, 6), VampPrior(encoder, torch.rand(5, 6)))
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert copied.prior.encoder is copied.encoder and copied.encoder is not encoder
    z = torch.randn(4, 3)
    assert torch.equal(copied.prior.log_prob(z), model.prior.log_prob(z))
    with torch.no_grad():
        copied.encoder.mu.bias.add_(1.0)
    assert not torch.equal(copied.prior.log_prob(z), model.prior.log_prob(z))


def test_moving_a_vae_moves_its_prior_once() -> None:
    """`double()` reaches the encoder by the VAE, and the prior sees it."""
    encoder = Encoder()
    model = VAE(encoder, nn.Linear(3, 6), VampPrior(encoder, torch.rand(5, 6))).double()
    assert all(v.dtype == torch.float64 for v in model.prior.components())
    assert model.prior.sample(3).dtype == torch.float64
