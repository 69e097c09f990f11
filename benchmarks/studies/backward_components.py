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

from fastvae import VAE, ExemplarPrior, StandardNormalPrior, VampPrior
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
    prior: ExemplarPrior | VampPrior
    x: Tensor
    few: tuple[int, ...]


def study() -> dict[str, Any]:
    """For each case and number of components in backward: the variance that this adds, and the seconds it takes.

    The variance is that of all parameters' gradient over batches of 100, with all components in backward; what is added
    to it is the mean squared distance of the gradient of few from that of all, of the same batch and draws of z.  The
    seconds are those of forward and backward.  The digits are always there; MNIST where
    FASTVAE_DATA names its folder.
    """
    rows = []
    for case in _cases():
        gradients, seconds = _measured(case)
        of_all = gradients[None]
        variance = float(of_all.var(0).sum())
        for few in case.few:
            rows.append(
                {
                    "case": case.name,
                    "components": len(case.prior.component_log_weights()),
                    "backward_components": few,
                    "added_variance": float((gradients[few] - of_all).square().sum(1).mean()) / variance,
                    "seconds": seconds[few],
                    "seconds_of_all": seconds[None],
                }
            )
            print(rows[-1], flush=True)
    return {"rows": rows, "draws": DRAWS, "steps_of_training": STEPS}


def _cases() -> Iterator[Case]:
    data = digits.load()
    vae = digits.new_model(data, {"shared_variance": True})
    digits.train(vae, data)
    assert isinstance(vae.prior, ExemplarPrior)
    yield Case("exemplars, digits", vae, vae.prior, data.train, FEW["digits"])
    folder = os.environ.get("FASTVAE_DATA")
    if not folder:
        return
    with np.load(Path(folder) / "mnist.npz") as arrays:
        x = torch.from_numpy(arrays["x_train"][:EXEMPLARS]).flatten(1) / 255
    vae = _vae()
    exemplars = ExemplarPrior(vae.encoder, x, shared_variance=True, subset=SUBSET, chunk_size=1000)
    vae.prior = exemplars
    _train(vae, x)
    exemplars.subset = None  # which was for training, to save time
    yield Case("exemplars, MNIST", vae, exemplars, x, FEW["exemplars"])
    vae = _vae()
    pseudo_inputs = VampPrior(vae.encoder, x[:PSEUDO_INPUTS])
    vae.prior = pseudo_inputs
    _train(vae, x)
    yield Case("pseudo-inputs, MNIST", vae, pseudo_inputs, x, FEW["pseudo-inputs"])


def _vae() -> VAE:
    torch.manual_seed(0)
    return VAE(Encoder(784, 300, 40), BinaryDecoder(784, 300, 40), StandardNormalPrior(40))


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


def _measured(case: Case) -> tuple[dict[int | None, Tensor], dict[int | None, float]]:
    """For each count, None for all: the gradients of all parameters, [DRAWS, n], and the median seconds of one.

    A batch and its draws of z are the same for all counts, which take turns.
    """
    kinds = (None, *case.few)
    found: dict[int | None, list[Tensor]] = {few: [] for few in kinds}
    seconds: dict[int | None, list[float]] = {few: [] for few in kinds}
    for number in range(DRAWS):
        for few in kinds:
            case.vae.train()
            case.prior.backward_components = few
            torch.manual_seed(number)
            batch, index = _batch(case.x)
            started = time.perf_counter()
            loss = case.vae(batch, index=index).loss
            gradient = torch.autograd.grad(loss, [*case.vae.parameters()])
            seconds[few].append(time.perf_counter() - started)
            found[few].append(torch.cat([g.flatten() for g in gradient]))
    gradients = {few: torch.stack(of_few) for few, of_few in found.items()}
    return gradients, {few: median(times) for few, times in seconds.items()}
