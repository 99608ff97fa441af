"""pair_softmax's weights times K and Q: fused with their making, or by strips in memory."""

from torch import Tensor

from ssl_fast.backends.triton.choice import is_fused
from ssl_fast.backends.triton.device import architecture_for
from ssl_fast.backends.triton.pair_softmax_fused import fused_products
from ssl_fast.backends.triton.pair_softmax_strips import products_in_strips
from ssl_fast.backends.triton.pair_softmax_sweep import Pairs
from ssl_fast.backends.triton.pair_softmax_weights import ROWS, Weights
from ssl_fast.backends.triton.strips import Products


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
    kind = "both_sides" if weights.sides == ROWS else "both_sides_and_softmaxes"
    if not ((want_query or row_moment) and (want_key or column_moment)):
        kind = "one_side"
    (n, depth), m = pairs.query.shape, len(pairs.key)
    architecture = architecture_for(pairs.query, pairs.key)
    wanted = {
        "want_query": want_query,
        "want_key": want_key,
        "row_moment": row_moment,
        "column_moment": column_moment,
    }
    # another factor than the scale comes with expected keys alone, which pair_softmax_flash fuses
    if query_factor is None and is_fused(kind, pairs.query.dtype, (n, m, depth), architecture):
        return fused_products(pairs, weights, **wanted)
    return products_in_strips(pairs, weights, query_factor=query_factor, **wanted)
