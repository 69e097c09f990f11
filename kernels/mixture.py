"""The mixture density and its gradients: packing, the kernel of the precision, merging; or `small.py` alone.

    l_m = logsumexp_k a_mk     score_md = dl_m / dz_md     dL/dmu, dL/dlogvar, dL/dlog w by S0, S1, S2 (`merge.py`)

Input is checked and contiguous; logvar is [K, D] or [1, D].  Nothing of size M x K exists.  Forward cuts rows into
blocks and, where those are few, the components into splits; the gradients of the parameters the other way round.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import autotune, difference, merge, packing, product, small, tiles
from .launch import on_device_of
from .tiles import Tile, cdiv, round_up

SURVEY_PARTS, SURVEY_COLUMNS = 64, 64
PACKED_AT_ONCE = {torch.float32: 32, torch.float64: 8}  # rows or components; more would spill


class Problem(NamedTuple):
    """What every call is given; log_weights and exclude may be None."""

    precision: str
    z: Tensor
    mu: Tensor
    logvar: Tensor
    log_weights: Tensor | None
    exclude: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, K, D."""
        return len(self.z), *self.mu.shape

    @property
    def shared_logvar(self) -> Tensor | None:
        """[1, D] where all components share it."""
        return self.logvar if len(self.logvar) != len(self.mu) else None


class Gradients(NamedTuple):
    """Of the parameters, where they go; None: not wanted.  dlogvar is [K, D] also where logvar is shared."""

    mu: Tensor | None
    logvar: Tensor | None
    log_weights: Tensor | None


class Survey(NamedTuple):
    """What must be known of all components before any is packed, [D] each."""

    widest: Tensor
    origin: Tensor


class Features(NamedTuple):
    """Operands of a product, [n, F] and turned around [2 D, n], each in a high and a low part; None: not wanted."""

    high: Tensor | None
    low: Tensor | None
    high_t: Tensor | None
    low_t: Tensor | None


class Rows(NamedTuple):
    count: int  # type: ignore[assignment]  # a tuple's method of that name is not used
    operand: Tensor | Features  # z [D, M] for the difference form
    term: Tensor | None


class Components(NamedTuple):
    count: int  # type: ignore[assignment]
    operand: tuple[Tensor, Tensor] | Features  # mu and s [D, K] for the difference form
    c: Tensor
    reach: Tensor


def _survey(problem: Problem) -> Survey:
    (_, K, D), mu = problem.shape, problem.mu
    span = round_up(cdiv(K, min(SURVEY_PARTS, cdiv(K, SURVEY_COLUMNS))), SURVEY_COLUMNS)
    parts = cdiv(K, span)
    widest, weight, mean = mu.new_empty(3, parts, D)
    chunks = cdiv(D, packing.CHUNK.value)
    packing.survey_kernel[(parts, chunks)](
        mu, problem.logvar, problem.log_weights, widest, weight, mean, K, D, span,
        SHARED=problem.shared_logvar is not None, COLUMNS=SURVEY_COLUMNS,
    )  # fmt: skip
    survey = Survey(*mu.new_empty(2, D))
    packing.survey_merge_kernel[(chunks,)](widest, weight, mean, *survey, parts, D, ROWS=tiles.next_power_of_2(parts))
    return survey


def _features(like: Tensor, n: int, F: int, F_t: int, parts: int, straight: bool, turned: bool) -> Features:
    def empty(wanted: bool, *shape: int) -> Tensor | None:
        return like.new_empty(shape) if wanted else None

    return Features(
        empty(straight, n, F),
        empty(straight and parts == 2, n, F),
        empty(turned, F_t, n),
        empty(turned and parts == 2, F_t, n),
    )


def _pack_components(problem: Problem, survey: Survey | None, tile: Tile, turned: bool) -> Components:
    precision, _, mu, logvar, log_weights, _ = problem
    (_, K, D), shared = problem.shape, problem.shared_logvar is not None
    count, padded = round_up(K, tile.columns), tiles.padded_dimensions(precision, D)
    c, reach = mu.new_empty(2, count)
    at_once = min(PACKED_AT_ONCE[mu.dtype], tile.columns)
    grid, sizes = (count // at_once,), {"SHARED": shared, "COLUMNS": at_once}
    if precision == "highest":
        mu_t, s_t = mu.new_empty(2, padded, count)
        widest = None if survey is None else survey.widest
        packing.components_difference_kernel[grid](
            mu, logvar, log_weights, widest, mu_t, s_t, c, reach, K, count, D, padded, **sizes
        )
        return Components(count, (mu_t, s_t), c, reach)
    assert survey is not None
    F = padded if shared else 2 * padded
    features = _features(mu, count, F, F, _parts(precision), True, turned)
    packing.components_product_kernel[grid](
        mu, logvar, log_weights, *survey, *features, c, reach, K, count, D, padded, F, **sizes
    )
    return Components(count, features, c, reach)


def _pack_rows(problem: Problem, survey: Survey | None, tile: Tile, turned: bool) -> Rows:
    precision, z, logvar, (M, _, D) = problem.precision, problem.z, problem.shared_logvar, problem.shape
    count, padded = round_up(M, tile.rows), tiles.padded_dimensions(precision, D)
    at_once = min(PACKED_AT_ONCE[z.dtype], tile.rows)
    if precision == "highest":
        z_t = z.new_empty(padded, count)
        packing.rows_difference_kernel[(count // at_once, cdiv(padded, packing.CHUNK.value))](
            z, z_t, M, count, D, padded, ROWS=at_once
        )
        return Rows(count, z_t, None)
    assert survey is not None
    F = 2 * padded if logvar is None else padded
    features = _features(z, count, F, 2 * padded, _parts(precision), True, turned)
    term = None if logvar is None else z.new_empty(count)
    packing.rows_product_kernel[(count // at_once,)](
        z, survey.origin, logvar, *features, term, M, count, D, padded, F, ROWS=at_once
    )
    return Rows(count, features, term)


def _parts(precision: str) -> int:
    return 2 if precision == "high" else 1


def _rounding(dtype: torch.dtype) -> float:
    """log of the unit roundoff."""
    return math.log(torch.finfo(dtype).eps / 2)


def _pair(features: Features) -> tuple[Tensor | None, ...]:
    """(high, low) as kernels take them: what is in one part stands for the other, unread."""
    return features.high, features.high if features.low is None else features.low


def _pair_t(features: Features) -> tuple[Tensor | None, ...]:
    return features.high_t, features.high_t if features.low_t is None else features.low_t


def _forward(
    problem: Problem,
    *,
    log_prob: Tensor | None = None,
    score: Tensor | None = None,
    grad: Tensor | None = None,
    dense: bool = False,
) -> None:
    """Fill log_prob [M] and score [M, D], of which either may be None; the score times grad [M], if that is given."""
    if small.fits(*problem.shape):
        small.forward(*problem[1:], log_prob=log_prob, score=score, grad=grad)
        return
    run = partial(_forward_by, problem, log_prob, score, grad, dense)
    kind, detail = "forward" if score is None else "score", " dense" * (dense and score is not None)
    run(autotune.choose(kind, *problem[:4], run, detail))


def _forward_by(
    problem: Problem, log_prob: Tensor | None, score: Tensor | None, grad: Tensor | None, dense: bool, tile: Tile
) -> None:
    precision, z, exclude, shared = problem.precision, problem.z, problem.exclude, problem.shared_logvar
    M, K, D = problem.shape
    survey = _survey(problem) if precision != "highest" or (score is not None and not dense) else None
    components = _pack_components(problem, survey, tile, turned=score is not None)
    rows = _pack_rows(problem, survey, tile, turned=False)

    slices = 1 if score is None else cdiv(D, tile.dims)
    blocks = rows.count // tile.rows
    splits, span = tiles.cut(components.count // tile.columns, tile.columns, blocks * slices)
    partial_top, partial_total = z.new_empty(2, splits, rows.count)
    width = slices * tile.dims
    partial_score = None if score is None else z.new_empty(splits, rows.count, width)
    negligible = math.log(K) - _rounding(z.dtype) + 2 * math.log(2)
    sizes = {
        "SCORE": score is not None, "DENSE": dense, "ROWS": tile.rows, "COLUMNS": tile.columns, "DIMS": tile.dims,
        "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True,
    }  # fmt: skip
    padded, outputs = tiles.padded_dimensions(precision, D), (partial_top, partial_total, partial_score)
    if precision == "highest":
        difference.forward_kernel[(blocks, splits, slices)](
            rows.operand, *components.operand, components.c, components.reach, exclude, *outputs,
            M, rows.count, components.count, padded, span, negligible, BLOCKS=difference.BLOCK.value < D, **sizes,
        )  # fmt: skip
    else:
        assert isinstance(rows.operand, Features) and isinstance(components.operand, Features) and survey is not None
        product.forward_kernel[(blocks, splits, slices)](
            *_pair(rows.operand), *_pair(components.operand), *_pair_t(components.operand), z, survey.origin, rows.term,
            components.c, components.reach, exclude, shared, *outputs,
            M, rows.count, components.count, D, padded, padded if shared is not None else 2 * padded, span, negligible,
            PARTS=_parts(precision), CHUNK=tile.chunk, **sizes,
        )  # fmt: skip
    merge.merge_rows_kernel[(cdiv(rows.count, 16), 1 if score is None else cdiv(D, 64))](
        *outputs, grad, log_prob, score, M, rows.count, D, width, splits, ROWS=16, DIMS=64 if score is not None else 1
    )


def _parameters(problem: Problem, grad: Tensor, log_prob: Tensor, dense: bool, wanted: Gradients) -> None:
    """Fill the gradients that are wanted."""
    run = partial(_parameters_by, problem, grad, log_prob, dense, wanted)
    sums = " S0 S1 S2" if wanted.logvar is not None else " S0 S1" if wanted.mu is not None else " S0"
    run(autotune.choose("parameters", *problem[:4], run, sums + " dense" * dense))


def _parameters_by(
    problem: Problem, grad: Tensor, log_prob: Tensor, dense: bool, wanted: Gradients, tile: Tile
) -> None:
    precision, z, mu, logvar, log_weights, exclude = problem
    (M, K, D), shared = problem.shape, problem.shared_logvar
    survey = _survey(problem) if precision != "highest" else None
    components = _pack_components(problem, survey, tile, turned=False)
    need_s2 = wanted.logvar is not None
    need_s1 = need_s2 or wanted.mu is not None
    rows = _pack_rows(problem, survey, tile, turned=need_s1)

    slices = cdiv(D, tile.dims) if need_s1 else 1
    blocks = components.count // tile.columns
    splits, span = tiles.cut(rows.count // tile.rows, tile.rows, blocks * slices)
    width = slices * tile.dims
    s0 = z.new_empty(splits, components.count)
    s1 = z.new_empty(splits, components.count, width) if need_s1 else None
    s2 = z.new_empty(splits, components.count, width) if need_s2 else None
    limit = _rounding(z.dtype) - math.log(K)
    sizes = {
        "NEED_S1": need_s1, "NEED_S2": need_s2, "DENSE": dense, "ROWS": tile.rows, "COLUMNS": tile.columns,
        "DIMS": tile.dims, "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True,
    }  # fmt: skip
    padded, given = tiles.padded_dimensions(precision, D), (components.c, grad, log_prob, exclude, s0, s1, s2)
    if precision == "highest":
        difference.parameters_kernel[(blocks, splits, slices)](
            rows.operand, *components.operand, *given, M, rows.count, components.count, padded, span, limit,
            BLOCKS=difference.BLOCK.value < D, **sizes,
        )  # fmt: skip
    else:
        assert isinstance(rows.operand, Features) and isinstance(components.operand, Features)
        product.parameters_kernel[(blocks, splits, slices)](
            *_pair(rows.operand), *_pair_t(rows.operand), *_pair(components.operand), rows.term, *given,
            M, rows.count, components.count, padded, padded if shared is not None else 2 * padded, span, limit,
            PARTS=_parts(precision), CHUNK=tile.chunk, **sizes,
        )  # fmt: skip
    origin = None if survey is None else survey.origin
    merge.merge_components_kernel[(cdiv(components.count, 16), cdiv(D, 64) if need_s1 else 1)](
        s0, s1, s2, mu, logvar, origin, log_weights, *wanted, K, components.count, D, width, splits,
        SHARED=shared is not None, COLUMNS=16, DIMS=64 if need_s1 else 1,
    )  # fmt: skip


@on_device_of(1)
def mixture_log_prob(
    precision: str, z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None, exclude: Tensor | None
) -> Tensor:
    log_prob = z.new_empty(len(z))
    if len(z):
        _forward(Problem(precision, z, mu, logvar, log_weights, exclude), log_prob=log_prob)
    return log_prob


@on_device_of(1)
def mixture_log_prob_and_score(
    precision: str, z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    log_prob, score = z.new_empty(len(z)), torch.empty_like(z)
    if len(z):
        _forward(Problem(precision, z, mu, logvar, log_weights, exclude), log_prob=log_prob, score=score)
    return log_prob, score


@on_device_of(1)
def mixture_log_prob_backward(
    precision: str,
    grad: Tensor,
    log_prob: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    dense: bool,
    need_z: bool,
    need_mu: bool,
    need_logvar: bool,
    need_log_weights: bool,
) -> tuple[Tensor, ...]:
    """The gradients in z, mu, logvar and log_weights; one that is not needed has no elements."""
    problem = Problem(precision, z, mu, logvar, log_weights, exclude)
    dz = torch.empty_like(z) if need_z else z.new_empty(0)
    if not len(z):
        zeros = [torch.zeros_like(t) if need else z.new_empty(0)
                 for t, need in ((mu, need_mu), (logvar, need_logvar), (mu[:, 0], need_log_weights))]  # fmt: skip
        return dz, *zeros
    if need_z:
        _forward(problem, score=dz, grad=grad, dense=dense)
    need = need_mu, need_logvar, need_log_weights
    if small.fits(*problem.shape):
        return dz, *small.backward(grad, log_prob, *problem[1:], *need)
    wanted = Gradients(
        *(torch.empty_like(t) if needed else None for t, needed in zip((mu, mu, mu[:, 0]), need, strict=True))
    )
    if any(need):
        _parameters(problem, grad, log_prob, dense, wanted)
    if wanted.logvar is not None and problem.shared_logvar is not None:
        wanted = wanted._replace(logvar=wanted.logvar.sum(0, keepdim=True))
    return dz, *(z.new_empty(0) if d is None else d for d in wanted)
