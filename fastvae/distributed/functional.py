"""The operations on a mixture whose components are sharded over the processes of a group.

The functions have the names of those of :mod:`fastvae.functional`, and each rank calls them with its own components.
With exchange="ring" the components travel, see :mod:`fastvae.distributed.ring`; else all ranks have all rows.  A rank
then computes l_r, the log density of its share, by the usual kernels.  With l = logsumexp_r l_r and the rank's weight
w_r = exp(l_r - l), the share of the density at z that its components hold:

    dL/dmu_k = w_r g dl_r/dmu_k,  component k on rank r      dL/dz = sum_r w_r g dl_r/dz      score = sum_r w_r score_r

So what travels is l_r, M numbers of each rank, and the sums over r, M D numbers.  The gradients of the components need
nothing of other ranks but w_r.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastvae import _checks, _torch_compat
from fastvae import functional as F
from fastvae._noise import draw_seed
from fastvae.autograd import differentiable_once
from fastvae.backends.choice import choose, dense
from fastvae.backends.registry import PRECISIONS, check_name
from fastvae.distributed.dtensors import group_of, is_dtensor, to_local
from fastvae.distributed.link import Link, Told, agree, link_to
from fastvae.distributed.ring import Ring, exclude_of, share_of, without_traces

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fastvae.backends import BackendOptions


class _Replicated(torch.autograd.Function):
    """A tensor that all ranks hold: itself.  Each rank's gradient is a part of the whole, which is their sum."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, link: Link) -> Tensor:
        ctx.link = link
        return value.view_as(value)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.link.all_reduce(grad), None


class _AllRows(torch.autograd.Function):
    """The rows of all ranks, of each rank's own."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, link: Link, rows: list[int]) -> Tensor:
        ctx.link, ctx.rows = link, rows
        return link.all_rows(value, rows)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.link.own_rows(ctx.link.all_reduce(grad), ctx.rows), None, None


class _OwnRows(torch.autograd.Function):
    """Each rank's own rows, of all ranks'.  The gradients of the ranks' losses in their rows come together."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, link: Link, rows: list[int]) -> Tensor:
        ctx.link, ctx.rows = link, rows
        return link.own_rows(value, rows).clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.link.all_rows(grad, ctx.rows), None, None


class _Merged(torch.autograd.Function):
    """(l, w_r), both [...], of the rank's l_r; w_r is a constant to autograd.

    In float64 and in the order of the ranks, so that l is rounded once and has the same bits on all ranks.  Where one
    rank's share is all, l is its l_r to the last bit.
    """

    @staticmethod
    def forward(ctx: Any, of_rank: Tensor, link: Link, dense: bool) -> tuple[Tensor, Tensor]:
        of_ranks = link.all_gather(of_rank).double()  # [R, ...]
        log_prob = torch.logsumexp(of_ranks, 0)
        weight = share_of(of_rank, log_prob)
        ctx.save_for_backward(of_rank, weight)
        ctx.dense = dense
        ctx.mark_non_differentiable(weight)
        ctx.set_materialize_grads(False)
        return log_prob.to(of_rank.dtype), weight

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        _, weight = ctx.saved_tensors
        return grad * (weight if ctx.dense else without_traces(weight)), None, None


class _Options(NamedTuple):
    """The arguments of a call that are no tensors."""

    group: ProcessGroup | None
    rows: str
    exchange: str
    dense_backward: bool | None
    precision: str | None
    impl: str | None


class _Agreed(NamedTuple):
    """A rank's arguments in the dtype of the computation, and what all ranks told of theirs."""

    link: Link
    ranks: list[Told]
    z: Tensor  # [..., D], the rank's own
    mu: Tensor  # a shard of no components stands here as one component that is not there
    logvar: Tensor
    log_weights: Tensor
    exclude: Tensor | None  # counted over the components of all ranks


def _log_prob_and_score(
    what: str,
    with_score: bool,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """(log p(z) [...], score [..., D]); the latter means nothing where it is not asked for."""
    given = z, mu, logvar, log_weights, exclude, options.group, options.rows
    try:
        z, mu, logvar, log_weights, exclude, group, rows, like_z = to_local(*given)
    except (TypeError, ValueError) as error:  # the other ranks may have given what is right, and are waiting
        agree(link_to(what, group_of(mu, options.group)), partial(_fail, error))
        raise
    options = options._replace(group=group, rows=rows)
    agreed = _checked(what, z, mu, logvar, log_weights, exclude, options)
    compute = _in_a_ring if options.exchange == "ring" else _by_gathering
    log_prob, score = compute(agreed, options, with_score)
    return like_z(log_prob), like_z(score) if with_score else score


def _fail(error: Exception) -> NoReturn:
    raise error


def _in_a_ring(call: _Agreed, options: _Options, with_score: bool) -> tuple[Tensor, Tensor]:
    """The components travel."""
    link, ranks, z = call.link, call.ranks, call.z
    mu, logvar, log_weights = _checks.components(call.mu, call.logvar, call.log_weights, z.dtype)
    assert log_weights is not None
    K, shared = ranks[link.rank].K, _is_shared(ranks)  # a shard of no components stands here as one that is not there
    backend = choose(options.impl, z.device, z.dtype, options.precision)
    ring = Ring(link, [rank.K for rank in ranks], shared, with_score, dense(options.dense_backward), backend)
    own = mu[:K], logvar.contiguous() if shared else logvar.expand_as(mu)[:K], log_weights[:K]
    rows = None if call.exclude is None else call.exclude.reshape(-1).contiguous()
    log_prob, score = ring.log_prob_and_score(_checks.rows(z), *own, rows)
    return log_prob.reshape(z.shape[:-1]), score.reshape(z.shape) if with_score else score


def _by_gathering(call: _Agreed, options: _Options, with_score: bool) -> tuple[Tensor, Tensor]:
    """All ranks have all rows, and what travels is the density of each rank's components at them."""
    link, ranks, z, mu, logvar, log_weights, exclude = call
    shape, counts = z.shape, None
    if options.rows == "sharded":
        counts = [rank.M for rank in ranks]
        z = _AllRows.apply(_checks.rows(z), link, counts)
        exclude = None if exclude is None else link.all_rows(exclude.flatten(), counts)
    else:
        z = _Replicated.apply(z, link)
        if _is_shared(ranks):
            logvar = _Replicated.apply(_checks.cast(logvar, z.dtype), link)
    exclude = exclude_of(exclude, [rank.K for rank in ranks], link.rank)
    backend: BackendOptions = {
        "dense_backward": options.dense_backward, "precision": options.precision, "impl": options.impl,
    }  # fmt: skip
    score = z
    if with_score:
        of_rank, score = F.mixture_log_prob_and_score(z, mu, logvar, log_weights, exclude=exclude, **backend)
    else:
        of_rank = F.mixture_log_prob(z, mu, logvar, log_weights, exclude=exclude, **backend)
    log_prob, weight = _Merged.apply(of_rank, link, dense(options.dense_backward))
    if counts is not None:
        log_prob = _OwnRows.apply(log_prob, link, counts).reshape(shape[:-1])
    if with_score:
        weight = weight[..., None]
        score = link.all_reduce((score * weight).masked_fill(weight == 0, 0.0))
        score = score if counts is None else link.own_rows(score, counts).reshape(shape)
    return log_prob, score


def _checked(
    what: str,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    options: _Options,
) -> _Agreed:
    """The arguments, checked on all ranks."""
    link = link_to(what, options.group)
    rows, exchange = options.rows, options.exchange
    sharded_rows = rows == "sharded"

    def check() -> tuple[str, Told, tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        _check_rows(rows, exchange)
        check_name("precision", options.precision, PRECISIONS)
        named = {"z": z, "mu": mu, "logvar": logvar, "log_weights": log_weights}
        for name, value in named.items():
            if value is not None or name != "log_weights":
                _checks.tensor(name, value)
        filled = _filled(mu, logvar, log_weights)
        wide, *_ = _checks.mixture(z, *filled, None)
        low, high = -1, -1
        if exclude is not None:
            _checks.excluded(exclude, z.shape, z.device, None)  # the range needs the K of all ranks
            if exclude.device.type == "cpu" and exclude.numel():
                low, high = (int(v) for v in exclude.aminmax())
        choose(options.impl, z.device, wide.dtype, options.precision)
        words = (
            f"{what}(z {_shape_in_words(z, rows)}, rows={rows!r}, {_exchange_in_words(options)}) in {wide.dtype}, "
            f"{_given('log_weights', log_weights)}, {_given('exclude', exclude)}, {_wanted(named)}"
        )
        told = Told(
            failed=0,
            K=len(mu),
            M=wide[..., 0].numel(),
            logvar_rows=len(logvar) if logvar.ndim == 2 else -1,
            exclude_low=low,
            exclude_high=high,
            same=0 if sharded_rows else _fingerprint(z, exclude),
            logvar=_fingerprint(_checks.cast(logvar, wide.dtype)) if logvar.ndim < 2 or len(logvar) == 1 else 0,
        )
        return words, told, (wide, *filled)

    ranks, (own_z, own_mu, own_logvar, own_log_weights) = agree(link, check)
    K = sum(rank.K for rank in ranks)
    _check_together(what, ranks, K, sharded_rows)
    if own_log_weights is None:
        own_log_weights = own_z.new_full((len(own_mu),), -math.log(K))
    return _Agreed(link, ranks, own_z, own_mu, own_logvar, own_log_weights, exclude)


def _filled(mu: Tensor, logvar: Tensor, log_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A shard of no components as one component that is not there, with the weight 0; other shards as they are."""
    if mu.ndim != 2 or mu.shape[0] != 0 or mu.shape[1] == 0:
        return mu, logvar, log_weights
    if log_weights is not None and log_weights.shape != (0,):
        raise ValueError(
            f"log_weights must be [0] to match mu {_checks.shape_of(mu)}, not {_checks.shape_of(log_weights)}"
        )
    if logvar.ndim == 2 and logvar.shape[0] == 0:
        logvar = torch.cat([logvar, logvar.new_zeros(1, logvar.shape[1])])
    absent = mu.new_full((1,), -torch.inf)
    return (
        torch.cat([mu, mu.new_zeros(1, mu.shape[1])]),
        logvar,
        absent if log_weights is None else torch.cat([log_weights, absent.to(log_weights)]),
    )


def _shape_in_words(value: Tensor, rows: str) -> str:
    """Of the shape, what is to be the same on all ranks."""
    return str(_checks.shape_of(value)) if rows == "replicated" else f"[..., {value.shape[-1]}]"


def _given(name: str, value: object) -> str:
    return f"with {name}" if value is not None else f"without {name}"


def _wanted(named: dict[str, Tensor | None]) -> str:
    wanted = [name for name, value in named.items() if value is not None and value.requires_grad]
    return f"with gradients in {', '.join(wanted)}" if wanted and torch.is_grad_enabled() else "without gradients"


def _fingerprint(*tensors: Tensor | None) -> int:
    """A number that tensors of other shapes or bits, or in another order, have by chance alone.

    Elsewhere than on the CPU it is of the shapes alone, as a look at the values would wait for the device.
    """
    total, multipliers = 0, _multipliers()
    for value in tensors:
        if value is None:
            continue
        parts = [torch.tensor(value.shape, dtype=torch.int64)]
        if value.device.type == "cpu":
            parts.append(value.detach().contiguous().flatten())
        for part in parts:
            # In words of 4 bytes at most: a multiple of 2^52, as float64 of small integers differ by, would lose most
            # bits of its multiplier.
            words = part.view({1: torch.int8, 2: torch.int16}.get(part.element_size(), torch.int32))
            for block in words.split(len(multipliers)):
                total = 31 * total + int((block * multipliers[: len(block)]).sum())
    return (total + 2**63) % 2**64 - 2**63


@cache
def _multipliers() -> Tensor:
    """Of the words of a block.  With multipliers in arithmetic progression, many swaps would leave the sum as it is."""
    return torch.randint(-(2**63), 2**63 - 1, (2**14,), generator=torch.Generator().manual_seed(0))


def _check_together(what: str, ranks: list[Told], K: int, sharded_rows: bool) -> None:
    """What only the numbers of all ranks tell.  All raise the same."""
    if K == 0:
        raise ValueError(f"{what}: mu must be [K, D] with K >= 1 on one rank at least; it has no components on any")
    low, high = min(rank.exclude_low for rank in ranks), max(rank.exclude_high for rank in ranks)
    if low < -1 or high >= K:
        raise ValueError(
            f"{what}: exclude must be in -1 ... {K - 1} for K = {K} components on all ranks, it spans {low} ... {high}"
        )
    of_all = [rank.logvar_rows < 0 for rank in ranks]
    if any(of_all) and not all(of_all):
        raise ValueError(
            f"{what}: logvar must be [D] or [] on all ranks or on none, it is on rank {of_all.index(True)}"
        )
    if _is_shared(ranks) and (others := [r for r, rank in enumerate(ranks) if rank.logvar != ranks[0].logvar]):
        raise ValueError(
            f"{what}: a logvar that all components share must be the same on all ranks, but that of rank {others[0]} "
            "differs from that of rank 0: broadcast it, or give each rank a logvar [K_r, D] of its own"
        )
    if not sharded_rows:
        _check_same(what, "z and exclude", ranks)


def _check_same(what: str, names: str, ranks: list[Told]) -> None:
    if others := [r for r, rank in enumerate(ranks) if rank.same != ranks[0].same]:
        raise ValueError(
            f"{what}: with rows='replicated' all ranks must give the same {names}, but those of rank {others[0]} "
            "differ from those of rank 0: broadcast them, or say rows='sharded' if each rank has rows of its own"
        )


def _check_rows(rows: str, exchange: str) -> None:
    if rows not in ("replicated", "sharded"):
        raise ValueError(f"rows must be 'replicated' or 'sharded', not {rows!r}")
    if exchange not in ("gather", "ring"):
        raise ValueError(f"exchange must be 'gather' or 'ring', not {exchange!r}")
    if exchange == "ring" and rows != "sharded":
        raise ValueError("exchange='ring' is for rows='sharded': where the rows are replicated, no components travel")


def _exchange_in_words(options: _Options) -> str:
    """Of how the ranks communicate, what is to be the same on all: in a ring, a dense backward goes round always."""
    is_dense = f", dense_backward={dense(options.dense_backward)}" if options.exchange == "ring" else ""
    return f"exchange={options.exchange!r}{is_dense}"


def _is_shared(ranks: list[Told]) -> bool:
    """Whether the components of all ranks share a logvar, which is [], [D] or [1, D] on all.

    [1, D] where every rank has one component is a shard of [K, D].
    """
    return all(r.logvar_rows < 0 for r in ranks) or (
        all(r.logvar_rows == 1 for r in ranks) and any(r.K != 1 for r in ranks)
    )


@_torch_compat.not_traced  # what the ranks told each other is true of one call
def mixture_log_prob(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    rows: str = "replicated",
    exchange: str = "gather",
    exclude: Tensor | None = None,
    dense_backward: bool | None = None,
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """:func:`fastvae.mixture_log_prob` of a mixture whose K components are sharded over the ranks of a group.

    All ranks of the group must call it together.  The components stand in the order of the ranks, K_r of them on rank
    r.  Shares may differ in size, and some may be empty.

    Args:
        z: [..., D], the points: the same on all ranks, or of each rank its own, see `rows`.
        mu: [K_r, D], the rank's own means; K_r may be 0.
        logvar: the rank's own, broadcastable to [K_r, D]; or shared by the components of all ranks, [], [D] or [1, D]
            on all of them.  Where every rank has one component, [1, D] is the rank's own.
        log_weights: [K_r], the rank's own, used as given and never renormalised.  None means -log K each, with the K
            components of all ranks.  The components may be DTensors that are Shard(0) on one dimension of a mesh; then
            this dimension is the group, z may be a DTensor, too, and its placement says what `rows` says.
        group: the process group; None is the default one.
        rows: "replicated", all ranks give the same z and get the same result; "sharded", each rank gives rows of its
            own, as many as it has, and gets theirs.
        exchange: what travels where the rows are sharded.  "gather", the rows: each rank computes its components' part
            of the density of all rows, and so holds these.  "ring", the components: each rank keeps its rows, and the
            components pass by, one rank's after the other's.
        exclude: int64 [...], for each row the index of a component, counted over all ranks, or -1.
        dense_backward, precision, impl: as of :func:`fastvae.mixture_log_prob`.

    Returns:
        [...], nats, with the same bits on all ranks where the rows are replicated; a DTensor where z is one.

    Gradients are those of the unsharded mixture.  Each rank gets those of its own components.

    - With rows="replicated" all ranks must compute the same loss.  Each gets the whole gradient in z and in a shared
      logvar, as if it had computed alone.
    - With rows="sharded" the loss is the sum of the ranks' losses.  Each rank gets the gradient of that sum in its own
      rows and components.  In a shared logvar it gets its part, which the others' are to be added to.

    Backward communicates, too, so that it must run on all ranks or on none.

    Raises:
        TypeError, ValueError: as of :func:`fastvae.mixture_log_prob`, on all ranks if one has given such arguments.
        ValueError: exchange="ring" with replicated rows; the ranks have not made the same call: they differ in the
            function, the shape of z, the dtype, `rows`, `exchange`, in which arguments they gave or in which they want
            gradients; replicated rows or a shared logvar that are not the same (on the CPU, where their values are
            looked at).
        RuntimeError: there is no process group; a rank has ended, or did not call within the group's time-out.

    Equals, on all the ranks' components in one::

        fastvae.mixture_log_prob(z, mu, logvar, log_weights)
    """
    options = _Options(group, rows, exchange, dense_backward, precision, impl)
    return _log_prob_and_score("mixture_log_prob", False, z, mu, logvar, log_weights, exclude, options)[0]


@_torch_compat.not_traced  # what the ranks told each other is true of one call
def mixture_log_prob_and_score(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    rows: str = "replicated",
    exchange: str = "gather",
    exclude: Tensor | None = None,
    dense_backward: bool | None = None,
    precision: str | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`mixture_log_prob` and its score, d log p(z) / dz; see :func:`fastvae.mixture_log_prob_and_score`.

    Args, Raises: as :func:`mixture_log_prob`.

    Returns:
        (log_prob [...], score [..., D]).  log_prob is differentiable as usual, the score is a constant to autograd.
    """
    options = _Options(group, rows, exchange, dense_backward, precision, impl)
    return _log_prob_and_score("mixture_log_prob_and_score", True, z, mu, logvar, log_weights, exclude, options)


@_torch_compat.not_traced  # what the ranks told each other is true of one call
def mixture_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor,
    prior_logvar: Tensor,
    log_weights: Tensor | None = None,
    num_samples: int | None = None,
    *,
    group: ProcessGroup | None = None,
    rows: str = "replicated",
    exchange: str = "gather",
    generator: torch.Generator | None = None,
    path_derivative: bool = False,
    exclude: Tensor | None = None,
    dense_backward: bool | None = None,
    precision: str | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`fastvae.mixture_kl` to a prior whose components are sharded over the ranks of a group.

    Args:
        mu, logvar: [..., D], the posterior: the same on all ranks, or of each rank its own, see `rows`.
        prior_mu, prior_logvar, log_weights: the rank's own components, see :func:`mixture_log_prob` for these, `group`,
            `rows`, `exchange` and `exclude`.  With replicated rows, `exclude` is [...] of the posterior.
        num_samples, generator, path_derivative: as of :func:`fastvae.gaussian_rsample`.  With replicated rows all ranks
            draw the noise of the group's first rank.
        dense_backward, precision, impl: as of :func:`fastvae.mixture_log_prob`.

    Returns:
        (z, kl): z [S, ..., D] or [..., D]; kl = log q(z | x) - log p(z), [S, ...] or [...], nats.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mixture_log_prob`.
    """
    link = link_to("mixture_kl", group)

    def check() -> tuple[str, Told, tuple[torch.dtype, Tensor, Tensor]]:
        _check_rows(rows, exchange)
        named = {"mu": mu, "logvar": logvar, "prior_mu": prior_mu, "prior_logvar": prior_logvar}
        for name, value in named.items():
            if is_dtensor(value):
                raise TypeError(f"{name} must be the rank's own tensor here, such as a DTensor's .to_local()")
        dtype = _checks.result_dtype(mu=mu, logvar=logvar)
        wide = _checks.compute_dtype(_checks.result_dtype(**named, log_weights=log_weights))
        posterior = _checks.gaussian(mu, logvar, wide)
        _checks.sampled_shape(num_samples, mu)
        if exclude is not None:
            _checks.excluded(exclude, mu.shape, mu.device, None)
        choose(impl, mu.device)
        words = (
            f"mixture_kl(mu {_shape_in_words(mu, rows)}, num_samples={num_samples}, "
            f"path_derivative={path_derivative}, rows={rows!r})"
        )
        same = 0 if rows == "sharded" else _fingerprint(*posterior)
        return words, Told(failed=0, same=same), (dtype, *posterior)

    ranks, (dtype, q_mu, q_logvar) = agree(link, check)
    if rows == "replicated":
        _check_same(link.what, "mu and logvar", ranks)
        seed = link.from_first(draw_seed(mu.device, generator))
        generator = torch.Generator(mu.device).manual_seed(int(seed))
    # in the dtype of the computation until the end, so that the density is that of z before it is rounded
    z, log_q = F.gaussian_rsample(
        q_mu, q_logvar, num_samples, generator=generator, path_derivative=path_derivative, impl=impl
    )
    log_p = mixture_log_prob(
        z, prior_mu, prior_logvar, log_weights, group=group, rows=rows, exchange=exchange,
        exclude=None if exclude is None else exclude.expand(z.shape[:-1]),
        dense_backward=dense_backward, precision=precision, impl=impl,
    )  # fmt: skip
    return _checks.cast(z, dtype), log_q - log_p
