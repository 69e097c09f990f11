"""What the mixture is evaluated on: diffuse, concentrated, or read from a file."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastvae.app.user_errors import ConfigError

SYNTHETIC = ("diffuse", "concentrated")
LATENTS = "mnist_latents.npz"  # a trained VAE's posterior means and variances; see docs/benchmarking.md


@dataclass(frozen=True)
class MixtureInputs:
    """z [M, D], mu [K, D], logvar [K, D] or [1, D], log_weights [K]; float32."""

    z: Tensor
    mu: Tensor
    logvar: Tensor
    log_weights: Tensor

    def to(self, device: str) -> MixtureInputs:
        """The same on a device."""
        return MixtureInputs(*(t.to(device) for t in (self.z, self.mu, self.logvar, self.log_weights)))


def diffuse(M: int, K: int, D: int, seed: int = 0) -> MixtureInputs:
    """Every component near every row: responsibilities so flat that nothing may be left out."""
    rng = torch.Generator().manual_seed(seed)
    spread = 0.5 * min(1.0, math.sqrt(40 / D))  # with more dimensions densities differ more
    z, mu = spread * torch.randn(M, D, generator=rng), spread * torch.randn(K, D, generator=rng)
    logvar = 0.1 * torch.randn(K, D, generator=rng)
    return MixtureInputs(z, mu, logvar, torch.log_softmax(0.1 * torch.randn(K, generator=rng), 0))


def concentrated(M: int, K: int, D: int, seed: int = 0) -> MixtureInputs:
    """What training gives: a few clusters, narrow components in the active dimensions, rows near one of them.

    About half the dimensions are active; in the others every component is close to the prior N(0, 1).  Rows and
    components stand in random order, as a data set's do.
    """
    rng = torch.Generator().manual_seed(seed)
    active = max(1, round(0.45 * D))
    centres = torch.randn(max(1, min(10, K // 10)), active, generator=rng)
    cluster = torch.randint(len(centres), (K,), generator=rng)
    mu = 0.02 * torch.randn(K, D, generator=rng)
    mu[:, :active] = centres[cluster] + 0.6 * torch.randn(K, active, generator=rng)
    logvar = 0.02 * torch.randn(K, D, generator=rng)
    logvar[:, :active] += -2.6 + 0.3 * torch.randn(K, active, generator=rng)
    nearest = torch.randint(K, (M,), generator=rng)
    z = mu[nearest] + torch.exp(0.5 * logvar[nearest]) * torch.randn(M, D, generator=rng)
    return MixtureInputs(z, mu, logvar, torch.full((K,), -math.log(K)))


def from_file(path: Path, M: int | None = None, K: int | None = None) -> MixtureInputs:
    """The first M rows of z and the first K components of an .npz file with z [., D], mu and logvar [., D].

    Weights are equal, as an aggregated posterior's are.

    Raises:
        ConfigError: the file is not there, not what it should be, or too small.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            z, mu, logvar = (torch.from_numpy(file[key]).float() for key in ("z", "mu", "logvar"))
    except FileNotFoundError as error:
        raise ConfigError(f"--inputs: there is no file {path}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--inputs {path}: should be an .npz file with z, mu and logvar ({error})") from error
    if z.ndim != 2 or mu.ndim != 2 or mu.shape != logvar.shape or z.shape[1] != mu.shape[1]:
        raise ConfigError(
            f"--inputs {path}: z, mu and logvar should be [M, D], [K, D] and [K, D], "
            f"not {list(z.shape)}, {list(mu.shape)} and {list(logvar.shape)}"
        )
    M, K = M or min(1024, len(z)), K or len(mu)
    if len(z) < M or len(mu) < K:
        raise ConfigError(f"--inputs {path}: has {len(z)} rows and {len(mu)} components, fewer than {M} and {K}")
    return MixtureInputs(z[:M], mu[:K], logvar[:K], torch.full((K,), -math.log(K)))


def make(inputs: str, M: int, K: int, D: int) -> MixtureInputs:
    """Inputs by name: diffuse, concentrated, or the path of a file, of which the first M and K are taken."""
    if inputs == "diffuse":
        return diffuse(M, K, D)
    if inputs == "concentrated":
        return concentrated(M, K, D)
    made = from_file(Path(inputs), M, K)
    if made.mu.shape[1] != D:
        raise ConfigError(f"--inputs {inputs}: has D = {made.mu.shape[1]}, not {D}")
    return made


def find_latents() -> Path | None:
    """mnist_latents.npz in the folder that FASTVAE_DATA names, or None."""
    path = Path(os.environ.get("FASTVAE_DATA", ".")) / LATENTS
    return path if path.is_file() else None


def label(inputs: str) -> str:
    """What a record calls inputs: the name, or the file's name without its folder and suffix."""
    return inputs if inputs in SYNTHETIC else Path(inputs).stem
