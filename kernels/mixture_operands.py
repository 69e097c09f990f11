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
        """How many fp16 numbers stand for an operand of the product form."""
        return 2 if self.precision == "high" else 1


class Survey(NamedTuple):
    """What must be known of all components before any is packed, [D] each; the last two for the product form alone."""

    max_logvar: Tensor
    origin: Tensor
    unit: Tensor | None  # a power of two amid the sigmas
    min_precision: Tensor | None  # exp(-max_logvar) unit^2


class Features(NamedTuple):
    """An operand of the product form, fp16 [n, F] in a high and a low part, and the power of two [n] of each line."""

    high: Tensor
    low: Tensor | None  # in "medium" there is none
    scale: Tensor

    @property
    def width(self) -> int:
        """F."""
        return self.high.shape[1]


class Rows(NamedTuple):
    """Padded to `count`; term: what all components' squares add to a, in the product form."""

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
    (_, K, D), mu, product = problem.shape, problem.mu, problem.precision != "highest"
    span = round_up(cdiv(K, min(SURVEY_PARTS, cdiv(K, SURVEY_COLUMNS))), SURVEY_COLUMNS)
    parts = cdiv(K, span)
    partial = mu.new_empty(4, parts, D)
    chunks = cdiv(D, packing.CHUNK.value)
    packing.survey_kernel[(parts, chunks)](
        mu, problem.logvar, problem.log_weights, *partial, K, D, span,
        SHARED=problem.shared_logvar is not None, COLUMNS=SURVEY_COLUMNS,
    )  # fmt: skip
    survey = Survey(*mu.new_empty(2, D), *(mu.new_empty(2, D) if product else (None, None)))
    packing.survey_merge_kernel[(chunks,)](*partial, *survey, parts, D, ROWS=tiles.next_power_of_2(parts))
    return survey


def pack_components(
    problem: Problem, survey: Survey | None, tile: Tile, *, squares: bool, skipping: bool
) -> Components:
    """squares: with features for those of z', in the product form; skipping: with what a score needs to skip tiles."""
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
    features = _empty_features(mu, count, problem, squares)
    packing.components_product_kernel[grid](
        mu, logvar, log_weights, *survey, *features, c, peak, log_sigma_ratio, K, D, features.width, tile.dims,
        SQUARES=squares, **sizes,
    )  # fmt: skip
    return Components(count, features, c, peak, log_sigma_ratio)


def pack_rows(problem: Problem, survey: Survey | None, tile: Tile, *, squares: bool) -> Rows:
    """squares: with those of z' among the features, in the product form."""
    precision, z, (M, _, D) = problem.precision, problem.z, problem.shape
    count, padded = round_up(M, tile.rows), tiles.padded_dimensions(precision, D)
    at_once = min(PACKED_AT_ONCE[z.dtype], tile.rows)
    if precision == "highest":
        z_t = z.new_empty(padded, count)
        packing.rows_difference_kernel[(count // at_once, cdiv(padded, packing.CHUNK.value))](
            z, z_t, M, count, D, padded, ROWS=at_once
        )
        return Rows(count, z_t, None)
    assert survey is not None
    features, term = _empty_features(z, count, problem, squares), z.new_empty(count)
    packing.rows_product_kernel[(count // at_once,)](
        z, survey.origin, survey.unit, survey.min_precision, *features, term, M, D, features.width, tile.dims,
        SQUARES=squares, ROWS=at_once,
    )  # fmt: skip
    return Rows(count, features, term)


def _empty_features(like: Tensor, n: int, problem: Problem, squares: bool) -> Features:
    """Of n rows or components, padded to whole slices; squares: with those of z' among them."""
    padded = tiles.padded_dimensions(problem.precision, problem.shape[2])
    high = like.new_empty(n, padded * (1 + squares), dtype=torch.float16)
    return Features(high, torch.empty_like(high) if problem.parts == 2 else None, like.new_empty(n))
