"""What the arguments of the operations may be, and the form in which the operators take them.

Every public operation checks here, before a backend is chosen, so that the kernels may assume what `operators.py` says.
An error names the argument, what it was and what it should have been.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from fastvae import _torch_compat


def tensor(name: str, value: object) -> None:
    """TypeError for what is no tensor, or no dense one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not {value.layout}; {name}.to_dense() makes one")


def result_dtype(*, log_weights: Tensor | None = None, **tensors: Tensor) -> torch.dtype:
    """The dtype that the tensors promote to; TypeError for what is not floating, ValueError for mixed devices."""
    first, dtype, device = None, None, None
    if log_weights is not None:
        tensors["log_weights"] = log_weights
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            tensor(name, value)
        own = value.dtype
        if own != dtype:
            if not own.is_floating_point:
                raise TypeError(f"{name} must be a floating tensor, not {own}")
            dtype = own if dtype is None else torch.promote_types(dtype, own)
        if device is None:
            first, device = name, value.device
        elif value.device != device:
            raise ValueError(f"{name} is on {value.device}, but {first} is on {device}")
    assert dtype is not None
    return dtype


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a result of that dtype is computed with: float32 at least."""
    return dtype if dtype == torch.float64 else torch.float32


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """value.to(dtype), which takes long, beside a small operator, to find out that it has nothing to do."""
    return value if value.dtype == dtype else value.to(dtype)


def gaussian(mu: Tensor, logvar: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """mu and logvar of one shape [..., D], in `dtype`.

    logvar is cast before it is expanded, here and below, so that autograd sums its gradient before it rounds it.
    """
    if mu.ndim == 0 or mu.shape[-1] == 0:
        raise ValueError(f"mu must be [..., D] with D >= 1, not {shape_of(mu)}")
    logvar = cast(logvar, dtype)
    if not same_shape(logvar, mu.shape):
        logvar = _expand("logvar", logvar, mu.shape, "mu")
    return cast(mu, dtype), logvar


def mixture(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments in the dtype of the computation; logvar [K, D], or [1, D] where the components share it."""
    dtype = compute_dtype(result_dtype(z=z, mu=mu, logvar=logvar, log_weights=log_weights))
    mu, logvar, log_weights = components(mu, logvar, log_weights, dtype)
    K, D = mu.shape
    if z.ndim == 0 or z.shape[-1] != D:
        raise ValueError(f"z must be [..., {D}] to match mu {shape_of(mu)}, not {shape_of(z)}")
    if exclude is not None:
        excluded(exclude, z.shape, z.device, K)
    return cast(z, dtype), mu, logvar, log_weights, exclude


def labelled(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None, exclude: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """As `mixture`, for log_weights [L, K], of which each row's label chooses one [K].

    The labels' values are not looked at: the operators do so, where they have to wait for the device anyway.
    """
    dtype = compute_dtype(result_dtype(z=z, mu=mu, logvar=logvar, log_weights=log_weights))
    z, mu, logvar, _, exclude = mixture(cast(z, dtype), mu, logvar, None, exclude)
    labels_of("z", z, labels)
    K = mu.shape[0]
    if log_weights is None or log_weights.ndim != 2 or log_weights.shape[1] != K or log_weights.shape[0] == 0:
        given = None if log_weights is None else shape_of(log_weights)
        raise ValueError(f"with labels, log_weights must be [L, {K}] to match mu {shape_of(mu)}, L >= 1, not {given}")
    return z, mu, logvar, cast(log_weights, dtype), exclude


def labels_of(name: str, rows: Tensor, labels: Tensor) -> None:
    """labels is int64 [...] for rows [..., D]."""
    tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor, not {labels.dtype}")
    if not same_shape(labels, rows.shape[:-1]):
        raise ValueError(
            f"labels must be {list(rows.shape[:-1])} to match {name} {shape_of(rows)}, not {shape_of(labels)}"
        )
    if labels.device != rows.device:
        raise ValueError(f"labels is on {labels.device}, but {name} is on {rows.device}")


def label_range(labels: Tensor, count: int) -> None:
    """labels are in 0 ... count - 1; not looked at while they are traced or transformed."""
    if torch.compiler.is_compiling() or _torch_compat.in_functorch_transform() or not labels.numel():
        return
    low, high = (int(v) for v in labels.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"labels must be in 0 ... {count - 1}, they span {low} ... {high}")


def components(
    mu: Tensor, logvar: Tensor, log_weights: Tensor | None, dtype: torch.dtype, prefix: str = ""
) -> tuple[Tensor, Tensor, Tensor | None]:
    """mu [K, D], logvar [K, D], or [1, D] where the components share it, and log_weights [K], in `dtype`.

    Args:
        prefix: what the names of the caller's arguments begin with.
    """
    if mu.ndim != 2 or 0 in mu.shape:
        raise ValueError(f"{prefix}mu must be [K, D] with K >= 1 and D >= 1, not {shape_of(mu)}")
    K, D = mu.shape
    if log_weights is not None:
        if log_weights.shape != (K,):
            by_label = "; weights by label are for mixture_log_prob with labels" if log_weights.ndim == 2 else ""
            raise ValueError(
                f"log_weights must be [{K}] to match {prefix}mu {shape_of(mu)}, not {shape_of(log_weights)}{by_label}"
            )
        log_weights = cast(log_weights, dtype)
    logvar = cast(logvar, dtype)
    if not same_shape(logvar, mu.shape):
        if K not in (1, D) and same_shape(logvar, (K,)):  # where K = D, it is taken for [D]
            raise ValueError(
                f"{prefix}logvar must be broadcastable to [{K}, {D}] to match {prefix}mu, not [{K}]; "
                f"one log variance for each component is [{K}, 1], {prefix}logvar[:, None]"
            )
        shared = logvar.ndim < 2 or logvar.shape[0] == 1
        logvar = _expand(f"{prefix}logvar", logvar, (1, D) if shared else (K, D), f"{prefix}mu")
    return cast(mu, dtype), logvar, log_weights


def excluded(exclude: Tensor, z_shape: tuple[int, ...], device: torch.device, K: int | None) -> None:
    """exclude is int64 [...] for z [..., D], and names components or -1; K None: whatever they are."""
    tensor("exclude", exclude)
    lead = z_shape[:-1]
    if exclude.dtype != torch.int64:
        raise TypeError(f"exclude must be an int64 tensor, not {exclude.dtype}")
    if not same_shape(exclude, lead):
        raise ValueError(f"exclude must be {list(lead)} to match z {list(z_shape)}, not {shape_of(exclude)}")
    if exclude.device != device:
        raise ValueError(f"exclude is on {exclude.device}, but z is on {device}")
    # Elsewhere than on the CPU a look at the values would wait for the device, and neither a graph nor a transform can
    # branch on them: there an index that is out of range leaves nothing out.
    if torch.compiler.is_compiling() or exclude.device.type != "cpu" or _torch_compat.in_functorch_transform():
        return
    if exclude.numel() and K is not None:
        low, high = (int(v) for v in exclude.aminmax())
        if low < -1 or high >= K:
            raise ValueError(f"exclude must be in -1 ... {K - 1} for K = {K}, it spans {low} ... {high}")


def sampled_shape(num_samples: int | None, mu: Tensor) -> tuple[int, ...]:
    """The shape of the samples of mu [..., D]: [S, ..., D], or [..., D] where num_samples is None."""
    if num_samples is None:
        return mu.shape
    count("num_samples", num_samples)
    return num_samples, *mu.shape


def count(name: str, value: object, otherwise: str = "") -> None:
    """TypeError for what is no integer, ValueError for one below 1; otherwise: what else the caller takes."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer{otherwise}, not {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1{otherwise}, not {value}")


def positive(name: str, value: Any) -> int:
    """value as an int, also of NumPy's integers; TypeError for what is no integer, ValueError for one below 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if (number := operator.index(value)) < 1:
        raise ValueError(f"{name} must be at least 1, not {number}")
    return number


def shape_of(value: Tensor) -> list[int]:
    """The shape as messages print it."""
    return list(value.shape)


def same_shape(value: Tensor, shape: tuple[int, ...]) -> bool:
    """value.shape == shape, which for another number of dimensions would compare a first size that may be symbolic."""
    return value.ndim == len(shape) and value.shape == shape


def rows(value: Tensor) -> Tensor:
    """[..., D] -> contiguous [M, D]; M is spelt out because -1 is ambiguous for an empty batch."""
    if value.ndim != 2:
        value = value.reshape(math.prod(value.shape[:-1]), value.shape[-1])
    return value.contiguous()


def flat(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The checked arguments of a mixture as the operators take them: z [M, D], all contiguous."""
    return (
        rows(z),
        mu.contiguous(),
        logvar.contiguous(),
        None if log_weights is None else log_weights.contiguous(),
        None if exclude is None else exclude.reshape(-1).contiguous(),
    )


def shaped(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshaped, but for what has the shape: each view is a node of the graph, which a small call feels."""
    return value if same_shape(value, shape) else value.reshape(shape)


def _expand(name: str, value: Tensor, shape: tuple[int, ...], other: str) -> Tensor:
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must be broadcastable to {list(shape)} to match {other}, not {shape_of(value)}"
        ) from None
