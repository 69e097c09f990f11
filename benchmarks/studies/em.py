"""EM beside scikit-learn's from the same start, and EM of many rows and components in bounded memory."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastvae

from .. import timing

SPEED = (100_000, 256, 32)  # N, K, D
ITERATIONS, ROUNDS = 5, 3
MEMORY = (1_000_000, 1000, 16)
_FIT = """
import sys, time, torch, fastvae

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

N, K, D = map(int, sys.argv[1:])
torch.manual_seed(0)
fastvae.fit_mixture(torch.randn(200, D), 2, max_iter=1)  # threads and libraries are there before the count begins
centres = 3 * torch.randn(K, D)
z = torch.empty(N, D)
for part in z.split(10_000):
    part.copy_(centres[torch.randint(K, (len(part),))] + torch.randn(len(part), D))
before, times = peak(), [time.perf_counter()]
fit = fastvae.fit_mixture(z, K, max_iter=5, tol=0, callback=lambda *_: times.append(time.perf_counter()))
assert list(fit.history) == sorted(fit.history)
print(peak() - before, times[2] - times[1], times[-1] - times[0], fit.history[-1])
"""


def study() -> dict[str, Any]:
    """Seconds of the same iterations by both, by turns in one process, in float64 and in float32; and peak memory."""
    N, K, D = SPEED
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(K, D, generator=generator)
    z = centres[torch.randint(K, (N,), generator=generator)] + torch.randn(N, D, generator=generator)
    truth = _scikit_learn(z.double())
    return {"speed": [_speed(z, truth), _speed(z.double(), truth)], "memory": _memory()}


def _speed(z: Tensor, truth: Any) -> dict[str, Any]:
    """truth: what scikit-learn finds in float64, which the means of both are compared with."""
    found: dict[str, Any] = {}
    ways = {
        "fastvae": lambda: found.update({"fastvae": _fastvae(z).mu.numpy()}),
        "scikit-learn": lambda: found.update({"scikit-learn": _scikit_learn(z).means_}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            before = time.process_time()
            seconds[name].append(timing.cpu_clock(run, 1))
            cpu_seconds[name].append(time.process_time() - before)
    row = {
        "dtype": str(z.dtype).removeprefix("torch."),
        **dict(zip("NKD", SPEED, strict=True)),
        "iterations": ITERATIONS,
        "seconds": {name: timing.spread(samples) for name, samples in seconds.items()},
        "cpu_seconds": {name: timing.spread(samples) for name, samples in cpu_seconds.items()},
        "faster": _faster(seconds),
        "faster_by_cpu_time": _faster(cpu_seconds),
        "largest_error_of_means": {name: float(np.abs(means - truth.means_).max()) for name, means in found.items()},
    }
    print(row, flush=True)
    return row


def _faster(seconds: dict[str, list[float]]) -> float:
    """The median of the rounds' ratios: the two runs of a round follow one another."""
    return median(b / a for a, b in zip(seconds["fastvae"], seconds["scikit-learn"], strict=True))


def _fastvae(z: Tensor) -> fastvae.MixtureFit:
    K = SPEED[1]
    return fastvae.fit_mixture(
        z, K, mu=z[:K], logvar=torch.zeros_like(z[:K]), log_weights=torch.zeros_like(z[:K, 0]),
        max_iter=ITERATIONS, tol=0,
    )  # fmt: skip


def _scikit_learn(z: Tensor) -> Any:
    from sklearn.mixture import GaussianMixture

    K = SPEED[1]
    start = z[:K].numpy()
    mixture = GaussianMixture(
        K, covariance_type="diag", max_iter=ITERATIONS, tol=0, means_init=start,
        precisions_init=np.ones_like(start), weights_init=np.full(K, 1 / K, start.dtype),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge
        return mixture.fit(z.numpy())


def _memory() -> dict[str, Any]:
    """A process of its own fits a mixture from a k-means start: the most that it holds beyond the rows."""
    done = subprocess.run([sys.executable, "-c", _FIT, *map(str, MEMORY)], capture_output=True, text=True, check=True)
    added, iteration, whole, log_likelihood = map(float, done.stdout.split())
    N, K, D = MEMORY
    row = {
        **dict(zip("NKD", MEMORY, strict=True)),
        "peak_beyond_rows_bytes": int(added),
        "rows_bytes": 4 * N * D,
        "responsibilities_bytes": 4 * N * K,  # what a table of them would take
        "seconds_per_iteration": iteration,
        "seconds": whole,
        "log_likelihood": log_likelihood,
    }
    print(row, flush=True)
    return row
