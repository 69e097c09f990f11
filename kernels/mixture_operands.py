"""What a call of the mixture density is given, and its rows and components as the kernels with tiles read them.

The kernels that pack them are those of `packing.py`; here are the tensors that they fill, and the launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import packing, tiles
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

    @property
    def parts(self) -> int:
        """How many TF32 numbers stand for an operand of the product form."""
        return 2 if self.precision == "high" else 1


class Survey(NamedTuple):
    """What must be known of all components before any is packed, [D] each."""

    max_logvar: Tensor
    origin: Tensor


class Features(NamedTuple):
    """Operands of a product, [n, F] and transposed [2 D, n], each in a high and a low part; None: not wanted."""

    high: Tensor
    low: Tensor | None
    high_t: Tensor | None
    low_t: Tensor | None

    @property
    def pair(self) -> tuple[Tensor | None, ...]:
        """(high, low) as kernels take them: where there is no low part, high stands for it, unread."""
        return self.high, self.high if self.low is None else self.low

    @property
    def pair_t(self) -> tuple[Tensor | None, ...]:
        return self.high_t, self.high_t if self.low_t is None else self.low_t


class Rows(NamedTuple):
    """Padded to `count`; term: what the squares add to a, in the product form with a shared logvar."""

    count: int  # type: ignore[assignment]  # a tuple's method of that name is not used
    operand: Tensor | Features  # z [D, M] for the difference form
    term: Tensor | None


class Components(NamedTuple):
    """Padded to `count`.

    peak, log_sigma_ratio: None where no tile of a score may be left out.  The difference form has no peak but c.
    """

    count: int  # type: ignore[assignment]
    operand: tuple[Tensor, Tensor] | Features  # mu and s [D, K] for the difference form
    c: Tensor
    peak: Tensor | None
    log_sigma_ratio: Tensor | None


def survey_components(problem: Problem) -> Survey:
    (_, K, D), mu = problem.shape, problem.mu
    span = round_up(cdiv(K, min(SURVEY_PARTS, cdiv(K, SURVEY_COLUMNS))), SURVEY_COLUMNS)
    parts = cdiv(K, span)
    max_logvar, weight, mean = mu.new_empty(3, parts, D)
    chunks = cdiv(D, packing.CHUNK.value)
    packing.survey_kernel[(parts, chunks)](
        mu, problem.logvar, problem.log_weights, max_logvar, weight, mean, K, D, span,
        SHARED=problem.shared_logvar is not None, COLUMNS=SURVEY_COLUMNS,
    )  # fmt: skip
    survey = Survey(*mu.new_empty(2, D))
    packing.survey_merge_kernel[(chunks,)](
        max_logvar, weight, mean, *survey, parts, D, ROWS=tiles.next_power_of_2(parts)
    )
    return survey


def pack_components(
    problem: Problem, survey: Survey | None, tile: Tile, *, transposed: bool, skipping: bool
) -> Components:
    """transposed: the features of a product both ways; skipping: with what a score needs that may leave tiles out."""
    precision, _, mu, logvar, log_weights, _ = problem
    (_, K, D), shared = problem.shape, problem.shared_logvar is not None
    count, padded = round_up(K, tile.columns), tiles.padded_dimensions(precision, D)
    c = mu.new_empty(count)
    log_sigma_ratio = torch.empty_like(c) if skipping else None
    at_once = min(PACKED_AT_ONCE[mu.dtype], tile.columns)
    grid, sizes = (count // at_once,), {"SHARED": shared, "COLUMNS": at_once}
    if precision == "highest":
        mu_t, s_t = mu.new_empty(2, padded, count)
        max_logvar = survey.max_logvar if survey is not None and skipping else None
        packing.components_difference_kernel[grid](
            mu, logvar, log_weights, max_logvar, mu_t, s_t, c, log_sigma_ratio, K, count, D, padded, **sizes
        )
        return Components(count, (mu_t, s_t), c, None, log_sigma_ratio)
    assert survey is not None
    peak = torch.empty_like(c) if skipping else None
    F = padded if shared else 2 * padded
    features = _empty_features(mu, count, F, F, problem.parts, transposed)
    packing.components_product_kernel[grid](
        mu, logvar, log_weights, *survey, *features, c, peak, log_sigma_ratio, K, count, D, padded, F, **sizes
    )
    return Components(count, features, c, peak, log_sigma_ratio)


def pack_rows(problem: Problem, survey: Survey | None, tile: Tile, *, transposed: bool) -> Rows:
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
    features = _empty_features(z, count, F, 2 * padded, problem.parts, transposed)
    term = None if logvar is None else z.new_empty(count)
    packing.rows_product_kernel[(count // at_once,)](
        z, survey.origin, logvar, *features, term, M, count, D, padded, F, ROWS=at_once
    )
    return Rows(count, features, term)


def _empty_features(like: Tensor, n: int, F: int, F_t: int, parts: int, transposed: bool) -> Features:
    def empty(wanted: bool, *shape: int) -> Tensor | None:
        return like.new_empty(shape) if wanted else None

    return Features(
        like.new_empty(n, F),
        empty(parts == 2, n, F),
        empty(transposed, F_t, n),
        empty(transposed and parts == 2, F_t, n),
    )
