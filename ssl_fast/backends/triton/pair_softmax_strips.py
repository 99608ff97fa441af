"""pair_softmax's weights for the products: what a strip's kernel is told about them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_fast.backends.triton import pair_softmax_kernels as kernels
from ssl_fast.backends.triton.device import config_for
from ssl_fast.backends.triton.pair_softmax_sweep import Pairs
from ssl_fast.backends.triton.strips import Products, strip_products

ROWS, BOTH, MIRROR = (side.value for side in (kernels.ROWS, kernels.BOTH, kernels.MIRROR))


@dataclass(frozen=True)
class Weights:
    """W_ij = row_i exp(s_ij - row_lse_i) + column_j exp(s_ij - column_lse_j), 0 where excluded.

    Of a symmetric S, column_j is folded into column_lse_j (MIRROR), and must not be negative.
    """

    sides: int  # ROWS: the first term alone. BOTH. MIRROR
    row_lse: Tensor  # [N], no -inf
    row: Tensor  # [N]
    column_lse: Tensor | None = None  # [M], no -inf
    column: Tensor | None = None  # [M]
    bound: Tensor | None = None  # [], what no W_ij exceeds; None is 2


def without_empty(weight: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and its log-sum-exp, both 0 where nothing was summed (exp(s + inf) is inf)."""
    empty = lse == -torch.inf
    return weight.float().masked_fill(empty, 0.0), lse.masked_fill(empty, 0.0)


def weight_products(
    pairs: Pairs,
    weights: Weights,
    *,
    query_factor: Tensor | None = None,  # [N]; None is query_scale
    want_query: bool = False,
    want_key: bool = False,
    row_moment: bool = False,
    column_moment: bool = False,
) -> Products:
    """The products of W, with sum_j W_ij ks_j <q_i, k_j> in row_sums (MIRROR: of the row term).

    column_sums has sum_i W_ij qs_i <q_i, k_j>; each has one row, none where not asked for.
    """
    if weights.sides == MIRROR:
        op = "weights_mirror"
    elif weights.sides == BOTH and not column_moment:
        op = "weights_symmetric"
    else:
        op = "weights_moments" if row_moment or column_moment else "weights"
    bound = weights.bound
    arguments = {
        "scale": pairs.scale,
        "row_lse": weights.row_lse,
        "row_weight": weights.row,
        # the kernel reads neither without its term; a launch wants some tensor
        "column_lse": weights.row_lse if weights.column_lse is None else weights.column_lse,
        "column_weight": weights.row if weights.column is None else weights.column,
        "SIDES": weights.sides,
        "ROW_MOMENT": row_moment,
        "COLUMN_MOMENT": column_moment,
        **pairs.rules(),
    }
    return strip_products(
        kernels.weights_kernel,
        config_for(op, pairs.query, pairs.key, ids=pairs.ids > 0),
        pairs,
        arguments,
        bound=weights.row.new_full((), 2.0) if bound is None else bound,
        query_factor=query_factor,
        want_query=want_query,
        want_key=want_key,
        row_sums=int(row_moment),
        column_sums=int(column_moment),
    )
