"""What each precision of the Triton kernels loses.

    TRITON_INTERPRET=1 python -m tools.experiments.triton_precision [--out FILE.json]

The kernels round their operands to fp16 themselves, and products of fp16 numbers are exact in float32: so Triton's
interpreter makes the errors of the operands that tensor cores would.  It adds in float32, as they do but for the last
bit or so.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch

import fastvae
from fastvae.benchmarks import formatting
from fastvae.benchmarks.inputs import MixtureInputs, diffuse, find_latents, from_file

from . import command

PRECISIONS = ("highest", "high", "medium")
DESIGNED = ((-6.0, 2.0), (-4.0, 1.0), (-2.0, 1.0))  # logvar, standard deviation of mu
M, K, D = 256, 1000, 40


def designed(logvar: float, spread: float) -> MixtureInputs:
    """Rows drawn from a mixture of one variance, whose means have a given spread."""
    rng = torch.Generator().manual_seed(0)
    mu = spread * torch.randn(K, D, generator=rng)
    own = torch.randint(K, (M,), generator=rng)
    z = mu[own] + torch.tensor(0.5 * logvar).exp() * torch.randn(M, D, generator=rng)
    return MixtureInputs(z, mu, torch.full((K, D), logvar), torch.log_softmax(torch.randn(K, generator=rng), 0))


def tiles_alone() -> AbstractContextManager[Any]:
    """Let tiles do small problems too, for which there are other kernels, of one precision."""
    return patch.dict(os.environ, FASTVAE_TILES="1")


def errors(inputs: MixtureInputs, precision: str) -> dict[str, float]:
    """The largest error of log p, nats, and of the score, as a fraction of its largest element; against float64."""
    given = (inputs.z, inputs.mu, inputs.logvar, inputs.log_weights)
    exact = [t.double() for t in given]
    want = fastvae.mixture_log_prob_and_score(*exact, impl="composite")
    got = fastvae.mixture_log_prob_and_score(*given, precision=precision, impl="triton")
    log_prob, score = ((g.double() - w).abs().max() for g, w in zip(got, want, strict=True))
    return {"log_prob": float(log_prob), "score": float(score / want[1].abs().max())}


def measure() -> dict[str, Any]:
    """Every case in every precision."""
    cases = {"diffuse": diffuse(M, K, D)}
    cases |= {f"logvar {v:.0f}, std of mu {s:.0f}": designed(v, s) for v, s in DESIGNED}
    if (path := find_latents()) is not None:
        cases["mnist_latents"] = from_file(path, M, 25_000)
    found = {}
    for name, inputs in cases.items():
        with tiles_alone():
            found[name] = {precision: errors(inputs, precision) for precision in PRECISIONS}
        print(name, found[name], flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    return {"versions": versions, "interpreted": not torch.cuda.is_available(), "cases": found}


def markdown(content: dict[str, Any]) -> str:
    """A line for each case: nats in each precision, then fractions."""
    rows = [
        [name, *(formatting.error(by[p][what]) for what in ("log_prob", "score") for p in PRECISIONS)]
        for name, by in content["cases"].items()
    ]
    headings = ["", *(f"log p, nats: {p}" if p == "highest" else p for p in PRECISIONS)]
    return formatting.markdown([*headings, *(f"score: {p}" if p == "highest" else p for p in PRECISIONS)], rows)


if __name__ == "__main__":
    sys.exit(command.run("triton_precision", __doc__, measure, markdown))
