"""Rows stay on their rank, and the components of all ranks pass by: the exchange of ring attention.

In step s of R, rank r holds the components of rank o = r - s (modulo R).  It computes l_o, their log density at its own
rows, while it sends them to the next rank and receives the following ones.  What the steps give is merged on the way:

    l = logsumexp_o l_o        score = sum_o w_o score_o,  w_o = exp(l_o - l)

Backward goes round once more.  The gradients of the components travel behind them: each rank adds the part of its rows,
and after R steps the sum is back at the components' owner.  What reaches z, and a logvar that all components share,
stays:

    dL/dmu_k = sum over ranks of w_o g dl_o/dmu_k,  component k of rank o        dL/dz = sum_o w_o g dl_o/dz

The order of each sum is that of the ring, and so the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastvae import reference
from fastvae.autograd import differentiable_once
from fastvae.backends import BACKENDS
from fastvae.distributed.link import Link
from fastvae.streaming import Merged

if TYPE_CHECKING:
    from torch.distributed import Work


class Ring(NamedTuple):
    """What a rank knows of the others' components, and how it computes with them."""

    link: Link
    counts: list[int]  # how many components each rank has
    shared_logvar: bool  # whether all components have one logvar, which does not travel
    with_score: bool
    dense: bool
    backend: str

    def log_prob_and_score(
        self, z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(log p(z) [M], score [M, D]); the latter means nothing where it is not asked for.

        Args:
            z: [M, D], the rank's rows.
            mu, logvar, log_weights: [K_r, D], [K_r, D] or shared [1, D], and [K_r], the rank's components.
            exclude: [M], counted over the components of all ranks.
        """
        arguments = z, mu, logvar, log_weights
        if not torch.is_grad_enabled():
            arguments = z.detach(), mu.detach(), logvar.detach(), log_weights.detach()
        return _RingLogProb.apply(*arguments, exclude, self)

    def passing_by(
        self, mu: Tensor, logvar: Tensor, log_weights: Tensor
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
        """(owner, its components) in each step.  While the caller computes with them, the next are on their way."""
        own = [mu, log_weights] if self.shared_logvar else [mu, logvar, log_weights]
        here, size = _packed(own), self.link.size
        for step in range(size):
            owner = (self.link.rank - step) % size
            if step < size - 1:
                arriving = here.new_empty(_packed_size(own, self.counts[owner - 1]))
                underway = self.link.start_shift(here, arriving)
            parts = _unpacked(here, self.counts[owner], own)
            yield owner, (parts[0], logvar if self.shared_logvar else parts[1], parts[-1])
            if step < size - 1:
                self.link.finish(underway)
                here = arriving


class _RingLogProb(torch.autograd.Function):
    """(log p(z) [M], score [M, D] or without elements); the score is a constant to autograd."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor, exclude: Tensor | None, ring: Ring
    ) -> tuple[Tensor, Tensor]:
        need_z, *need_parameters = ctx.needs_input_grad[:4]
        # The score leaves out what backward may leave out.  Where z alone needs a gradient, it spares backward a round.
        ctx.z_alone = need_z and not any(need_parameters) and not ring.dense
        with_score = ring.with_score or ctx.z_alone
        merged, of_owners = Merged(z, with_score), None
        if any(ctx.needs_input_grad) and not ctx.z_alone:
            of_owners = z.new_full((ring.link.size, len(z)), -math.inf)
        for owner, components in ring.passing_by(mu, logvar, log_weights):
            if ring.counts[owner] == 0:
                continue
            mixture = z, *components, exclude_of(exclude, ring.counts, owner)
            log_prob, score = _log_prob(ring.backend, with_score, *mixture)
            merged.add(log_prob, score)
            if of_owners is not None:
                of_owners[owner] = log_prob
        # In float64 for backward too: a rounding of l, of many nats, is one of all weights.
        log_prob, score = merged.result(torch.float64)
        score = z.new_empty(0) if score is None else score.to(z.dtype)
        ctx.save_for_backward(z, mu, logvar, log_weights, exclude, log_prob, of_owners, score if ctx.z_alone else None)
        ctx.ring = ring
        ctx.mark_non_differentiable(score)
        return log_prob.to(z.dtype), score

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        z, mu, logvar, log_weights, exclude, log_prob, of_owners, score = ctx.saved_tensors
        if ctx.z_alone:
            return grad[:, None] * score, None, None, None, None, None
        ring: Ring = ctx.ring
        need = ctx.needs_input_grad[:4]
        stays = [need[0], need[2] and ring.shared_logvar]
        travels = [need[1], need[2] and not ring.shared_logvar, need[3]]
        of_z, of_logvar = (torch.zeros_like(t) if n else None for t, n in zip((z, logvar), stays, strict=True))
        returning = _Returning(ring, _those([mu, logvar, log_weights], travels))
        for owner, components in ring.passing_by(mu, logvar, log_weights):
            parts: Sequence[Tensor] = components
            if ring.counts[owner]:
                weight = share_of(of_owners[owner], log_prob)
                weight = weight if ring.dense else without_traces(weight)
                mixture = z, *components, exclude_of(exclude, ring.counts, owner)
                dz, *parts = _gradients(ring, grad * weight, of_owners[owner], mixture, need)
                if of_z is not None:
                    of_z += dz
                if of_logvar is not None:
                    of_logvar += parts[1]
            returning.add(owner, _those(parts, travels))
        sums = iter(returning.own())
        of_components = [next(sums) if goes else None for goes in travels]
        if of_logvar is not None:
            of_components[1] = of_logvar
        return of_z, *of_components, None, None


def exclude_of(exclude: Tensor | None, counts: list[int], rank: int) -> Tensor | None:
    """By the numbers of one rank's components, what is counted over those of all ranks, of which each has `counts`."""
    if exclude is None:
        return None
    own = exclude - sum(counts[:rank])
    return own.masked_fill((own < 0) | (own >= counts[rank]), -1)


def share_of(of_rank: Tensor, log_prob: Tensor) -> Tensor:
    """exp(l_r - l), a rank's share of the density, in the dtype of l_r; zero where the density is.  l is in float64."""
    return torch.exp(of_rank - log_prob).masked_fill(log_prob == -torch.inf, 0.0).to(of_rank.dtype)


def without_traces(weight: Tensor) -> Tensor:
    """The weights of shares of the density, without those that count for nothing.

    Of a row that other components hold, what is left are subnormal numbers, which take a CPU many times longer.  The
    root of the smallest normal number leaves the kernels' responsibilities room above these.
    """
    return weight.masked_fill(weight < torch.finfo(weight.dtype).tiny ** 0.5, 0.0)


class _Returning:
    """Sums over the ranks that travel one step behind the components that they belong to.

    Args:
        like: what the rank's own sums are like, [K_r, ...] each.
    """

    def __init__(self, ring: Ring, like: list[Tensor]) -> None:
        self._ring, self._like = ring, like
        self._arriving: Tensor | None = None  # for the components of the next step
        self._underway: list[Work] = []

    def add(self, owner: int, parts: list[Tensor]) -> None:
        """Add the rank's part to what the ranks before it have added, and send the sum on."""
        if not self._like:
            return
        total, before = _packed(parts), self._arrived()
        if before is not None:
            total += before
        self._arriving = total.new_empty(_packed_size(self._like, self._ring.counts[owner - 1]))
        self._underway = self._ring.link.start_shift(total, self._arriving)

    def own(self) -> list[Tensor]:
        """After the last step, the sums of the rank's own components."""
        arrived = self._arrived()
        return [] if arrived is None else _unpacked(arrived, self._ring.counts[self._ring.link.rank], self._like)

    def _arrived(self) -> Tensor | None:
        self._ring.link.finish(self._underway)
        return self._arriving


def _those(values: Sequence[Tensor], wanted: list[bool]) -> list[Tensor]:
    return [value for value, want in zip(values, wanted, strict=True) if want]


def _packed(values: list[Tensor]) -> Tensor:
    """In one piece, that travels as one message."""
    return torch.cat([value.flatten() for value in values])


def _packed_size(like: list[Tensor], K: int) -> int:
    return K * sum(math.prod(value.shape[1:]) for value in like)


def _unpacked(packed: Tensor, K: int, like: list[Tensor]) -> list[Tensor]:
    """[K, ...] each, contiguous."""
    pieces = packed.split([_packed_size([value], K) for value in like])
    return [piece.view(K, *value.shape[1:]) for piece, value in zip(pieces, like, strict=True)]


def _log_prob(
    backend: str, with_score: bool, z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor, exclude: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if backend == "reference":
        return reference.mixture_log_prob_and_score(z, mu, logvar, log_weights, exclude=exclude)
    operators = BACKENDS[backend].operators
    if with_score:
        return operators.mixture_log_prob_and_score(z, mu, logvar, log_weights, exclude)
    return operators.mixture_log_prob(z, mu, logvar, log_weights, exclude), None


def _gradients(
    ring: Ring, grad: Tensor, log_prob: Tensor, mixture: tuple[Tensor | None, ...], need: tuple[bool, ...]
) -> list[Tensor]:
    """Of the log density of some components, in z, mu, logvar, log_weights; without elements where it needs none."""
    if ring.backend != "reference":
        backward = BACKENDS[ring.backend].operators.mixture_log_prob_backward
        return list(backward(grad.contiguous(), log_prob, *mixture, ring.dense, *need))
    *floating, exclude = mixture
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_(n) for value, n in zip(floating, need, strict=True)]  # type: ignore[union-attr]
        again = reference.mixture_log_prob(*leaves, exclude=exclude)
    found = iter(torch.autograd.grad(again, [leaf for leaf in leaves if leaf.requires_grad], grad))
    return [next(found) if n else grad.new_empty(0) for n in need]
