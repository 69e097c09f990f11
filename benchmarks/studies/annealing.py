"""Log-likelihood by importance sampling and by annealing, with the encoder that was trained and with worse ones."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import VAE, annealing

from . import digits

IMAGES, SAMPLES, CHAINS, TEMPERATURES, LEAPFROG_STEPS = 50, 5_000, 16, 300, 5
ENCODERS = {"as trained": (0.0, 0.0), "1 off, variances / e^2": (1.0, -2.0), "2 off, variances / e^4": (2.0, -4.0)}


class Worse(nn.Module):
    """An encoder whose means are `off` from another's in each dimension, and whose log variances are `narrower`."""

    def __init__(self, encoder: nn.Module, off: float, narrower: float) -> None:
        super().__init__()
        self.encoder, self.off, self.narrower = encoder, off, narrower

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x)
        return mu + self.off, logvar + self.narrower


def study() -> dict[str, Any]:
    """Means over validation images; p(x) is the same for all encoders.  And bounds for images that the model draws."""
    data = digits.load()
    vae = digits.new_model(data)
    digits.train(vae, data)
    prior, x = vae.eval().prior.snapshot(), data.validation[:IMAGES]
    settings: dict[str, Any] = {
        "num_chains": CHAINS,
        "temperatures": TEMPERATURES,
        "leapfrog_steps": LEAPFROG_STEPS,
    }
    rows, seconds = [], {}
    for name, worse in ENCODERS.items():
        model = VAE(Worse(vae.encoder, *worse), vae.decoder, prior).eval()
        torch.manual_seed(0)
        started = time.perf_counter()
        row = {"encoder": name, "importance": float(model.log_likelihood(x, SAMPLES).double().mean())}
        seconds["importance"] = time.perf_counter() - started
        for start in ("posterior", "prior"):
            started = time.perf_counter()
            found = annealing.log_likelihood(model, x, start=start, **settings)
            seconds[start] = time.perf_counter() - started
            row[start] = float(found.log_likelihood.double().mean())
            row[f"{start}_error"] = float(found.standard_error.double().square().mean()) ** 0.5 / math.sqrt(IMAGES)
        bounds = annealing.bidirectional_bounds(model, IMAGES, **settings)
        rows.append(row | {"gap": float((bounds.upper - bounds.lower).double().mean())})
        print(rows[-1], flush=True)
    return {"rows": rows, "images": IMAGES, "importance_samples": SAMPLES, "seconds": seconds} | settings
