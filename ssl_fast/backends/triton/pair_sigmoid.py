"""pair_sigmoid on Triton: the loss alone in one sweep, or with its gradient in one pass.

The gradient is three products: the logits, turned into the loss's derivatives by them a strip at a
time, and those times K and times Q in the library. The loss and the scales' and the bias's
gradients are summed in the same pass, before the derivatives are rounded. Every result is
reproducible, and no value is read on the host.
"""

from typing import Any

import triton
from torch import Tensor

from ssl_fast.backends.triton import pair_sigmoid_kernels as kernels
from ssl_fast.backends.triton.device import config_for, launching_on
from ssl_fast.backends.triton.launch import Sides, key_splits, rows_of, tile_arguments
from ssl_fast.backends.triton.strips import as_gradient, largest, strip_products


def pair_sigmoid(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    bias: Tensor,  # []
    row_weight: Tensor | None,  # [N]; None is 1
    positive_diagonal: int | None,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss per row [N], and the gradients of sum(row_weight * loss).

    Those of query and key ([0] where not needed), of both scales and, per row, of the bias (all
    three [0] when neither is needed).
    """
    with launching_on(query):
        sides = Sides(
            rows_of(query), rows_of(key), query_scale.contiguous(), key_scale.contiguous()
        )
        crosses = positive_diagonal is not None and -len(query) < positive_diagonal < len(key)
        arguments: dict[str, Any] = {
            "bias": bias,
            "positive": positive_diagonal if crosses else 0,
            "DIAGONALS": int(crosses),
        }
        if not (need_query or need_key):
            nothing = query_scale.new_empty
            loss = _sweep(sides, arguments)
            return loss, query.new_empty(0), key.new_empty(0), nothing(0), nothing(0), nothing(0)

        weight = sides.query_scale if row_weight is None else row_weight.float().contiguous()
        products = strip_products(
            kernels.weights_kernel,
            config_for("sigmoid_weights", sides.query, sides.key),
            sides,
            {**arguments, "row_weight": weight, "HAS_WEIGHT": row_weight is not None},
            bound=weight.new_ones(()) if row_weight is None else largest(weight),
            want_query=need_query,
            want_key=need_key,
            row_sums=3,
            column_sums=1,
        )
        # results that share memory would share a version counter
        loss, grad_bias, grad_query_scale = (x.clone() for x in products.row_sums)
        grad_query = as_gradient(products.query, products.restore_query, query)
        grad_key = as_gradient(products.key, products.restore_key, key)
    return loss, grad_query, grad_key, grad_query_scale, products.column_sums[0], grad_bias


def _sweep(sides: Sides, arguments: dict[str, Any]) -> Tensor:
    """The loss per row [N]; every partial sum has one writer and their merge a fixed order."""
    n, m = len(sides.query), len(sides.key)
    if n == 0 or m == 0:
        return sides.query_scale.new_zeros(n)
    config = config_for("sigmoid_sweep", sides.query, sides.key)
    blocks = triton.cdiv(n, config.block_rows)
    splits = key_splits(blocks, m, config, sides.query.device)
    parts = sides.query_scale.new_empty(splits, n)
    tile = tile_arguments(config, sides.query)
    kernels.sweep_kernel[(blocks, splits)](
        query_scale=sides.query_scale,
        key_scale=sides.key_scale,
        row_loss=parts,
        n_queries=n,
        n_keys=m,
        RESIDENT=sides.query.shape[1] <= tile["BLOCK_DEPTH"],
        **sides.features(),
        **arguments,
        **tile,
    )
    return parts[0] if splits == 1 else parts.sum(0)
