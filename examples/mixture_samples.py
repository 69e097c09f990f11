"""Gradients of samples of a mixture: fastvae's MixtureOfDiagNormals beside Pyro's, which takes the same arguments.

    pip install pyro-ppl
    python examples/mixture_samples.py [--record mixture-samples.json]

A step draws samples z of a mixture of K components by `rsample`, and takes the gradient of the mean of |z|^2 in means,
scales and logits.  Pyro's gradients hold arrays of [samples, K, K, D] numbers, so that its samples become fewer as K
grows.  The two are run in turn.  Their gradients are random, and the mean over many steps is compared with the truth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae.distributions import MixtureOfDiagNormals

BYTES = 2**28  # of Pyro's largest array
TURNS = 7


def parameters(K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Overlapping components: locs, coord_scale [K, D], component_logits [K]."""
    torch.manual_seed(0)
    made = torch.randn(K, D), 0.4 + torch.rand(K, D), torch.randn(K)
    return tuple(p.requires_grad_() for p in made)  # type: ignore[return-value]


def gradient(kind: Any, given: tuple[Tensor, ...], samples: int) -> Tensor:
    """Of the mean of |z|^2, all numbers in a row."""
    mean = kind(*given).rsample((samples,)).square().sum(-1).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(mean, given)])


def seconds(kind: Any, given: tuple[Tensor, ...], samples: int) -> float:
    started = time.perf_counter()
    gradient(kind, given, samples)
    return time.perf_counter() - started


def largest_error(kind: Any, given: tuple[Tensor, ...], steps: int = 200) -> float:
    """Of the mean gradient, in its standard errors: below 4 or so, if the gradient is right on average."""
    locs, scale, logits = given
    truth = (logits.softmax(0) * (locs.square() + scale.square()).sum(-1)).sum()
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(truth, given)])
    found = torch.stack([gradient(kind, given, 100) for _ in range(steps)])
    return float(((found.mean(0) - wanted).abs() / (found.std(0) / steps**0.5)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--components", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--latent", type=int, default=10)
    parser.add_argument("--record", type=Path, help="write what was measured to this JSON file")
    asked = parser.parse_args()
    try:
        from pyro.distributions import MixtureOfDiagNormals as PyroMixture
    except ImportError:
        raise SystemExit("this example compares with Pyro: pip install pyro-ppl") from None

    few = parameters(10, asked.latent)
    errors = {
        name: largest_error(kind, few) for name, kind in (("fastvae", MixtureOfDiagNormals), ("pyro", PyroMixture))
    }
    print("largest error of the mean gradient, in standard errors:", errors)
    if not max(errors.values()) < 5:
        raise SystemExit("a gradient is wrong on average")
    rows = []
    for K in asked.components:
        given = parameters(K, asked.latent)
        samples = max(1, min(1000, BYTES // (4 * K * K * asked.latent)))
        times: dict[str, list[float]] = {"pyro": [], "fastvae": []}
        for turn in range(TURNS + 1):
            for name, kind in (("pyro", PyroMixture), ("fastvae", MixtureOfDiagNormals)):
                spent = seconds(kind, given, samples)
                if turn:  # the first call is not like the others
                    times[name].append(spent)
        pyro, ours = (statistics.median(times[name]) for name in ("pyro", "fastvae"))
        rows.append({"K": K, "samples": samples, "pyro_seconds": pyro, "seconds": ours})
        print(f"K = {K}, {samples} samples: Pyro {pyro:.4f} s, fastvae {ours:.4f} s: {pyro / ours:.1f} times faster")
    if asked.record:
        from fastvae._files import write_json

        found = {
            "latent": asked.latent,
            "rows": rows,
            "largest_error": errors,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        write_json(asked.record, found)


if __name__ == "__main__":
    main()
