"""What an IWAE step saves with a backward pass of few of its samples, and what noise that adds to its gradient."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fastvae
from fastvae import VAE
from fastvae._networks import BinaryDecoder, Encoder

from . import digits

S = 50
FEW = (25, 10, 5, 1)
DRAWS = 200  # of the gradient
STEPS = 15  # that are timed, of each kind in turn


def study() -> dict[str, Any]:
    """For each number of samples in backward: the gradient's variance, and the time of a step, relative to all 50.

    The gradient is that of all parameters of a model that was trained on the digits: for one batch, and over batches,
    which is what training sees.  The step is one of the VampPrior paper's networks with 500 pseudo-inputs, on 100
    images of 784 pixels; its seconds are a median.
    """
    data = digits.load()
    vae = digits.new_model(data)
    digits.train(vae, data)
    batch = torch.bernoulli(data.train[: digits.BATCH])

    def drawn(number: int) -> Tensor:
        torch.manual_seed(number)  # the same batches for each kind
        return torch.bernoulli(data.train[torch.randperm(len(data.train))[: digits.BATCH]])

    kinds: tuple[int | None, ...] = (None, *FEW)
    of_batch = {few: _variance([_gradient(vae, batch, few) for _ in range(DRAWS)]) for few in kinds}
    over_batches = {few: _variance([_gradient(vae, drawn(i), few) for i in range(DRAWS)]) for few in kinds}
    seconds = _seconds(kinds)
    rows = [
        {
            "backward_samples": few or S,
            "variance_of_a_batch": of_batch[few] / of_batch[None],
            "variance_over_batches": over_batches[few] / over_batches[None],
            "seconds": seconds[few],
        }
        for few in kinds
    ]
    worth = vae(batch, bound="iwae", num_samples=S).effective_sample_size
    assert worth is not None
    return {"rows": rows, "samples": S, "draws": DRAWS, "effective_sample_size": float(worth.mean())}


def _variance(gradients: list[Tensor]) -> float:
    return float(torch.stack(gradients).var(0).sum())


def _gradient(vae: VAE, x: Tensor, few: int | None) -> Tensor:
    loss = vae(x, bound="iwae", num_samples=S, backward_samples=few).loss
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*vae.parameters()])])


def _seconds(kinds: tuple[int | None, ...]) -> dict[int | None, float]:
    torch.manual_seed(0)
    encoder, decoder = Encoder(784, 300, 40), BinaryDecoder(784, 300, 40)
    vae = VAE(encoder, decoder, fastvae.VampPrior(encoder, torch.rand(500, 784)))
    optimizer = torch.optim.Adam(vae.parameters(), fused=True)
    x = torch.rand(100, 784).round()
    steps = {
        few: fastvae.TrainingStep(vae, optimizer, num_samples=S, bound="iwae", backward_samples=few) for few in kinds
    }
    taken: dict[int | None, list[float]] = {few: [] for few in kinds}
    for _ in range(1 + STEPS):
        for few, step in steps.items():
            started = time.perf_counter()
            step(x)
            taken[few].append(time.perf_counter() - started)
    return {few: median(times[1:]) for few, times in taken.items()}
