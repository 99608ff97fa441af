"""pair_softmax's weights in strips: what their kernel is told about them."""

from torch import Tensor

from ssl_fast.backends.triton import pair_softmax_kernels as kernels
from ssl_fast.backends.triton.device import config_for
from ssl_fast.backends.triton.pair_softmax_sweep import Pairs
from ssl_fast.backends.triton.pair_softmax_weights import BOTH, MIRROR, Weights
from ssl_fast.backends.triton.strips import Products, strip_products


def products_in_strips(
    pairs: Pairs,
    weights: Weights,
    *,
    query_factor: Tensor | None = None,  # [N]; None is query_scale
    want_query: bool = False,
    want_key: bool = False,
    row_moment: bool = False,
    column_moment: bool = False,
) -> Products:
    """weight_products by strips of W in memory, for any depth."""
    if weights.sides == MIRROR:
        op = "weights_mirror"
    elif weights.sides == BOTH and not column_moment:
        op = "weights_symmetric"
    else:
        op = "weights_moments" if row_moment or column_moment else "weights"
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
        bound=weights.largest,
        query_factor=query_factor,
        want_query=want_query,
        want_key=want_key,
        row_sums=int(row_moment),
        column_sums=int(column_moment),
    )
