"""What encoders, decoders, priors and likelihoods must be and must return; the errors name the one that does not.

Where shapes differ but broadcast, a computation runs and gives another number; so each result is checked where it
comes in.  A check looks at shapes alone and costs nothing beside the call that it follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import _torch_compat


def require_tensor(what: str, value: object) -> Tensor:
    """value, or a TypeError that names it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, not {describe(value)}")
    return value


def require_shape(what: str, value: object, shape: Sequence[int]) -> Tensor:
    """value, which must be a tensor of this shape: not one that broadcasts to it."""
    tensor = require_tensor(what, value)
    if tensor.shape != tuple(shape):
        raise ValueError(f"{what} must be {list(shape)}, not {list(tensor.shape)}")
    return tensor


def require_methods(what: str, value: object, methods: Sequence[str], instead: str) -> None:
    """TypeError unless value is an object, not a class, with these methods; instead: what to give."""
    if isinstance(value, type):
        raise TypeError(f"{what} must be {instead}, not the class {value.__name__} itself")
    missing = [name for name in methods if not hasattr(value, name)]
    if missing:
        raise TypeError(f"{what} must be {instead}; {describe(value)} has no {', '.join(missing)}")


def describe(value: object) -> str:
    """A value in an error message: "a tensor [16, 8]", "a tuple of 3", "a list of 1", "a dict"."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r}" if isinstance(value, str) else f"a {type(value).__name__}"


def encode(encoder: nn.Module, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(mu [B, D], logvar [B, D]) of x [B, *x_shape], and of y [B, ...] where it is given.

    Raises:
        TypeError, ValueError: as :func:`gaussian_from`.
    """
    output = encoder(x) if y is None else encoder(x, y)
    return gaussian_from("the encoder", output, f"an input {list(x.shape)}", "B, D", x.shape[:1])


def gaussian_from(
    what: str, output: object, of: str, shape: str, lead: Sequence[int], D: int | None = None
) -> tuple[Tensor, Tensor]:
    """A network's output as (mu, logvar), both [*lead, D].

    Args:
        what: the network, in words.
        output: what it returned.
        of: what it was given, in words.
        shape: the shape that mu and logvar should have, in letters.
        lead: the sizes before the last one.
        D: the last one, where it is known.

    Raises:
        TypeError: the output is not two tensors.
        ValueError: these are not of that shape.  A logvar that would broadcast counts too: [D] and [B] look alike.
    """
    wanted = f"{what} must return (mu, logvar), both [{shape}]; for {of} it returned"
    if not isinstance(output, tuple | list) or len(output) != 2 or not all(isinstance(o, Tensor) for o in output):
        raise TypeError(f"{wanted} {describe(output)}")
    mu, logvar = output
    known = (*lead, mu.shape[-1] if D is None and mu.ndim else D)
    if mu.shape != known or mu.shape != logvar.shape:
        raise ValueError(f"{wanted} mu {list(mu.shape)} and logvar {list(logvar.shape)}")
    return mu, logvar


def evaluate(what: str, density: Callable[[Tensor], Any], z: Tensor) -> Tensor:
    """density(z), which must be [...] for z [..., D]; what: the density's name."""
    return require_shape(f"{what} of z {list(z.shape)}", density(z), z.shape[:-1])


def require_index(index: Tensor, N: int, *, others: bool = False) -> None:
    """index must be int64 [B] in 0 ... N - 1, or -1 for `others`; its values are looked at where that is free."""
    if require_tensor("index", index).dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index must be int64 [B], not {index.dtype} {list(index.shape)}")
    if index.numel() and index.device.type == "cpu" and is_readable(index):
        smallest, hint = (-1, ", -1 for what is not in the data") if others else (0, "")
        low, high = (int(value) for value in index.aminmax())
        if low < smallest or high >= N:
            raise ValueError(f"index must be in {smallest} ... {N - 1} for N = {N}{hint}, and spans {low} ... {high}")


def is_readable(tensor: Tensor) -> bool:
    """Whether a check may look at the values: not while they are traced, and not where there are none."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, nn.Parameter)  # fake tensors are a subclass
        and not tensor.is_meta
        and not _torch_compat.in_functorch_transform()
    )
