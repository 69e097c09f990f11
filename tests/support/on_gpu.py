"""The shared tests on a GPU: operators that take tensors on the CPU, compute on the device, and bring results back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .internals import Operators


def through_gpu(operators: Operators) -> Operators:
    """The same operators, there and back; autograd, checks and the choice of a backend stay what they are."""
    return Operators(*map(_there_and_back, operators))


def _there_and_back(operator: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        there = [a.to("cuda") if isinstance(a, Tensor) else a for a in arguments]
        result = operator(*there)
        torch.cuda.synchronize()  # an error belongs to the test that made it
        return result.to("cpu") if isinstance(result, Tensor) else tuple(r.to("cpu") for r in result)

    return call
