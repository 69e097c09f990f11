"""A peer: one way to compute the density of a mixture, and what it needs to run."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from . import probe

MixtureLogProb = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One way to compute log p(z) of a mixture of K diagonal Gaussians.

    Attributes:
        name: what `--peers`, tables and plots call it.
        log_prob: (z [M, D], mu [K, D], logvar [K, D] or [1, D], log_weights [K]) -> [M], nats, float32;
            differentiable by autograd if `differentiable`.
        ours: part of fastvae, so never what fastvae is compared with.
        needs: the packages it imports beyond torch, by the names they are imported under.
        needs_compiler: it builds C++ as it runs, on the CPU.
        devices: the device types it runs on.
        differentiable: whether it can be asked for gradients.
        compiled: run `log_prob` under torch.compile, compiled anew for each case.
        normalizes: it takes log_weights for logits of weights that sum to one, which changes nothing but their
            gradient.
        allowed_error: how far log p may be from float64, nats, and how far a gradient, as a fraction of the largest
            element of that gradient, before its result counts as wrong.
        full_arrays: how many arrays of M x K x D float32 it holds at once, (forward, forward + backward).
        pair_arrays: the same for arrays of M x K.
        environment: environment variables to set while it runs.
        on_request: runs only where `--peers` or a case names it.
    """

    name: str
    log_prob: MixtureLogProb
    ours: bool = False
    needs: tuple[str, ...] = ()
    needs_compiler: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    differentiable: bool = True
    compiled: bool = False
    normalizes: bool = False
    allowed_error: float = 1e-3
    full_arrays: tuple[float, float] = (0, 0)
    pair_arrays: tuple[float, float] = (0, 0)
    environment: Mapping[str, str] = field(default_factory=dict)
    on_request: bool = False

    def bytes_needed(self, M: int, K: int, D: int, backward: bool) -> int:
        """Bytes of the arrays that grow with M x K, for a (M, K, D) problem."""
        return int(4 * M * K * (self.full_arrays[backward] * D + self.pair_arrays[backward]))

    def missing(self, device: str) -> str | None:
        """What would have to be there for it to run, or None."""
        packages = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if packages:
            return f"needs {' and '.join(packages)}, not installed"
        wants_compiler = self.needs_compiler or self.compiled
        if device == "cpu" and wants_compiler and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "needs a C++ compiler, and there is none on PATH"
        isa = self.environment.get("FASTVAE_CPU_ISA", "native")
        return None if probe.has_isa(isa) else f"needs {isa}, which this machine does not have"

    def unfit(self, device: str, M: int, K: int, D: int, backward: bool, limit: int) -> str | None:
        """Why it is not to run this problem in `limit` bytes of memory, or None."""
        if device not in self.devices:
            return f"does not run on {device}"
        if backward and not self.differentiable:
            return "has no gradients"
        wanted = self.bytes_needed(M, K, D, backward)
        if wanted > limit:
            return f"would need about {wanted / 1e9:.1f} GB of memory, the limit is {limit / 1e9:.1f} GB"
        return None
