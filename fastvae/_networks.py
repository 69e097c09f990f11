"""The networks of the VampPrior paper (Tomczak and Welling 2018): dense, gated, one or two levels of latents.

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


class JoinedLayers(nn.Module):
    """A gated dense layer for each of two inputs, and one for both: [..., first] and [..., second] -> [..., hidden].

    The inputs may lack leading sizes that the other has.
    """

    def __init__(self, first: int, second: int, hidden: int) -> None:
        super().__init__()
        self.first = GatedDense(first, hidden)
        self.second = GatedDense(second, hidden)
        self.joined = GatedDense(2 * hidden, hidden)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        h: Tensor = self.joined(torch.cat(torch.broadcast_tensors(self.first(a), self.second(b)), -1))
        return h


class Encoder(nn.Module):
    """x [B, pixels] -> mu, logvar [B, latent] of q(z|x), logvar kept in [-6, 2].

    With given=True it takes z2 [S, B, latent] as well, and returns [S, B, latent]: the lower of two levels, q(z1|x,z2).
    """

    def __init__(self, pixels: int, hidden: int, latent: int, *, given: bool = False) -> None:
        super().__init__()
        self.body = JoinedLayers(pixels, latent, hidden) if given else two_layers(pixels, hidden)
        self.mu = nn.Linear(hidden, latent)
        self.logvar = nn.Sequential(nn.Linear(hidden, latent), nn.Hardtanh(-6.0, 2.0))

    def forward(self, *x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(*x)
        return self.mu(h), self.logvar(h)


class BinaryDecoder(nn.Module):
    """z [..., latent], or z1 and z2, -> logits [..., pixels] of p(x|z), for the Bernoulli likelihood."""

    def __init__(self, pixels: int, hidden: int, latent: int, levels: int = 1) -> None:
        super().__init__()
        self.body = decoder_body(hidden, latent, levels)
        self.logits = nn.Linear(hidden, pixels)

    def forward(self, *z: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.body(*z))
        return logits


def decoder_body(hidden: int, latent: int, levels: int) -> nn.Module:
    """What a decoder computes before its last layer, of one level of latents or of two."""
    return two_layers(latent, hidden) if levels == 1 else JoinedLayers(latent, latent, hidden)
