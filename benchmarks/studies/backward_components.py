"""What a backward pass of few of the prior's components saves, and what noise that adds to the gradient."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvae import VAE, ExemplarPrior, VampPrior
from fastvae._networks import BinaryDecoder, Encoder

from . import digits

DRAWS = 20  # of a batch, for the gradient's variance and the time of a pass
STEPS = 2000  # of training, of MNIST
EXEMPLARS, SUBSET, PSEUDO_INPUTS = 25_000, 500, 500  # of MNIST
FEW = {"digits": (300, 100, 30), "exemplars": (1000, 250, 100), "pseudo-inputs": (250, 100, 50)}


class Case(NamedTuple):
    """A trained model, its training images, which are probabilities [N, pixels], and the counts to try."""

    name: str
    vae: VAE
    x: Tensor
    few: tuple[int, ...]


def study() -> dict[str, Any]:
    """For each case and number of components in backward: the variance that this adds, and the time it takes.

    The variance is that of the encoder's gradient over batches of 100, with all components in backward; what is added
    to it is the mean squared distance of the gradient of few from that of all, of the same batch and draws of z.  The
    time is that of forward and backward, relative to that with all.  The digits are always there; MNIST where
    FASTVAE_DATA names its folder.
    """
    rows = []
    for case in _cases():
        prior = case.vae.prior
        assert isinstance(prior, ExemplarPrior | VampPrior)
        K = len(prior.component_log_weights())
        of_all, seconds_of_all = _gradients(case, None)
        variance = float(of_all.var(0).sum())
        for few in case.few:
            of_few, seconds = _gradients(case, few)
            added = float((of_few - of_all).square().sum(1).mean()) / variance
            rows.append(
                {
                    "case": case.name,
                    "components": K,
                    "backward_components": few,
                    "added_variance": added,
                    "time": seconds / seconds_of_all,
                    "seconds_of_all": seconds_of_all,
                }
            )
            print(rows[-1], flush=True)
    return {"rows": rows, "draws": DRAWS, "steps_of_training": STEPS}


def _cases() -> Iterator[Case]:
    data = digits.load()
    vae = digits.new_model(data, {"shared_variance": True})
    digits.train(vae, data)
    yield Case("exemplars, digits", vae, data.train, FEW["digits"])
    folder = os.environ.get("FASTVAE_DATA")
    if not folder:
        return
    with np.load(Path(folder) / "mnist.npz") as arrays:
        x = torch.from_numpy(arrays["x_train"][:EXEMPLARS]).flatten(1) / 255
    for name, few in (("exemplars", FEW["exemplars"]), ("pseudo-inputs", FEW["pseudo-inputs"])):
        torch.manual_seed(0)
        encoder, decoder = Encoder(784, 300, 40), BinaryDecoder(784, 300, 40)
        exemplars = ExemplarPrior(encoder, x, shared_variance=True, subset=SUBSET, chunk_size=1000)
        vae = VAE(encoder, decoder, exemplars if name == "exemplars" else VampPrior(encoder, x[:PSEUDO_INPUTS]))
        _train(vae, x)
        exemplars.subset = None  # for training alone, to which little time is given here
        yield Case(f"{name}, MNIST", vae, x, few)


def _train(vae: VAE, x: Tensor) -> None:
    optimizer = torch.optim.Adam(vae.parameters(), lr=5e-4)
    for step in range(1, 1 + STEPS):
        optimizer.zero_grad()
        batch, index = _batch(x)
        vae(batch, beta=step / STEPS, index=index).loss.backward()
        optimizer.step()


def _batch(x: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.randperm(len(x))[: digits.BATCH]
    return torch.bernoulli(x[index]), index


def _gradients(case: Case, few: int | None) -> tuple[Tensor, float]:
    """The encoder's gradients of the same batches whatever `few` is, [DRAWS, n], and the median seconds of one."""
    case.vae.train().prior.backward_components = few
    found, seconds = [], []
    for number in range(DRAWS):
        torch.manual_seed(number)
        batch, index = _batch(case.x)
        started = time.perf_counter()
        loss = case.vae(batch, index=index).loss
        gradient = torch.autograd.grad(loss, [*case.vae.encoder.parameters()])
        seconds.append(time.perf_counter() - started)
        found.append(torch.cat([g.flatten() for g in gradient]))
    return torch.stack(found), median(seconds)
