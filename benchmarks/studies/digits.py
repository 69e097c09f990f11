"""The model that two studies train: a VAE of scikit-learn's digits, 8 x 8 pixels."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvae import VAE, ExemplarPrior, VampPrior
from fastvae._networks import BinaryDecoder, Encoder

HIDDEN, LATENT, BATCH, EPOCHS, WARMUP = 100, 16, 100, 100, 20
HELD_OUT, VALIDATION = 597, 297
SEED = 20180411  # of the split and of the validation set's pixels: that of `fastvae train --data digits`


class Digits(NamedTuple):
    """train [1200, 64]: probabilities of pixels, to be drawn afresh in each step; validation [297, 64]: drawn once."""

    train: Tensor
    validation: Tensor


def load() -> Digits:
    """The split of `fastvae train --data digits`."""
    from sklearn.datasets import load_digits

    x = load_digits().images.reshape(-1, 64) / 16
    order = np.random.default_rng(SEED).permutation(len(x))
    first = len(x) - HELD_OUT
    train, validation = (
        torch.from_numpy(x[rows]).float() for rows in (order[:first], order[first : first + VALIDATION])
    )
    return Digits(train, torch.bernoulli(validation, generator=torch.Generator().manual_seed(SEED)))


def new_model(digits: Digits, exemplars: dict[str, Any] | None = None) -> VAE:
    """The VAE, with 100 pseudo-inputs or, where its options are given, the exemplar prior."""
    torch.manual_seed(0)
    pixels = digits.train.shape[1]
    encoder, decoder = Encoder(pixels, HIDDEN, LATENT), BinaryDecoder(pixels, HIDDEN, LATENT)
    if exemplars is None:
        return VAE(encoder, decoder, VampPrior(encoder, digits.train[:100]))
    return VAE(encoder, decoder, ExemplarPrior(encoder, digits.train, **exemplars))


def train(vae: VAE, digits: Digits) -> float:
    """Train by the ELBO; seconds an epoch."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    started = time.perf_counter()
    vae.train()
    for epoch in range(1, EPOCHS + 1):
        for rows in torch.randperm(len(digits.train)).split(BATCH):
            optimizer.zero_grad()
            x = torch.bernoulli(digits.train[rows])
            vae(x, beta=min(1.0, epoch / WARMUP), index=rows).loss.backward()
            optimizer.step()
    return (time.perf_counter() - started) / EPOCHS
