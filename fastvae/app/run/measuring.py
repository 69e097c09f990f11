"""The bound of a model and its two terms, as means over images."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae import VAE
from fastvae.app.run.checkpoint import Measures
from fastvae.vae import VAEOutput

VALIDATION_BATCH = 1000  # images encoded at once


def with_fixed_prior(vae: VAE) -> VAE:
    """The same model for evaluation, whose prior's components are encoded once and not for every batch."""
    return VAE(vae.encoder, vae.decoder, vae.prior.snapshot(), vae.likelihood).eval()


@torch.no_grad()
def measure(vae: VAE, x: Tensor, num_samples: int = 1, bound: str = "elbo") -> Measures:
    """The bound, the ELBO and its two terms, each the mean over the images x [N, pixels]."""
    was_training = vae.training
    vae.eval()
    frozen = with_fixed_prior(vae)
    total = Total()
    for batch in x.split(max(1, VALIDATION_BATCH // num_samples)):
        total.add(frozen(batch, num_samples=num_samples, bound=bound))
    vae.train(was_training)
    return total.mean()


class Total:
    """Sums of what passes gave, over their images."""

    def __init__(self) -> None:
        self.count, self.bound, self.reconstruction, self.kl = 0, 0.0, 0.0, 0.0

    def add(self, output: VAEOutput) -> None:
        bound, reconstruction, kl = (v.detach() for v in (output.bound, output.reconstruction, output.kl))
        self.count += len(bound)
        self.bound += float(bound.sum(dtype=torch.float64))
        self.reconstruction += float(reconstruction.sum(dtype=torch.float64))
        self.kl += float(kl.sum(dtype=torch.float64))

    def mean(self) -> Measures:
        bound, reconstruction, kl = (v / self.count for v in (self.bound, self.reconstruction, self.kl))
        return Measures(bound=bound, elbo=reconstruction - kl, reconstruction=reconstruction, kl=kl)
