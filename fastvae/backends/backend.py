"""What a backend is to the rest of the library: a record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastvae.operators import ExponentOperators, Operators


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators, at one precision.

    Attributes:
        impl: the word by which a caller names it.
        devices: the types of the devices it takes tensors on; None, any.
        missing: device -> why it cannot run there and what would make it run, or None where it can.
        operators: its operators.
        precision: the precision it computes float32 with, in PyTorch's words; float64 is always "highest".
        default_on: the types of devices on which `impl=None` may take it; "*", any.
        measured_in: the records in benchmarks/results/ that this rests on.
        score_in_forward: its kernels compute the gradient in z apart from those of the parameters, so that forward may
            as well compute it where z needs a gradient.
        exponents: the operators that pass the exponents of a small problem from forward to backward, if it has them.
        about: what it is, in a few words, for `fastvae.info()`.
    """

    impl: str
    devices: tuple[str, ...] | None
    missing: Callable[[torch.device], str | None]
    operators: Operators
    precision: str = "highest"
    default_on: tuple[str, ...] = ()
    measured_in: tuple[str, ...] = ()
    score_in_forward: bool = False
    exponents: ExponentOperators | None = None
    about: str = ""

    def is_default_on(self, device: torch.device) -> bool:
        """Whether `impl=None` may take it for tensors on a device."""
        return "*" in self.default_on or device.type in self.default_on

    @property
    def name(self) -> str:
        """What the registry knows it by: `impl`, and the precision unless it is the highest."""
        return self.impl if self.precision == "highest" else f"{self.impl}-{self.precision}"
