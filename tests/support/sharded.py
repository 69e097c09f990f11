"""What the ranks of a sharded mixture run, and how a case is cut into theirs and put together again."""

from __future__ import annotations

import datetime
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes
from budget import Case, Result
from torch import Tensor

import fastvae.distributed

WORLD = 4

GROUPS: dict[int, Any] = {}  # on a rank: a group of the first ranks, by their number


def group_of(size: int) -> Any:
    if not GROUPS:  # on all ranks at the first call of any
        timeout = datetime.timedelta(seconds=30)
        GROUPS.update({n: dist.new_group(list(range(n)), timeout=timeout) for n in range(1, WORLD + 1)})
    return GROUPS[size]


class Sharding(NamedTuple):
    """How a case is spread over the first ranks of the world."""

    components: list[int]  # how many each rank has
    rows: list[int] | None = None  # how many each rank has; None where they are replicated
    impl: str | None = None
    dense: bool = False

    def of(self, case: Case, rank: int) -> Case:
        """What a rank has of a case."""
        K = len(case.mu)
        first = sum(self.components[:rank])
        k = slice(first, first + self.components[rank])
        m = slice(None)
        if self.rows is not None:
            start = sum(self.rows[:rank])
            m = slice(start, start + self.rows[rank])
        shared = case.logvar.ndim < 2 or (len(case.logvar) == 1 and K > 1)
        return Case(
            case.z[m],
            case.mu[k],
            case.logvar if shared else case.logvar[k],
            None if case.log_weights is None else case.log_weights[k],
            case.grad[m],
            None if case.exclude is None else case.exclude[m],
        )


def run_on(rank: int, case: Case, sharding: Sharding) -> Result | None:
    """What a rank gets."""
    group = group_of(len(sharding.components))
    if rank >= len(sharding.components):
        return None
    own = sharding.of(case, rank)
    leaves = [None if v is None else v.clone().requires_grad_() for v in (own.z, own.mu, own.logvar, own.log_weights)]
    log_prob = fastvae.distributed.mixture_log_prob(
        *leaves,
        exclude=own.exclude,
        group=group,
        rows="replicated" if sharding.rows is None else "sharded",
        dense_backward=sharding.dense,
        impl=sharding.impl,
    )
    grads = list(torch.autograd.grad(log_prob, [v for v in leaves if v is not None], own.grad))
    if own.log_weights is None:
        grads.append(own.z.new_empty(0))
    return Result(log_prob.detach(), *grads)


def together(case: Case, sharding: Sharding, parts: list[Result | None]) -> Result:
    """The result of the unsharded call, of what the ranks got."""
    of_ranks = [part for part in parts if part is not None]
    assert len(of_ranks) == len(sharding.components)
    own_logvar = case.logvar.ndim == 2 and case.logvar.shape[0] == len(case.mu)
    log_prob, dz, dmu, dlogvar, dlog_weights = (list(values) for values in zip(*of_ranks, strict=True))
    if sharding.rows is None:  # the same bits on all ranks
        for values in (log_prob, dz, [] if own_logvar else dlogvar):
            assert all(same_bits(value, values[0]) for value in values)
        whole = [log_prob[0], dz[0], torch.cat(dmu), torch.cat(dlogvar) if own_logvar else dlogvar[0]]
    else:
        in_all = torch.cat(dlogvar) if own_logvar else torch.stack(dlogvar).sum(0)
        whole = [torch.cat(log_prob), torch.cat(dz), torch.cat(dmu), in_all]
    return Result(*whole, torch.cat(dlog_weights))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.125), b.nan_to_num(0.125))
