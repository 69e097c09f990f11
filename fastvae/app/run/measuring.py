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
    total = Total(x.device)
    for batch in x.split(max(1, VALIDATION_BATCH // num_samples)):
        total.add(frozen(batch, num_samples=num_samples, bound=bound))
    vae.train(was_training)
    return total.mean()


class Total:
    """Sums of what passes gave, over their images: on the device, so that no pass waits for another's numbers."""

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, output: VAEOutput) -> None:
        self.count += len(output.bound)
        per_image = torch.stack((output.bound, output.reconstruction, output.kl)).detach()
        self._sums[:3] += per_image.sum(1, dtype=torch.float64)
        self._sums[3] += output.loss.detach()

    @property
    def loss(self) -> float:
        """The sum of the passes' losses: no finite number if one of them was none."""
        return float(self._sums[3])

    def mean(self) -> Measures:
        bound, reconstruction, kl, _ = (self._sums / self.count).tolist()
        return Measures(bound=bound, elbo=reconstruction - kl, reconstruction=reconstruction, kl=kl)
