"""Every CUDA kernel once, by small problems: what compute-sanitizer watches.  python -m tools.gpu.exercise"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import fastvae
from fastvae.benchmarks.inputs import diffuse

SHAPES = ((5, 40, 7), (70, 130, 36))  # D of whole vectors, or not; several tiles, several parts


def results(impl: str, device: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Of each public function, and its gradients."""
    for shape in SHAPES:
        data = diffuse(*shape)
        z, mu, logvar, log_weights = (
            t.to(device, dtype).requires_grad_() for t in (data.z, data.mu, data.logvar, data.log_weights)
        )
        for variance in (logvar, logvar[:1].detach().requires_grad_()):
            leaves = [z, mu, variance, log_weights]
            for dense in (False, True):
                log_prob = fastvae.mixture_log_prob(*leaves, dense_backward=dense, impl=impl)
                yield from (log_prob, *torch.autograd.grad(log_prob.sum(), leaves))
            yield from fastvae.mixture_log_prob_and_score(*leaves, impl=impl)
            sample, kl = fastvae.mixture_kl(z, 0.1 * z, mu, variance, log_weights, 2, impl=impl)
            yield from (sample, kl, *torch.autograd.grad(kl.sum() + sample.sum(), leaves))
        sample, log_q = fastvae.gaussian_rsample(z, 0.1 * z, 2, impl=impl)
        yield from (sample, log_q, *torch.autograd.grad(log_q.sum() + sample.square().sum(), z))
        closed = fastvae.gaussian_kl(z, 0.1 * z, impl=impl)
        yield from (closed, *torch.autograd.grad(closed.sum(), z))


def main(arguments: list[str]) -> int:
    """0 if every number is finite."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.exercise", description=__doc__.split(":")[0])
    parser.add_argument("--impl", default="cuda")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    count = 0
    for tiles in ("0", "1"):  # kernels for small problems, and tiles
        os.environ["FASTVAE_TILES"] = tiles
        for dtype in (torch.float32, torch.float64):
            for result in results(options.impl, options.device, dtype):
                count += 1
                if not bool(torch.isfinite(result).all()):
                    print(f"result {count}, {dtype}, FASTVAE_TILES={tiles}: not finite")
                    return 1
    print(f"{count} results, all finite")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
