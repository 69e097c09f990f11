"""A density as it is called by the audit: whatever shape it returns, one number for each row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvae.auditing.claim import Claim
from fastvae.auditing.report import Finding
from fastvae.contracts import describe

PER_ROW, PER_DIMENSION, PER_COMPONENT, KEPT, REDUCED, UNKNOWN = (
    "per row", "per dimension", "per component", "kept dimension", "reduced", "unknown",
)  # fmt: skip

_SHAPES = {
    PER_DIMENSION: (
        "sum-over-dimensions-forgotten",
        "log_prob returns [M, D], a number for each dimension; a density has one number for each point, [M].",
        "Sum over the dimensions inside log_prob, before logsumexp over the components.",
    ),
    PER_COMPONENT: (
        "sum-over-components-forgotten",
        "log_prob returns [M, K], a number for each component; a density has one number for each point, [M].",
        "Take logsumexp over the components inside log_prob.",
    ),
    KEPT: (
        "trailing-dimension",
        "log_prob returns [M, 1].  Added to a tensor [M], such as log q, it broadcasts to [M, M].",
        "Return [M]: leave keepdim=True out, or squeeze(-1).",
    ),
    REDUCED: (
        "reduced-over-batch",
        "log_prob returns one number for the whole batch, so that no point's density can be told from it.",
        "Return one number for each point, [M]; take the mean in the loss.",
    ),
    UNKNOWN: (
        "shape",
        "log_prob does not return one number for each point, [M].",
        "Return [M] for z [M, D].",
    ),
}


class Observed:
    """The density; `shape` is what it returns for z [M, D].

    Attributes:
        dtype: what it returns for the dtype of the claim's components.
        findings: what is wrong with the shape, and with what becomes of z.
    """

    def __init__(self, density: Callable[[Tensor], Tensor], claim: Claim, z: Tensor) -> None:
        self.density, self.claim = density, claim
        given = claim.to_prior(z).clone()
        output = self._raw(given)
        M, D, K = len(z), claim.D, claim.K
        shapes = {(M,): PER_ROW, (M, 1): KEPT, (M, D): PER_DIMENSION, (M, K): PER_COMPONENT, (): REDUCED, (1,): REDUCED}
        if D == 1:
            shapes[M, 1] = KEPT
        self.shape = shapes.get(tuple(output.shape), UNKNOWN)
        self.dtype = output.dtype
        self.findings = []
        if not torch.equal(given, claim.to_prior(z)):
            self.findings.append(
                Finding(
                    "changes-its-input",
                    "log_prob changes the tensor z that it is given.",
                    None,
                    "every call",
                    "Compute on a copy: no operation in place, such as z.sub_(mu) or z *= s, on the argument.",
                )
            )
        if self.shape != PER_ROW:
            name, words, remedy = _SHAPES[self.shape]
            where = f"z {list(z.shape)} gives {list(output.shape)}, with K = {K}"
            self.findings.append(Finding(name, words, None, where, remedy))

    def __call__(self, z: Tensor) -> Tensor:
        """One number a row, [M] for z [M, D], in float64 on the CPU; differentiable where z or the prior is."""
        z = self.claim.to_prior(z).clone()  # which the density may change
        if self.shape == REDUCED:
            return torch.stack([self._raw(row).reshape(()) for row in z[:, None]]).double().cpu()
        output = self._raw(z).cpu().double()
        if self.shape in (PER_DIMENSION, PER_COMPONENT):
            return output.sum(-1) if self.shape == PER_DIMENSION else torch.logsumexp(output, -1)
        return output.reshape(len(z))

    def _raw(self, z: Tensor) -> Tensor:
        output = self.density(z)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            told = f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else describe(output)
            raise TypeError(f"log_prob must return a floating tensor [M] for z {list(z.shape)}, not {told}")
        return output
