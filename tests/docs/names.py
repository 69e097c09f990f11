"""What the examples on the pages may use without defining it: see docs/guides/index.md."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastvae

PIXELS, LATENT = 64, 8


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mu, self.logvar = nn.Linear(PIXELS, LATENT), nn.Linear(PIXELS, LATENT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mu(x), self.logvar(x)


def make_decoder() -> nn.Module:
    return nn.Linear(LATENT, PIXELS)


def names() -> dict[str, Any]:
    """A fresh namespace."""
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    encoder, decoder = Encoder(), make_decoder()
    return {
        "__name__": "page",
        "fastvae": fastvae,
        "torch": torch,
        "make_encoder": Encoder,
        "make_decoder": make_decoder,
        "encoder": encoder,
        "decoder": decoder,
        "train_images": images[:600],
        "test_images": images[600:610],
        "x": images[:20],
        "vae": fastvae.VAE(encoder, decoder, fastvae.StandardNormalPrior(LATENT)),
        "z": torch.randn(20, LATENT),
        "mu": torch.randn(50, LATENT),
        "logvar": torch.randn(50, LATENT),
    }
