"""The operators under torch.vmap.

Where an operator treats each row by itself, a batch of rows becomes more rows; else the operator is called once for
each element of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# For operators that treat each row by itself: which arguments have a row each, and which ask for a sum over the rows.
_ROWS: dict[str, tuple[int, ...]] = {
    "mixture_log_prob": (0, 4),
    "mixture_log_prob_and_score": (0, 4),
    "mixture_log_prob_backward": (0, 1, 2, 6),
    "labelled_mixture_log_prob": (0, 4, 5),
    "labelled_mixture_log_prob_backward": (0, 1, 2, 6, 7),
    "gaussian_kl": (0, 1),
    "gaussian_kl_backward": (0, 1, 2),
}
_SUMS: dict[str, tuple[int, ...]] = {
    "mixture_log_prob_backward": (9, 10, 11),
    "labelled_mixture_log_prob_backward": (12, 13, 14),
}


def rule(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.library.register_vmap takes for the operator of that name."""
    rows, sums = _ROWS.get(name, ()), _SUMS.get(name, ())

    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        batched = [i for i, dim in enumerate(in_dims) if dim is not None]
        if set(batched) <= set(rows) and not any(arguments[i] for i in sums):
            return _joined(operator, info.batch_size, in_dims, arguments, rows)
        return _one_by_one(operator, info.batch_size, in_dims, arguments)

    return vmap


def _joined(
    operator: Callable[..., Any],
    B: int,
    in_dims: tuple[int | None, ...],
    arguments: tuple[Any, ...],
    rows: tuple[int, ...],
) -> tuple[Any, Any]:
    given = list(arguments)
    for i in rows:
        if given[i] is not None:
            dim = in_dims[i]
            whole = given[i].expand(B, *given[i].shape) if dim is None else given[i].movedim(dim, 0)
            given[i] = whole.flatten(0, 1).contiguous()
    M = given[rows[0]].shape[0]
    results = operator(*given)
    single = isinstance(results, Tensor)
    parts = [results] if single else list(results)
    dims = [0 if len(part) == M else None for part in parts]  # a gradient that is not asked for has no rows
    parts = [part if dim is None else part.unflatten(0, (B, -1)) for part, dim in zip(parts, dims, strict=True)]
    return (parts[0], dims[0]) if single else (tuple(parts), tuple(dims))


def _one_by_one(
    operator: Callable[..., Any], B: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    def of(b: int) -> Any:
        pairs = zip(arguments, in_dims, strict=True)
        return operator(*(a if dim is None else a.select(dim, b).contiguous() for a, dim in pairs))

    results = [of(b) for b in range(B)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(map(torch.stack, zip(*results, strict=True)))
    return stacked, (0,) * len(stacked)
