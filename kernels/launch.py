"""What every launcher needs: the device of its tensors, and whether kernels are compiled or interpreted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import triton
import triton.language as tl

T = TypeVar("T")


@triton.jit
def _nothing(x):
    tl.store(x, tl.load(x))


# Decided when Triton decorates, by TRITON_INTERPRET; interpreted kernels take tensors on the CPU, compiled ones do not.
INTERPRETED = not isinstance(_nothing, triton.JITFunction)


def on_device_of(argument: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Make the device of a positional tensor argument the current one during the call: Triton launches on that."""

    def decorate(launcher: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(launcher)
        def wrapper(*args, **kwargs) -> T:
            device = args[argument].device
            if device.type != "cuda":
                return launcher(*args, **kwargs)
            with torch.cuda.device(device):
                return launcher(*args, **kwargs)

        return wrapper

    return decorate
