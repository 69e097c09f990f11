"""pythae: the VAMP model on fastvae's kernels, and a sampler that draws from its prior."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae import gaussian_rsample, mixture_log_prob

try:
    from pythae.models import VAMP as _VAMP
    from pythae.samplers import VAMPSampler as _VAMPSampler
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'fastvae.adapters.pythae needs {error.name}; pip install "fastvae-kernels[pythae]"', name=error.name
    ) from error


class VAMP(_VAMP):  # type: ignore[misc]
    """pythae's VAMP, whose log p(z) is computed by :func:`fastvae.mixture_log_prob` without arrays of M x K x D.

    Arguments, training and files are pythae's.  As in pythae, `_log_p_z` leaves -D/2 log 2 pi out, which log q(z | x)
    leaves out too.
    """

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """(mu [K, D], logvar [K, D], log_weights [K]) of the prior, as :meth:`fastvae.Mixture.components`."""
        x = self.pseudo_inputs(self.idle_input.to(self.device))
        output = self.encoder(x.reshape(-1, *self.model_config.input_dim))
        mu = output.embedding
        return mu, output.log_covariance, mu.new_full((len(mu),), -math.log(len(mu)))

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), [M], of z [M, D]; nats, with -D/2 log 2 pi."""
        return mixture_log_prob(z, *self.components())

    def _log_p_z(self, z: Tensor) -> Tensor:
        return self.log_prob(z) + 0.5 * z.shape[-1] * math.log(2 * math.pi)


class VAMPSampler(_VAMPSampler):  # type: ignore[misc]
    """A sampler of pythae's that draws each z from a component of its own, at random, with the encoder's variance.

    pythae's own takes the components in order, from the first, and tanh of their log variances.

    Args:
        model: pythae's VAMP, or the one of this module.
        sampler_config: as pythae's.
    """

    @torch.no_grad()
    def sample_latent(self, num_samples: int) -> Tensor:
        """Independent draws of the prior, [num_samples, D]."""
        mu, logvar, _ = VAMP.components(self.model)
        k = torch.randint(len(mu), (num_samples,), device=mu.device)
        z, _ = gaussian_rsample(mu[k], logvar[k])
        return z

    @torch.no_grad()
    def sample(
        self,
        num_samples: int = 1,
        batch_size: int = 500,
        output_dir: str | None = None,
        return_gen: bool = True,
        save_sampler_config: bool = False,
    ) -> Tensor | None:
        """Generated data, [num_samples, ...]; the arguments are those of pythae's sampler.

        Raises:
            ValueError: num_samples or batch_size is below 1.
        """
        for name, count in (("num_samples", num_samples), ("batch_size", batch_size)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        parts: list[Any] = []
        for z in self.sample_latent(num_samples).split(batch_size):
            x = self.model.decoder(z)["reconstruction"]
            if output_dir is not None:
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                done = sum(map(len, parts))
                for n, image in enumerate(x):
                    self.save_img(image, output_dir, f"{done + n:08d}.png")
            parts.append(x)
        if save_sampler_config:
            self.save(output_dir)
        return torch.cat(parts) if return_gen else None
