"""The density of rows that have a label: two operators over those of any backend.

A label chooses a row's mixture: its weights over all components, log_weights [L, K], or the components of its group.
Rows are sorted by label, and components by group, so that a label's rows meet its mixture in one call of the backend's
operator.  What depends on the labels' values happens inside the operators, which torch.compile takes as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.backends import BACKENDS
from fastvae.operators import Schema, define, library


def forward(
    z, mu, logvar, log_weights, exclude, labels, groups, num_labels: int, with_score: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """(log p(z | label) [M], its score [M, D], or nothing where it is not asked for).

    labels int64 [M] are in 0 ... num_labels - 1.  Without groups, log_weights is [num_labels, K].  With groups, int64
    [K], a label is a group's number, and log_weights is [K] or None, which means 1 / K_g each.
    """
    operators = BACKENDS[backend].operators
    rows, mixtures = _Order.by("labels", labels, num_labels), _Mixtures(mu, logvar, log_weights, groups, num_labels)
    z, exclude = rows.sort(z), None if exclude is None else rows.sort(exclude)
    log_prob = z.new_full(z.shape[:1], -math.inf)
    score = torch.zeros_like(z) if with_score else z.new_empty(0)
    for label, m in rows.parts():
        mixture = mixtures.of(label)
        if mixture is None:
            continue
        arguments = z[m], *mixture, None if exclude is None else exclude[m]
        if with_score:
            log_prob[m], score[m] = operators.mixture_log_prob_and_score(*arguments)
        else:
            log_prob[m] = operators.mixture_log_prob(*arguments)
    return rows.restore(log_prob), rows.restore(score) if with_score else score


def backward(
    grad, log_prob, z, mu, logvar, log_weights, exclude, labels, groups, num_labels: int, dense: bool, need_z: bool,
    need_mu: bool, need_logvar: bool, need_log_weights: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients in z, mu, logvar and log_weights, each added up in the order of the labels."""
    operator = BACKENDS[backend].operators.mixture_log_prob_backward
    need = need_z, need_mu, need_logvar, need_log_weights
    rows, mixtures = _Order.by("labels", labels, num_labels), _Mixtures(mu, logvar, log_weights, groups, num_labels)
    grad, log_prob, z = (rows.sort(value) for value in (grad, log_prob, z))
    exclude = None if exclude is None else rows.sort(exclude)
    totals = [
        torch.zeros_like(value) if needed else z.new_empty(0)
        for value, needed in zip((z, mu, logvar, log_weights), need, strict=True)
    ]
    for label, m in rows.parts():
        mixture = mixtures.of(label)
        if mixture is None:
            continue
        parts = operator(grad[m], log_prob[m], z[m], *mixture, None if exclude is None else exclude[m], dense, *need)
        for total, place, part in zip(totals, (m, *mixtures.places(label)), parts, strict=True):
            if total.numel():
                total[place] += part
    dz, *parameters = totals
    return rows.restore(dz) if need_z else dz, *mixtures.restore(*parameters)


class _Order(NamedTuple):
    """How to sort what has a key each, and which places the keys 0, 1, ... then have.

    The order is stable, and None where everything is sorted already.
    """

    order: Tensor | None
    starts: list[int]

    @classmethod
    def by(cls, name: str, keys: Tensor, count: int) -> _Order:
        """The order by keys [N] in 0 ... count - 1; ValueError where one is not."""
        order = None
        if bool((keys[1:] < keys[:-1]).any()):
            keys, order = keys.sort(stable=True)
        starts = torch.searchsorted(keys, torch.arange(count + 1, device=keys.device)).tolist()
        if starts[0] > 0 or starts[-1] < len(keys):
            low, high = int(keys[0]), int(keys[-1])
            raise ValueError(f"{name} must be in 0 ... {count - 1}, they span {low} ... {high}")
        return cls(order, starts)

    def parts(self) -> Iterator[tuple[int, slice]]:
        """The keys that there are, each with its places."""
        return ((key, slice(*ends)) for key, ends in enumerate(pairwise(self.starts)) if ends[0] < ends[1])

    def sort(self, value: Tensor) -> Tensor:
        return value if self.order is None else value[self.order]

    def restore(self, value: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return value if self.order is None else torch.empty_like(value).index_copy_(0, self.order, value)


class _Mixtures:
    """The mixture of each label: all components with the label's weights, or the components of the label's group."""

    def __init__(
        self, mu: Tensor, logvar: Tensor, log_weights: Tensor | None, groups: Tensor | None, num_labels: int
    ) -> None:
        self._own_logvar = len(logvar) == len(mu)
        self._order = None if groups is None else _Order.by("groups", groups, num_labels)
        if self._order is not None:
            mu = self._order.sort(mu)
            logvar = self._order.sort(logvar) if self._own_logvar else logvar
            log_weights = None if log_weights is None else self._order.sort(log_weights)
        self._parameters = mu, logvar, log_weights

    def places(self, label: int) -> tuple[slice, slice, slice | int]:
        """Where the label's mixture is in mu, logvar and log_weights."""
        everything = slice(None)
        if self._order is None:
            return everything, everything, label
        components = slice(self._order.starts[label], self._order.starts[label + 1])
        return components, components if self._own_logvar else everything, components

    def of(self, label: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """The label's (mu, logvar, log_weights), or None where its group has no components."""
        mu, logvar, log_weights = self._parameters
        components, of_logvar, of_weights = self.places(label)
        if not len(mu[components]):
            return None
        return mu[components], logvar[of_logvar], None if log_weights is None else log_weights[of_weights]

    def restore(self, dmu: Tensor, dlogvar: Tensor, dlog_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients in the order in which the parameters were given; those without elements as they are."""
        if self._order is None:
            return dmu, dlogvar, dlog_weights
        dmu, dlog_weights = (self._order.restore(d) if d.numel() else d for d in (dmu, dlog_weights))
        return dmu, self._order.restore(dlogvar) if dlogvar.numel() and self._own_logvar else dlogvar, dlog_weights


_MIXTURE = (
    "Tensor z, Tensor mu, Tensor logvar, Tensor? log_weights, Tensor? exclude, Tensor labels, Tensor? groups, "
    "SymInt num_labels"
)


def _fake_forward(z, mu, logvar, log_weights, exclude, labels, groups, num_labels, with_score, backend):
    return z.new_empty(z.shape[0]), z.new_empty(z.shape if with_score else (0,))


def _fake_backward(
    grad, log_prob, z, mu, logvar, log_weights, exclude, labels, groups, num_labels, dense, need_z, need_mu,
    need_logvar, need_log_weights, backend,
):  # fmt: skip
    need = need_z, need_mu, need_logvar, need_log_weights
    inputs = z, mu, logvar, mu if log_weights is None else log_weights
    return tuple(mu.new_empty(value.shape if needed else (0,)) for value, needed in zip(inputs, need, strict=True))


mixture_log_prob, mixture_log_prob_backward = define(
    "",
    (
        Schema(
            "labelled_mixture_log_prob",
            f"({_MIXTURE}, bool with_score, str backend) -> (Tensor, Tensor)",
            _fake_forward,
        ),
        Schema(
            "labelled_mixture_log_prob_backward",
            f"(Tensor grad, Tensor log_prob, {_MIXTURE}, bool dense, bool need_z, bool need_mu, bool need_logvar, "
            "bool need_log_weights, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
            _fake_backward,
        ),
    ),
)
library.impl("labelled_mixture_log_prob", forward, "CompositeExplicitAutograd")
library.impl("labelled_mixture_log_prob_backward", backward, "CompositeExplicitAutograd")
