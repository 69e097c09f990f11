"""Adam as the VampPrior paper's code has it."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Adam


class NormalizedAdam(Adam):
    """Adam on gradients that are divided by their norm, each weight tensor's by its own.

    The steps then do not depend on the scale of the loss, nor does one large batch gradient outweigh many small ones.

    Source: AdamNormGrad in the code of Tomczak and Welling, VAE with a VampPrior (AISTATS 2018).
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; the gradients that it leaves are the normalised ones."""
        if closure is not None:
            raise TypeError("NormalizedAdam takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(torch.linalg.vector_norm(parameter.grad) + 1e-7)
        return super().step()
