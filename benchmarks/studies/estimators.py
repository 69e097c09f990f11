"""How noisy and how biased the gradient estimators of the multi-sample bound are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import fastvae
from fastvae import VAE

from . import digits

DRAWS = 400


def study() -> dict[str, Any]:
    """The encoder's gradient on one batch of a trained model: each estimator's variance, and its distance from plain.

    `variance` is summed over the encoder's parameters and relative to that of `plain`; `bias` is the distance of the
    means over the norm of plain's mean, and `bias_error` what chance makes of it.
    """
    data = digits.load()
    vae = digits.new_model(data)
    digits.train(vae, data)
    x, rows = torch.bernoulli(data.train[: digits.BATCH]), []
    for S in (5, 50):
        plain_mean = plain_error = plain_variance = None
        for name in ("plain", "stl", "dreg"):
            draws = torch.stack([_encoder_gradient(vae, x, S, name) for _ in range(DRAWS)])
            mean, variance = draws.mean(0), draws.var(0)
            error = variance / len(draws)
            if plain_mean is None or plain_error is None or plain_variance is None:
                plain_mean, plain_error, plain_variance = mean, error, float(variance.sum())
            rows.append(
                {
                    "samples": S,
                    "gradient": name,
                    "variance": float(variance.sum()) / plain_variance,
                    "bias": float((mean - plain_mean).norm() / plain_mean.norm()),
                    "bias_error": math.sqrt(float((error + plain_error).sum())) / float(plain_mean.norm()),
                }
            )
    return {"rows": rows, "draws": DRAWS, "images": digits.BATCH}


def _encoder_gradient(vae: VAE, x: Tensor, S: int, gradient: str) -> Tensor:
    """By way of q(z | x) alone: the pseudo-inputs' posteriors are the prior's, and have the same gradient in all."""
    mu, logvar = vae.encoder(x)
    prior = vae.prior.snapshot().density()
    bound = fastvae.bounds.iwae(
        lambda z: vae._log_likelihood_of(x, z), prior, mu, logvar, S, gradient=gradient, chunk_size=None
    )
    return torch.cat([g.flatten() for g in torch.autograd.grad(bound.objective.mean(), [*vae.encoder.parameters()])])
