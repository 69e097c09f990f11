"""The bound of a model and its two terms, as means over images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from fastvae import VAE, _capture
from fastvae.app.run.checkpoint import Measures
from fastvae.app.run.data_parallel import shared
from fastvae.app.run.ranks import ALONE, Ranks
from fastvae.vae import VAEOutput

VALIDATION_BATCH = 1000  # images encoded at once


def with_fixed_prior(vae: VAE) -> VAE:
    """The same model for evaluation, whose prior's components are encoded once and not for every batch."""
    networks: dict[str, Any] = {
        name: module for name, module in vae.named_children() if name not in ("prior", "likelihood")
    }
    return type(vae)(**networks, prior=vae.prior.snapshot(), likelihood=vae.likelihood).eval()


class Meter:
    """Measures a model as often as it is called; on a GPU by a CUDA graph for each size of a batch.

    The prior that a graph reads has the components of the last call.  So each call encodes them and copies them there.
    Several ranks call it together, each with all images, and measure a share of them.
    """

    def __init__(self, vae: VAE, num_samples: int = 1, bound: str = "elbo", ranks: Ranks = ALONE) -> None:
        self._vae, self._num_samples, self._bound, self._ranks = vae, num_samples, bound, ranks
        self._fixed: VAE | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor | None = None) -> Measures:
        """The bound, the ELBO and its two terms, each the mean over the images x [N, pixels], with y [N] if given."""
        was_training = self._vae.training
        self._vae.eval()
        if self._fixed is None:
            self._fixed = fixed = with_fixed_prior(self._vae)
            one_pass = partial(shared(fixed, self._ranks), num_samples=self._num_samples, bound=self._bound)
            capture = self._ranks.size == 1 and (_capture.why_not(fixed) or _capture.forbidden()) is None
            self._replays = _capture.Replays[VAEOutput](one_pass, fixed, capture=capture)
        else:
            self._fixed.prior.load_state_dict(self._vae.prior.snapshot().state_dict())
        total = Total(x.device)
        for batch in batches(x, y, max(1, VALIDATION_BATCH // self._num_samples)):
            total.add(self._replays(*batch))
        self._vae.train(was_training)
        return total.of_all(self._ranks).mean()


def measure(vae: VAE, x: Tensor, num_samples: int = 1, bound: str = "elbo", *, y: Tensor | None = None) -> Measures:
    """What a :class:`Meter` measures, once."""
    return Meter(vae, num_samples, bound)(x, y)


def batches(x: Tensor, y: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """x [N, pixels] and y [N], or None, `size` images at a time."""
    return zip(x.split(size), repeat(None) if y is None else y.split(size), strict=False)


class Total:
    """Sums of what passes gave, over their images: on the device, so that no pass waits for another's numbers."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)

    def add(self, output: VAEOutput) -> None:
        if not len(output.bound):
            return  # the loss of no images is no number
        per_image = torch.stack((output.bound, output.reconstruction, output.kl)).detach()
        self._sums[:3] += per_image.sum(1, dtype=torch.float64)
        self._sums[3] += output.loss.detach()
        self._sums[4] += len(output.bound)

    def of_all(self, ranks: Ranks) -> Total:
        """The sums of all ranks, added in their order: the same bits on all of them."""
        total = Total(torch.device("cpu"))
        total._sums = torch.stack(ranks.gather(self._sums.cpu())).sum(0)
        return total

    @property
    def loss(self) -> float:
        """The sum of the passes' losses: no finite number if one of them was none."""
        return float(self._sums[3])

    def mean(self) -> Measures:
        bound, reconstruction, kl = (self._sums[:3] / self._sums[4]).tolist()
        return Measures(bound=bound, elbo=reconstruction - kl, reconstruction=reconstruction, kl=kl)
