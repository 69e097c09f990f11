"""fastvae's priors in Pyro's models."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pyro", reason='pyro-ppl is not installed: pip install "fastvae-kernels[pyro]"')

import pyro
import pyro.distributions as dist
from pyro.infer import SVI, Trace_ELBO

import fastvae
from fastvae.adapters.pyro import PriorDistribution

D = 3


def test_shapes_and_values() -> None:
    prior = fastvae.MixturePrior(torch.randn(5, D))
    p = PriorDistribution(prior)
    assert p.event_shape == (D,) and p.batch_shape == () and p().shape == (D,)
    wide = p.expand(torch.Size([4]))
    z = wide.sample(torch.Size([2]))
    assert z.shape == (2, 4, D)
    torch.testing.assert_close(wide.log_prob(z), prior.log_prob(z))
    assert wide.log_prob(z[0, 0]).shape == (4,)
    with pytest.raises(TypeError, match=r"prior must be a fastvae\.Prior"):
        PriorDistribution(dist.Normal(0.0, 1.0))


def test_a_vae_with_a_vamp_prior_trains() -> None:
    pyro.clear_param_store()
    torch.manual_seed(0)
    x = torch.rand(32, 6)
    encoder = torch.nn.Linear(6, 2 * D)
    decoder = torch.nn.Linear(D, 6)

    def encode(x):
        return tuple(encoder(x).chunk(2, -1))

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = encoder

        def forward(self, x):
            return encode(x)

    prior = fastvae.VampPrior(Encoder(), x[:5].clone())
    start = prior.pseudo_inputs.detach().clone()

    def model(x):
        pyro.module("decoder", decoder)
        pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", PriorDistribution(prior))
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)

    def guide(x):
        pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            mu, logvar = encode(x)
            pyro.sample("z", dist.Normal(mu, (0.5 * logvar).exp()).to_event(1))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert not torch.equal(prior.pseudo_inputs.detach(), start)
