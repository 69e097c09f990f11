"""A training step of a VAE with a VampPrior, at MNIST's sizes: by an eager prior, by ours, from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastvae
from fastvae.benchmarks import train_step_cases
from fastvae.benchmarks.train_step_cases import MNIST, Sizes

Step = Callable[[], object]
SMALL = Sizes(pixels=16, hidden=8, latent=4, batch=5)


class Training:
    """A model and its optimiser on a device, from the same weights each time.

    Args:
        prior: "eager", or the `impl` that computes a VampPrior.
        components: its pseudo-inputs, K.
    """

    def __init__(self, prior: str, components: int, device: str, sizes: Sizes = MNIST) -> None:
        self._impl = None if prior == "eager" else prior
        self._vae = train_step_cases._model("fastvae" if self._impl else "eager", components, sizes, device)
        # so slow that it stays the same problem; a graph replays the step's count too
        self._optimizer = torch.optim.Adam(self._vae.parameters(), lr=1e-5, capturable=device == "cuda")
        self._x = torch.rand(sizes.batch, sizes.pixels, generator=torch.Generator().manual_seed(2)).round().to(device)

    def step(self) -> Tensor:
        """One step, as a loop would write it; its loss."""
        self._optimizer.zero_grad()
        with fastvae.use_backend(self._impl):
            loss = self._vae(self._x).loss
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def captured(self) -> Step:
        """The step as a `TrainingStep` replays it from a CUDA graph; on the CPU it runs as usual."""
        step = fastvae.TrainingStep(self._vae, self._optimizer, capture=True if self._x.is_cuda else None)

        def call() -> Tensor:
            with fastvae.use_backend(self._impl):
                return step(self._x).loss

        for _ in range(2):  # as usual, then captured
            call()
        return call
