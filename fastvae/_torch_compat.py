"""What is asked of PyTorch beside its public interface, in one room, so that a new version is checked in one room."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., object])


def constant_in_graphs(function: Function) -> Function:
    """Let torch.compile call the function while it traces and keep the result as a constant of the graph.

    torch.compiler.assume_constant_result sets the same mark, but imports the compiler, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Function -> Function, which torch.compile calls and does not trace.  torch.compiler.disable does the same, but imports
# the compiler.
not_traced = torch._disable_dynamo


# () -> bool, whether a transform of torch.func is active: grad, vmap, jvp, ...
in_functorch_transform = torch._C._are_functorch_transforms_active


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation may be going on."""
    return forward_ad._current_level >= 0


def has_tangent(value: object) -> bool:
    """Whether a value is a tensor that carries a tangent of forward mode."""
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


# () -> bool, whether this process was forked from one that had used CUDA, and so cannot use it.
forked_from_cuda = torch.cuda._is_in_bad_fork


@cache
def no_cuda_device() -> str | None:
    """That there is no NVIDIA GPU that PyTorch can use, in words, or None.  AMD's are "cuda" to PyTorch, too."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    return "this PyTorch is for AMD's GPUs" if torch.version.hip else None


def index_of(device: torch.device) -> int:
    """The number of a CUDA device, of the current one where the device has none."""
    return torch.cuda.current_device() if device.index is None else device.index


def has_kernel(operator: str, dispatch_key: str) -> bool:
    """Whether an operator ("fastvae::mixture_log_prob") has a kernel of its own for a dispatch key ("CUDA")."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, dispatch_key)
