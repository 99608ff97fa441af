"""pair_softmax's weights times K and Q without a strip: one launch for each side's sums.

Every sum has one writer or is merged over splits in a fixed order, so results are reproducible.
Nothing here reads a value on the host.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from ssl_fast.backends.triton import pair_softmax_fused_kernels as kernels
from ssl_fast.backends.triton import pair_softmax_weights
from ssl_fast.backends.triton.device import config_for
from ssl_fast.backends.triton.launch import key_splits, tile_arguments
from ssl_fast.backends.triton.pair_softmax_sweep import Pairs
from ssl_fast.backends.triton.pair_softmax_weights import Weights
from ssl_fast.backends.triton.strips import Products, amplifier_of, operand

OWN, OTHER, BOTH, MIRROR = (
    terms.value for terms in (kernels.OWN, kernels.OTHER, kernels.BOTH, kernels.MIRROR)
)
# The kernel's terms for the weights' sides, where the queries own the rows and where the keys do.
TERMS = {
    pair_softmax_weights.ROWS: (OWN, OTHER),
    pair_softmax_weights.BOTH: (BOTH, BOTH),
    pair_softmax_weights.MIRROR: (MIRROR, MIRROR),
}


@dataclass(frozen=True)
class _Own:
    """The queries as the side that owns a program's rows, or the keys of turned pairs.

    The sums are factor_i sum_j W_ij ks_j k_j and sum_j W_ij ks_j <q_i, k_j>, with
    W_ij = weight_i exp(s_ij - lse_i) + other_weight_j exp(s_ij - other_lse_j).
    """

    pairs: Pairs
    terms: int  # OWN: the first term alone. OTHER: the second. BOTH. MIRROR: its moment is OWN's
    factor: Tensor  # [N]
    lse: Tensor | None  # [N], no -inf
    weight: Tensor | None  # [N]
    other_lse: Tensor | None  # [M], no -inf
    other_weight: Tensor | None  # [M]


def fused_products(
    pairs: Pairs,
    weights: Weights,
    *,
    want_query: bool = False,
    want_key: bool = False,
    row_moment: bool = False,
    column_moment: bool = False,
) -> Products:
    """weight_products for depths that one chunk holds."""
    rows = weights.row_lse, weights.row
    mirrored = weights.sides == pair_softmax_weights.MIRROR
    columns = rows if mirrored else (weights.column_lse, weights.column)
    query_terms, key_terms = TERMS[weights.sides]
    query = _Own(pairs, query_terms, pairs.query_scale, *rows, *columns)
    key = _Own(pairs.turned(), key_terms, pairs.key_scale, *columns, *rows)
    query_sums, row_moments = _sums(query, weights.largest, want_query, row_moment)
    key_sums, column_moments = _sums(key, weights.largest, want_key, column_moment)
    return Products(query_sums, key_sums, None, None, row_moments, column_moments)


def _sums(own: _Own, bound: Tensor, product: bool, moment: bool) -> tuple[Tensor | None, Tensor]:
    """The sums [N, D], None where not asked for, and the moments [1, N], or [0, N]."""
    pairs, restore = own.pairs, None
    n, m, depth = len(pairs.query), len(pairs.key), pairs.query.shape[1]
    zeros, empty = pairs.query_scale.new_zeros, pairs.query_scale.new_empty
    if not (product or moment):
        return None, empty(0, n)
    if n == 0 or m == 0:
        return zeros(n, depth) if product else None, zeros(int(moment), n)
    if product and pairs.query.dtype == torch.float16:
        own, restore = _in_range_of_half(own, bound)
        pairs = own.pairs
    config = config_for("fused", pairs.query, pairs.key, ids=pairs.ids > 0)
    config = replace(config, block_depth=max(16, triton.next_power_of_2(depth)))
    blocks = triton.cdiv(n, config.block_rows)
    # splits come to fewer than four blocks for each multiprocessor, so partial sums are bounded:
    # 35 MB where 132 have blocks of 128 rows of 128
    splits = key_splits(blocks, m, config, pairs.query.device)
    parts = (splits,) if splits > 1 else ()
    sums = empty(*parts, n, depth) if product else pairs.query_scale
    moments = empty(splits, n) if moment else empty(0, n)
    kernels.products_kernel[(blocks, splits)](
        sum_parts=sums,
        moment_parts=moments if moment else pairs.query_scale,
        PRODUCT=product,
        MOMENT=moment,
        **_arguments(own),
        **tile_arguments(config, pairs.query),
    )
    if splits > 1:
        sums = sums.sum(0) if product else sums
        moments = moments.sum(0, keepdim=True) if moment else moments
    if restore is not None:
        moments = moments * restore
    return sums if product else None, moments


def _arguments(own: _Own) -> dict[str, Any]:
    """The kernel's arguments but for its results and its tile."""
    pairs = own.pairs
    features, rules = pairs.features(), pairs.rules()
    return {
        "own": features["query"],
        "other": features["key"],
        "own_stride": features["query_stride"],
        "other_stride": features["key_stride"],
        "depth": features["depth"],
        "n_own": len(pairs.query),
        "n_other": len(pairs.key),
        "scale": pairs.scale,
        "own_scale": pairs.query_scale,
        "other_scale": pairs.key_scale,
        "own_factor": own.factor,
        # the kernel reads none without its term; a launch wants some tensor
        "own_lse": pairs.query_scale if own.lse is None else own.lse,
        "own_weight": pairs.query_scale if own.weight is None else own.weight,
        "other_lse": pairs.key_scale if own.other_lse is None else own.other_lse,
        "other_weight": pairs.key_scale if own.other_weight is None else own.other_weight,
        "own_ids": rules.pop("query_ids"),
        "other_ids": rules.pop("key_ids"),
        "TERMS": own.terms,
        **rules,
    }


def _in_range_of_half(own: _Own, bound: Tensor) -> tuple[_Own, Tensor]:
    """The same sums from weights that fp16 can hold, and what restores the moments, [].

    As in a strip, the other side's powers of two go into a copy of its features, and the weights
    are brought to fp16's upper range. The own term needs no bound where it stands alone: what
    depends on the row is outside its weights, which are 1 at most.
    """
    right = operand(own.pairs.key, own.pairs.key_scale, multiplied=True)
    restore = torch.ones_like(bound) if right.shift is None else 1.0 / right.shift
    pairs = replace(
        own.pairs, key=right.rows, key_scale=right.mantissa, scale=own.pairs.scale * restore
    )
    weight, other_weight = own.weight, own.other_weight
    if own.terms != OWN:
        raised = amplifier_of(bound)
        restore = restore / raised
        weight = None if weight is None else weight * raised
        other_weight = None if other_weight is None else other_weight * raised
    factor = own.factor * restore
    return replace(
        own, pairs=pairs, factor=factor, weight=weight, other_weight=other_weight
    ), restore
