"""The density and its score with tiles: packing, the kernel of the precision, merging.

Forward cuts the rows into blocks, a program each.  Where these are few, the components are cut into splits as well,
whose parts are merged.
"""

from __future__ import annotations

from torch import Tensor

from . import difference, merge, product, skipping, tiles
from .mixture_operands import Features, Problem, pack_components, pack_rows, survey_components
from .tiles import Tile, cdiv


def launch(
    problem: Problem, log_prob: Tensor | None, score: Tensor | None, grad: Tensor | None, dense: bool, tile: Tile
) -> None:
    """Fill log_prob [M] and score [M, D], of which either may be None; the score times grad [M], if that is given."""
    precision, z, exclude, shared = problem.precision, problem.z, problem.exclude, problem.shared_logvar
    M, K, D = problem.shape
    may_skip = score is not None and not dense
    survey = survey_components(problem) if precision != "highest" or may_skip else None
    squares = precision != "highest" and shared is None
    components = pack_components(problem, survey, tile, squares=squares, skipping=may_skip)
    rows = pack_rows(problem, survey, tile, squares=squares)

    slices = 1 if score is None else cdiv(D, tile.dims)
    blocks = rows.count // tile.rows
    splits, span = tiles.cut(components.count // tile.columns, tile.columns, blocks * slices)
    partial_top, partial_total = z.new_empty(2, splits, rows.count)
    width = slices * tile.dims * (1 + squares)
    partial_score = None if score is None else z.new_empty(splits, rows.count, width)
    log_negligible = skipping.log_negligible(K, z.dtype, skipping.FORWARD_DIGITS)
    sizes = {
        "SCORE": score is not None, "ROWS": tile.rows, "COLUMNS": tile.columns, "DIMS": tile.dims,
        "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True,
    }  # fmt: skip
    centre: tuple[Tensor | None, ...] = (None, None, None, None)
    padded, outputs = tiles.padded_dimensions(precision, D), (partial_top, partial_total, partial_score)
    if precision == "highest":
        difference.forward_kernel[(blocks, splits, slices)](
            rows.operand, *components.operand, components.c, components.log_sigma_ratio, exclude, *outputs,
            M, rows.count, components.count, padded, span, log_negligible, BLOCKS=difference.BLOCK.value < D, **sizes,
        )  # fmt: skip
    else:
        assert isinstance(rows.operand, Features) and isinstance(components.operand, Features) and survey is not None
        product.forward_kernel[(blocks, splits, slices)](
            *rows.operand, rows.term, *components.operand, components.c, components.peak, components.log_sigma_ratio,
            exclude, *outputs, M, rows.count, components.count, components.operand.width, span, log_negligible,
            PARTS=problem.parts, SQUARES=squares, WHOLE=padded == tile.dims, STAGES=tile.stages, **sizes,
        )  # fmt: skip
        centre = (z, survey.origin, survey.unit, survey.min_precision)
    merge.merge_rows_kernel[(cdiv(rows.count, 16), 1 if score is None else cdiv(D, 64))](
        *outputs, *centre, grad, log_prob, score, M, rows.count, D, width, splits,
        SQUARES=squares, SLICE=tile.dims, ROWS=16, DIMS=64 if score is not None else 1,
    )  # fmt: skip
