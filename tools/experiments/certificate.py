"""How many pairs of a row and a component a bound lets the CUDA kernels compute by products in fp16.

    FASTVAE_DATA=FOLDER python -m tools.experiments.certificate [--out FILE.json]

It makes the features of csrc/cuda/product.h and the bound of csrc/cuda/certificate.cuh in float64, and counts, of the
pairs that count in logsumexp, those that are certified, and what a screen with one product would keep.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae import reference
from fastvae.benchmarks import formatting
from fastvae.benchmarks.inputs import MixtureInputs, diffuse, find_latents, from_file

from . import command

ERROR, ROUNDOFF, MAX_ERROR = 24.0, 2.0**-24, 1.5e-4 * math.log(2)  # as in certificate.cuh, nats
SCREEN = 2.0**-10 * 1.02  # of |x| |y|: two roundings to 11 digits, and the sums of fp32
ROWS = 512


class Norms(NamedTuple):
    """Of the features of z' or mu' v, and of those of the squares."""

    linear: Tensor
    square: Tensor


def norms(inputs: MixtureInputs) -> tuple[Norms, Norms]:
    """Of the rows and of the components."""
    z, mu, logvar = inputs.z.double(), inputs.mu.double(), inputs.logvar.double()
    s, v = torch.exp(-0.5 * logvar), torch.exp(-logvar)
    origin = (s * mu).sum(0) / s.sum(0)
    z, mu = z - origin, mu - origin
    unit = 2 ** torch.round(-0.5 * logvar.mean(0) / math.log(2))
    spread = (s * mu**2).sum(0) / s.sum(0) * unit**2
    square_unit = 2 ** torch.round(-0.5 * torch.log2(3.5 * (spread + 1)))
    rows = Norms((z * unit).norm(dim=1), ((z * unit) ** 2 * square_unit).norm(dim=1))
    excess = 0.5 * (v - v.amin(0))
    return rows, Norms((mu * v / unit).norm(dim=1), (excess / unit**2 / square_unit).norm(dim=1))


def count(inputs: MixtureInputs) -> dict[str, float]:
    """Shares of the pairs, or of what is named."""
    (M, D), K = inputs.z.shape, len(inputs.mu)
    mu, logvar, log_weights = (t.double() for t in (inputs.mu, inputs.logvar, inputs.log_weights))
    rows_of_z = inputs.z.double().split(64)
    a = torch.cat([reference.component_log_prob(z, mu, logvar, log_weights) for z in rows_of_z])  # [M, K]
    c = log_weights - 0.5 * (logvar.sum(1) + D * math.log(2 * math.pi))
    size = log_weights.abs() + 0.5 * (logvar.abs().sum(1) + D * math.log(2 * math.pi))
    rows, components = norms(inputs)
    products = rows.linear[:, None] * components.linear + rows.square[:, None] * components.square
    allowed = ROUNDOFF * ((1 + math.sqrt(D)) * size + (5 + math.sqrt(D)) * (c - a))
    negligible = torch.logsumexp(a, 1, keepdim=True) - math.log(K) - 26 * math.log(2)
    bound = ERROR * ROUNDOFF * products
    counts, certified = a >= negligible, (bound <= allowed) & (bound <= MAX_ERROR)

    def share(pairs: Tensor, rows: int, columns: int) -> float:
        """Of the tiles of so many rows and components, those with such a pair."""
        tiles = pairs[: M // rows * rows, : K // columns * columns].view(M // rows, rows, K // columns, columns)
        return float(tiles.any(3).any(1).double().mean())

    error = SCREEN * products
    least = torch.logsumexp(a - 2 * error, 1, keepdim=True) - math.log(K) - 26 * math.log(2)
    kept = a + 2 * error >= least  # in the worst case of the bound
    return {
        "counts": share(counts, 1, 1),
        "certified": float((counts & certified).sum() / counts.sum()),
        "uncertain_row_32": share(counts & ~certified, 1, 32),
        "screen_row_32": share(kept, 1, 32),
        "screen_8_32": share(kept, 8, 32),
    }


def measure() -> dict[str, Any]:
    cases = {f"diffuse {(M, K, D)}": diffuse(M, K, D) for M, K, D in ((ROWS, 5000, d) for d in (16, 40, 64, 128))}
    if (path := find_latents()) is not None:
        cases[f"mnist_latents {(ROWS, 12_500, 40)}"] = from_file(path, ROWS, 12_500)
    return {"versions": {"torch": torch.__version__}, "cases": {name: count(inputs) for name, inputs in cases.items()}}


def markdown(content: dict[str, Any]) -> str:
    """A line for each case, in percent."""
    headings = [
        *("", "pairs that count", "of these, certified"),
        *("(row, 32 components) with one that is not", "a screen keeps: (row, 32)", "8 x 32"),
    ]
    rows = [[name, *(f"{100 * share:.3g} %" for share in found.values())] for name, found in content["cases"].items()]
    return formatting.markdown(headings, rows)


if __name__ == "__main__":
    sys.exit(command.run("certificate", __doc__, measure, markdown))
