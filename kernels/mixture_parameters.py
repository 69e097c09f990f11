"""The gradients of the components' parameters with tiles: packing, the kernel of the precision, merging.

The components are cut into blocks, a program each.  Where these are few, the rows are cut into splits as well, whose
parts are merged.  dL/dmu, dL/dlogvar and dL/dlog w follow from the sums S0, S1 and S2 (`merge.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import difference, merge, product, skipping, tiles
from .mixture_operands import Features, Problem, pack_components, pack_rows, survey_components
from .tiles import Tile, cdiv


class Gradients(NamedTuple):
    """Where the gradients of the parameters go; None: not wanted.  That of logvar is [K, D] also where it is shared."""

    mu: Tensor | None
    logvar: Tensor | None
    log_weights: Tensor | None


def launch(problem: Problem, grad: Tensor, log_prob: Tensor, dense: bool, wanted: Gradients, tile: Tile) -> None:
    """Fill the gradients that are wanted."""
    precision, z, mu, logvar, log_weights, exclude = problem
    (M, K, D), shared = problem.shape, problem.shared_logvar
    survey = survey_components(problem) if precision != "highest" else None
    need_s2 = wanted.logvar is not None
    need_s1 = need_s2 or wanted.mu is not None
    squares = shared is None or need_s2
    components = pack_components(problem, survey, tile, squares=squares, skipping=False)
    rows = pack_rows(problem, survey, tile, squares=squares)

    slices = cdiv(D, tile.dims) if need_s1 else 1
    blocks = components.count // tile.columns
    splits, span = tiles.cut(rows.count // tile.rows, tile.rows, blocks * slices)
    width = slices * tile.dims
    s0 = z.new_empty(splits, components.count)
    s1 = z.new_empty(splits, components.count, width) if need_s1 else None
    s2 = z.new_empty(splits, components.count, width) if need_s2 else None
    limit = skipping.log_negligible(K, z.dtype)
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
            *rows.operand, rows.term, *components.operand, *given,
            M, rows.count, components.count, components.operand.width, span, limit,
            PARTS=problem.parts, SQUARES=squares, WHOLE=padded == tile.dims, STAGES=tile.stages, **sizes,
        )  # fmt: skip
    origin, unit = (None, None) if survey is None else (survey.origin, survey.unit)
    merge.merge_components_kernel[(cdiv(components.count, 16), cdiv(D, 64) if need_s1 else 1)](
        s0, s1, s2, mu, logvar, origin, unit, log_weights, *wanted, K, components.count, D, width, splits,
        SHARED=shared is not None, COLUMNS=16, DIMS=64 if need_s1 else 1,
    )  # fmt: skip
