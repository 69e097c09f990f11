"""How an operation meets autograd: by a node of the graph, without one, or by the rules of torch.func."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvae import _torch_compat, transforms


class _NoGraph:
    """The ctx of a forward that no backward will follow."""

    needs_input_grad = (False,) * 16

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(*arguments), or what does the same without a node of the graph or within a transform.

    A node takes as long as a small operator, so that there is none where nothing asks for a gradient.  The compiler
    always meets the function, which it traces.

    Raises:
        NotImplementedError: an argument carries a tangent of forward mode, which would be lost.
    """
    if _torch_compat.in_functorch_transform():
        return transforms.call(function, *arguments)
    if _torch_compat.in_forward_mode() and any(map(_torch_compat.has_tangent, arguments)):
        raise NotImplementedError(transforms.NO_FORWARD_MODE)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _want_gradients(arguments)):
        return function.apply(*arguments)
    return function.forward(_NoGraph(), *arguments)


def _want_gradients(arguments: tuple[Any, ...]) -> bool:
    for argument in arguments:  # noqa: SIM110  a loop takes half the time of any() of a generator
        if isinstance(argument, Tensor) and argument.requires_grad:
            return True
    return False
