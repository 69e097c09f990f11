"""A model whose batches are shared out to the ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastvae import VAE
from fastvae._noise import PartOfBatch, rows_of_batch
from fastvae.app.run.ranks import Ranks
from fastvae.vae import VAEOutput


class SharedBatches(nn.Module):
    """A model that is called on every rank with the whole batch, and computes this rank's share of it.

    What it returns is of the share's rows, with the noise that they have where one process computes the whole batch.
    The mean over the ranks of the `loss`, and so of its gradients, is the loss of the whole batch.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.model, self.ranks = model, ranks

    def forward(self, x: Tensor, y: Tensor | None = None, *, index: Tensor | None = None, **options: Any) -> VAEOutput:
        """x [B, ...], y [B, ...] and index [B] of the whole batch; options as of :meth:`fastvae.VAE.forward`."""
        share = self.ranks.share(len(x))
        own_x, own_y, own_index = (None if value is None else value[share] for value in (x, y, index))
        with rows_of_batch(PartOfBatch(share.start, share.stop - share.start, len(x))):
            output: VAEOutput = self.model(own_x, own_y, index=own_index, **options)
        # The mean over no rows is NaN; its gradients are zeros, and arrive at all parameters, as the others wait for.
        return replace(output, loss=output.loss * (self.ranks.size * len(output.mu) / len(x)))


def shared(vae: VAE, ranks: Ranks) -> VAE:
    """The model as it is called with whole batches; the same model where one process has them."""
    return vae if ranks.size == 1 else cast(VAE, SharedBatches(vae, ranks))


def shared_training(vae: VAE, ranks: Ranks, images: Tensor, labels: Tensor | None) -> VAE:
    """As `shared`, with gradients that are the same on all ranks; `images` and `labels` are the training set."""
    if ranks.size == 1:
        return vae
    parallel = DistributedDataParallel(vae)
    # Buffers are the same on all ranks, and an exemplar prior's is the whole data set.  As an attribute, since the
    # argument's name depends on PyTorch's version.
    parallel.broadcast_buffers = False
    model = cast(VAE, SharedBatches(parallel, ranks))
    # DistributedDataParallel chooses its buckets by the first backward pass, and they decide in which order the ranks'
    # gradients are added.  After this pass all steps have the same ones, the first step of a resumed run as well.
    rows = torch.arange(ranks.size, device=images.device)
    model(images[rows], None if labels is None else labels[rows], index=rows).loss.backward()
    return model
