"""What the multi-sample bounds, the exemplar prior's savings and chunked encoding cost and gain, as records.

    python -m benchmarks.bounds estimators|refresh|memory [--out benchmarks/results]

Each writes bounds-NAME.json.  The models are those of `fastvae train --data digits`, but for `memory`.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastvae
from fastvae import VAE, ExemplarPrior, VampPrior
from fastvae.app.data.dataset import Dataset
from fastvae.app.data.named_sets import load
from fastvae.app.data.whole_file import write_json
from fastvae.app.run.networks import BinaryDecoder, Encoder
from fastvae.app.run.trained import versions

HIDDEN, LATENT, BATCH, EPOCHS, WARMUP = 100, 16, 100, 100, 20


def new_model(data: Dataset, exemplars: dict[str, Any] | None = None) -> VAE:
    """The VAE for digits, with 100 pseudo-inputs or, where its options are given, the exemplar prior."""
    torch.manual_seed(0)
    encoder, decoder = Encoder(data.num_pixels, HIDDEN, LATENT), BinaryDecoder(data.num_pixels, HIDDEN, LATENT)
    if exemplars is None:
        return VAE(encoder, decoder, VampPrior(encoder, data.train.x[:100]))
    return VAE(encoder, decoder, ExemplarPrior(encoder, data.train.x, **exemplars))


def trained(vae: VAE, data: Dataset) -> float:
    """Train by the ELBO; seconds an epoch."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    started = time.perf_counter()
    vae.train()
    for epoch in range(1, EPOCHS + 1):
        for rows in torch.randperm(len(data.train)).split(BATCH):
            optimizer.zero_grad()
            x = torch.bernoulli(data.train.x[rows])
            vae(x, beta=min(1.0, epoch / WARMUP), index=rows).loss.backward()
            optimizer.step()
    return (time.perf_counter() - started) / EPOCHS


def estimators() -> dict[str, Any]:
    """The encoder's gradient on one batch of a trained model: each estimator's variance, and its distance from plain.

    `variance` is summed over the encoder's parameters and relative to that of `plain`; `bias` is the distance of the
    means over the norm of plain's mean, and `bias_error` what chance makes of it.
    """
    data = load("digits", None, binarize=False)
    vae = new_model(data)
    trained(vae, data)
    x, rows = torch.bernoulli(data.train.x[:BATCH]), []
    for S in (5, 50):
        plain_mean = plain_error = plain_variance = None
        for name in ("plain", "stl", "dreg"):
            draws = torch.stack([_encoder_gradient(vae, x, S, name) for _ in range(400)])
            mean, variance = draws.mean(0), draws.var(0)
            error = variance / len(draws)
            if plain_mean is None or plain_error is None or plain_variance is None:
                plain_mean, plain_error, plain_variance = mean, error, float(variance.sum())
            rows.append(
                {
                    "samples": S,
                    "gradient": name,
                    "variance": float(variance.sum()) / plain_variance,
                    "bias": float((mean - plain_mean).norm() / plain_mean.norm()),
                    "bias_error": math.sqrt(float((error + plain_error).sum())) / float(plain_mean.norm()),
                }
            )
    return {"rows": rows, "draws": 400, "images": BATCH}


def _encoder_gradient(vae: VAE, x: Tensor, S: int, gradient: str) -> Tensor:
    """By way of q(z | x) alone: the pseudo-inputs' posteriors are the prior's, and have the same gradient in all."""
    mu, logvar = vae.encoder(x)
    prior = vae.prior.snapshot().density()
    bound = fastvae.bounds.iwae(
        lambda z: vae._log_likelihood_of(x, z), prior, mu, logvar, S, gradient=gradient, chunk_size=None
    )
    return torch.cat([g.flatten() for g in torch.autograd.grad(bound.objective.mean(), [*vae.encoder.parameters()])])


def refresh() -> dict[str, Any]:
    """An exemplar prior trained with all 1,200 components encoded in each step, and with fewer."""
    data, rows = load("digits", None, binarize=False), []
    ways: dict[str, dict[str, Any]] = {
        "all": {},
        "subset=300": {"subset": 300},
        "subset=60": {"subset": 60},
        "refresh=0.05": {"refresh": 0.05},
        "refresh=0.05, neighbours=2": {"refresh": 0.05, "neighbours": 2},
        "refresh=0.05, neighbours=5": {"refresh": 0.05, "neighbours": 5},
    }
    for name, options in ways.items():
        vae, encoded = new_model(data, options), [0]
        vae.encoder.register_forward_pre_hook(_counter(encoded))
        seconds = trained(vae, data)
        log_likelihood = vae.eval().log_likelihood(data.validation.x, 1000).double()
        steps = EPOCHS * math.ceil(len(data.train) / BATCH)
        rows.append(
            {
                "way": name,
                "log_likelihood": float(log_likelihood.mean()),
                "encoded_in_a_step": encoded[0] / steps - len(data.train) * EPOCHS / steps,
                "seconds_per_epoch": seconds,
            }
        )
        print(rows[-1], flush=True)
    return {"rows": rows, "exemplars": len(data.train), "images": len(data.validation), "seeds": 1}


def _counter(total: list[int]) -> Any:
    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total[0] += len(inputs[0]) if module.training else 0

    return count


_STEP = """
import sys, torch, fastvae
from fastvae.app.run.networks import BinaryDecoder, Encoder

K, chunk_size = int(sys.argv[1]), int(sys.argv[2]) or None
encoder, decoder = Encoder(784, 300, 40), BinaryDecoder(784, 300, 40)
vae = fastvae.VAE(encoder, decoder, fastvae.VampPrior(encoder, torch.rand(K, 784), chunk_size=chunk_size))
optimizer = torch.optim.Adam(vae.parameters(), fused=True)
for _ in range(2):
    optimizer.zero_grad()
    vae(torch.rand(100, 784).round()).loss.backward()
    optimizer.step()
with open("/proc/self/status") as file:
    print(next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")))
"""


def memory() -> dict[str, Any]:
    """Peak of a process that takes two steps with K pseudo-inputs of 784 pixels, in chunks and at once."""
    rows = []
    for K in (500, 5_000, 50_000):
        for chunk_size in (1000, 0):
            command = [sys.executable, "-c", _STEP, str(K), str(chunk_size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"K": K, "chunk_size": chunk_size or None, "peak_bytes": int(done.stdout)})
            print(rows[-1], flush=True)
    return {"rows": rows}


PARTS = {"estimators": estimators, "refresh": refresh, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    asked = parser.parse_args()
    path = asked.out / f"bounds-{asked.part}.json"
    write_json(path, PARTS[asked.part]() | {"threads": torch.get_num_threads(), "versions": versions()})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
