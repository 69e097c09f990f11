"""Many mixtures in one call: the components of each group are a mixture of their own."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastvae import _checks, reference
from fastvae.autograd import GroupedMixtureLogProb, LabelledMixtureLogProb
from fastvae.backends.choice import choose, dense
from fastvae.contracts import is_readable
from fastvae.dispatch import call

_MAX_IMPLICIT_GROUPS = 2**16  # more groups than this, and than components, must be asked for by num_groups


def grouped_mixture_log_prob(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    groups: Tensor,
    log_weights: Tensor | None = None,
    *,
    num_groups: int | None = None,
    labels: Tensor | None = None,
    dense_backward: bool | None = None,
    impl: str | None = None,
) -> Tensor:
    """Log density of each of G mixtures at each point: log p(z | g) = logsumexp_{k in g} [log w_k + log N(z; k)].

    What one would get by looping over the groups with :func:`mixture_log_prob`.  Differentiable once in z, mu, logvar
    and log_weights; memory is O(M G + K D), forward and backward.  With `labels`, each point meets its own group alone,
    and memory is O((M + K) D).

    Args:
        z: [..., D], the points, M in all.
        mu: [K, D], the means of all groups' components.
        logvar: broadcastable to [K, D].
        groups: int64 [K], the group of each component, 0 ... G - 1, in any order; best sorted, as then nothing has to
            be moved.
        log_weights: [K], used as given and never renormalised: for log p(z | g) the weights of each group's components
            must sum to one.  None means -log K_g each, with the K_g components of the group.
        num_groups: G; None means max(groups) + 1.  A group without components has density zero, -inf.
        labels: int64 [...], the group of each point, in any order.  Only log p(z | its own group) is then computed:
            the other groups cost nothing.
        dense_backward, impl: as for :func:`mixture_log_prob`.

    Returns:
        [..., G], or [...] with labels, nats; float64 if any argument is, else float32.

    Raises:
        TypeError: an argument is not a floating tensor (`groups` or `labels`: not int64).
        ValueError: shapes that do not fit, mixed devices, a group or label that is negative or not below num_groups.

    Equals, holding [M, K_g, D] numbers in each turn::

        log_prob = [mixture_log_prob(z, mu[groups == g], logvar[groups == g]) for g in range(num_groups)]
        torch.stack(log_prob, -1)  # and .gather(-1, labels[..., None]).squeeze(-1) with labels
    """
    z, mu, logvar, log_weights, _ = _checks.mixture(z, mu, logvar, log_weights, None)
    G = _number_of_groups(groups, mu, num_groups, checked_later=labels is not None)
    if labels is not None:
        _checks.labels_of("z", z, labels)
        return of_own_group(z, mu, logvar, groups, log_weights, G, labels, dense_backward, impl)
    mu, logvar, log_weights, starts = _sorted(mu, logvar, log_weights, groups, G)
    backend = choose(impl, z.device)
    if backend == "reference":
        return _by_reference(z, mu, logvar, log_weights, starts)
    rows, mu, logvar, log_weights, _ = _checks.flat(z, mu, logvar, log_weights, None)
    log_prob = call(GroupedMixtureLogProb, rows, mu, logvar, log_weights, starts, dense(dense_backward), backend)
    return log_prob.reshape(G, *z.shape[:-1]).movedim(0, -1)


def of_own_group(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    groups: Tensor,
    log_weights: Tensor | None,
    num_groups: int,
    labels: Tensor,
    dense_backward: bool | None,
    impl: str | None,
    precision: str | None = "highest",
) -> Tensor:
    """log p(z | label), [...], of arguments that were checked but for the values of labels and groups."""
    backend = choose(impl, z.device, z.dtype, precision)
    if backend == "reference":
        _checks.label_range(labels, num_groups)
        every = _by_reference(z, *_sorted(mu, logvar, log_weights, groups, num_groups))
        return every.gather(-1, labels[..., None]).squeeze(-1)
    mixture = _checks.flat(z, mu, logvar, log_weights, None)
    own = labels.reshape(-1).contiguous(), groups.contiguous(), num_groups, False, dense(dense_backward), backend
    return _checks.shaped(call(LabelledMixtureLogProb, *mixture, *own)[0], z.shape[:-1])


def _sorted(
    mu: Tensor, logvar: Tensor, log_weights: Tensor | None, groups: Tensor, num_groups: int
) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """The components by group, and where each group starts."""
    if bool((groups[1:] < groups[:-1]).any()):
        order = torch.argsort(groups, stable=True)
        mu, logvar = mu[order], logvar if len(logvar) != len(mu) else logvar[order]
        log_weights = None if log_weights is None else log_weights[order]
    return mu, logvar, log_weights, (0, *groups.bincount(minlength=num_groups).cumsum(0).tolist())


def _number_of_groups(groups: Tensor, mu: Tensor, num_groups: int | None, checked_later: bool) -> int:
    """G, of groups [K] that were checked; checked_later: the operators, too, refuse values out of range."""
    K = mu.shape[0]
    _checks.tensor("groups", groups)
    if groups.dtype != torch.int64:
        raise TypeError(f"groups must be an int64 tensor, not {groups.dtype}")
    if groups.shape != (K,) or groups.device != mu.device:
        raise ValueError(
            f"groups must be [{K}] on {mu.device} to match mu {list(mu.shape)}, not {list(groups.shape)} on "
            f"{groups.device}"
        )
    if num_groups is not None and checked_later and not is_readable(groups):
        _checks.count("num_groups", num_groups)
        return num_groups
    low, high = (int(v) for v in groups.aminmax())
    if num_groups is None:
        if high >= max(K, _MAX_IMPLICIT_GROUPS):
            raise ValueError(
                f"groups must be numbered from 0, and are up to {high} with {K} components: number them anew by "
                "torch.unique(groups, return_inverse=True), or give num_groups if most groups are to be empty"
            )
        G = high + 1
    else:
        _checks.count("num_groups", num_groups)
        G = num_groups
    if low < 0 or high >= G:
        raise ValueError(f"groups must be in 0 ... {G - 1}, the groups there are; they span {low} ... {high}")
    return G


def _by_reference(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None, starts: tuple[int, ...]) -> Tensor:
    logvar = logvar.expand(mu.shape)
    columns = []
    for start, stop in pairwise(starts):
        weights = None if log_weights is None else log_weights[start:stop]
        if stop == start:
            columns.append(z.new_full(z.shape[:-1], -torch.inf))
        else:
            columns.append(reference.mixture_log_prob(z, mu[start:stop], logvar[start:stop], weights))
    return torch.stack(columns, -1)
