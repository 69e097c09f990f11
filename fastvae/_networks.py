"""The networks of the VampPrior paper (Tomczak and Welling 2018): dense, gated, one layer of latents.

The command line trains them and the benchmarks measure them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GatedDense(nn.Module):
    """A dense layer with a learned gate, h(x) * sigmoid(g(x)): [..., inputs] -> [..., outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.value = nn.Linear(inputs, outputs)
        self.gate = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.value(x)
        return value * torch.sigmoid(self.gate(x))


def two_layers(inputs: int, hidden: int) -> nn.Sequential:
    """Two gated dense layers: [..., inputs] -> [..., hidden]."""
    return nn.Sequential(GatedDense(inputs, hidden), GatedDense(hidden, hidden))


class Encoder(nn.Module):
    """x [B, pixels] -> mu, logvar [B, latent] of q(z|x), logvar kept in [-6, 2]."""

    def __init__(self, pixels: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.body = two_layers(pixels, hidden)
        self.mu = nn.Linear(hidden, latent)
        self.logvar = nn.Sequential(nn.Linear(hidden, latent), nn.Hardtanh(-6.0, 2.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.mu(h), self.logvar(h)


class BinaryDecoder(nn.Module):
    """z [..., latent] -> logits [..., pixels] of p(x|z), for the Bernoulli likelihood."""

    def __init__(self, pixels: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.body = two_layers(latent, hidden)
        self.logits = nn.Linear(hidden, pixels)

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.body(z))
        return logits
