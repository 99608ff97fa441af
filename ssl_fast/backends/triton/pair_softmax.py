"""pair_softmax on Triton: statistics of the logits and their gradients, each from a sweep.

The sweep gives the statistics. A gradient is two more products for each side, made where the
weights are, or three for both: the logits again for the weights, and the weights times K and times
Q in the library; choice.py says which. Where the sweep itself can sum the expected keys, the
queries' gradient takes one. What the first diagonal took out of the softmax gets its
gradient in fp32, after the weights were rounded.
Every result is reproducible, and no value is read on the host.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ssl_fast.backends.triton.device import launching_on
from ssl_fast.backends.triton.pair_softmax_flash import expectation, flashes
from ssl_fast.backends.triton.pair_softmax_losses import (
    pair_softmax_loss,
    pair_softmax_symmetric_loss,
)
from ssl_fast.backends.triton.pair_softmax_products import weight_products
from ssl_fast.backends.triton.pair_softmax_sweep import Pairs, pairs_of, sweep
from ssl_fast.backends.triton.pair_softmax_weights import BOTH, ROWS, Weights, without_empty
from ssl_fast.backends.triton.rows import finish_rows, row_dots
from ssl_fast.backends.triton.strips import as_gradient, largest

__all__ = [
    "pair_softmax",
    "pair_softmax_backward",
    "pair_softmax_expectation",
    "pair_softmax_loss",
    "pair_softmax_symmetric",
    "pair_softmax_symmetric_backward",
    "pair_softmax_symmetric_loss",
]


def pair_softmax(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    diagonals: list[int],
    columns: bool,
    *,
    matching: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row log-sum-exp and maximum [N], column log-sum-exp [M], and the first diagonal's logits [N].

    The third is [0] without columns, the fourth [0] without diagonals.
    """
    with launching_on(query):
        pairs = pairs_of(
            query, key, query_scale, key_scale, query_ids, key_ids, diagonals, matching=matching
        )
        found = sweep(pairs, columns=columns)
        diagonal_logit = _diagonal_logit(pairs)
    return found.row_lse, found.row_max, found.column_lse, diagonal_logit


def pair_softmax_backward(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    diagonals: list[int],
    row_lse: Tensor,  # [N]
    column_lse: Tensor | None,  # [M]
    row_grad: Tensor,  # [N]
    column_grad: Tensor | None,  # [M]
    diagonal_grad: Tensor | None,  # [N]
    need_query: bool,
    need_key: bool,
    *,
    matching: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the features (empty when not needed) and of both scales.

    The scales' are summed in the weights' kernel, before the weights are rounded: dividing them
    out of the features' gradients would fail where a scale is 0.
    """
    with launching_on(query):
        pairs = pairs_of(
            query, key, query_scale, key_scale, query_ids, key_ids, diagonals, matching=matching
        )
        row, row_shift = without_empty(row_grad, row_lse)
        sides, column, column_shift, bound = ROWS, None, None, largest(row)
        if column_lse is not None and column_grad is not None:
            column, column_shift = without_empty(column_grad, column_lse)
            sides, bound = BOTH, bound + largest(column)
        products = weight_products(
            pairs,
            Weights(sides, row_shift, row, column_shift, column, bound),
            want_query=need_query,
            want_key=need_key,
            row_moment=True,
            column_moment=True,
        )
        (row_moment,), (column_moment,) = products.row_sums, products.column_sums
        diagonal = _first_diagonal(pairs)
        if diagonal_grad is None or diagonal is None:
            grad_query = as_gradient(products.query, products.restore_query, query)
            grad_key = as_gradient(products.key, products.restore_key, key)
            return grad_query, grad_key, row_moment, column_moment

        n, m = len(query), len(key)
        dots = _diagonal_dots(pairs, diagonal)
        by_key = diagonal_grad * _shifted(pairs.key_scale, diagonal, n)
        pull = by_key * pairs.query_scale
        row_moment += by_key * dots
        column_moment += _shifted(diagonal_grad * pairs.query_scale * dots, -diagonal, m)
        grad_query, grad_key = query.new_empty(0), key.new_empty(0)
        if need_query:
            grad_query, _ = finish_rows(
                pairs.query, pairs.query_scale, pairs.scale, False,
                products.query, products.restore_query, pairs.key, pull, diagonal,
            )  # fmt: skip
        if need_key:
            grad_key, _ = finish_rows(
                pairs.key, pairs.key_scale, pairs.scale, False,
                products.key, products.restore_key,
                pairs.query, _shifted(pull, -diagonal, m), -diagonal,
            )  # fmt: skip
    return grad_query, grad_key, row_moment, column_moment


def pair_softmax_expectation(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    diagonals: list[int],
    *,
    matching: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row log-sum-exp and maximum [N], the first diagonal's logits, and the expected key [N, D].

    The last is sum_j p_ij key_scale_j k_j in fp32, all that a gradient by the queries and their
    scales needs; its product leaves query_scale out from the start, which may be 0.
    """
    with launching_on(query):
        pairs = pairs_of(
            query, key, query_scale, key_scale, query_ids, key_ids, diagonals, matching=matching
        )
        diagonal_logit = _diagonal_logit(pairs)
        if flashes(pairs):
            swept = expectation(pairs)
            restore = None if swept.restore is None else swept.restore.expand_as(swept.row_lse)
            expected = as_gradient(swept.sums, restore, swept.row_lse)
            return swept.row_lse, swept.row_max, diagonal_logit, expected
        found = sweep(pairs, columns=False)
        ones = torch.ones_like(found.row_lse)
        row, row_shift = without_empty(ones, found.row_lse)
        products = weight_products(
            pairs,
            Weights(ROWS, row_shift, row, bound=ones.new_ones(())),
            query_factor=ones,
            want_query=True,
        )
        expected = as_gradient(products.query, products.restore_query, ones)
    return found.row_lse, found.row_max, diagonal_logit, expected


def pair_softmax_symmetric(
    features: Tensor,  # [N, D]
    scale: Tensor,  # []
    row_scale: Tensor,  # [N]
    ids: Tensor | None,  # [N]
    pairs: int,
    *,
    matching: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and maximum per row [N] of a symmetric S, without i == j and |i - j| == pairs.

    The sweep visits the tiles of the upper half alone and takes their columns for the other half.
    """
    with launching_on(features):
        upper = pairs_of(
            features, features, row_scale, row_scale, ids, ids, [pairs] if pairs else [], scale,
            matching=matching,
        )  # fmt: skip
        found = sweep(upper, columns=True, triangle=True)
        row_lse = torch.logaddexp(found.row_lse, found.column_lse)
        row_max = torch.maximum(found.row_max, found.column_max)
    return row_lse, row_max


def pair_softmax_symmetric_backward(
    features: Tensor,  # [N, D]
    scale: Tensor,  # []
    row_scale: Tensor,  # [N]
    ids: Tensor | None,  # [N]
    pairs: int,
    lse: Tensor,  # [N]
    row_grad: Tensor,  # [N]
    *,
    matching: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradient of sum(row_grad * lse) by the features, and per row its product with them.

    The weights are W_ij + W_ji, so one product gives both halves of the gradient; the moment is
    sum_j (W_ij + W_ji) row_scale_j <x_i, x_j>.
    """
    with launching_on(features):
        diagonals = [0, pairs, -pairs] if pairs else [0]
        all_pairs = pairs_of(
            features, features, row_scale, row_scale, ids, ids, diagonals, scale, matching=matching
        )
        row, shift = without_empty(row_grad, lse)
        products = weight_products(
            all_pairs,
            Weights(BOTH, shift, row, shift, row, 2 * largest(row)),
            want_query=True,
            row_moment=True,
        )
        grad_features, _ = finish_rows(
            all_pairs.query, row_scale, scale, False,
            products.query, products.restore_query, None, None,
        )  # fmt: skip
    return grad_features, products.row_sums[0]


def _first_diagonal(pairs: Pairs) -> int | None:
    """The diagonal whose logits are given out, None where it crosses no pair."""
    n, m = len(pairs.query), len(pairs.key)
    return next((x for x in pairs.diagonals[:1] if -n < x < m), None)


def _shifted(values: Tensor, shift: int, count: int) -> Tensor:
    """values_{i + shift} for i from 0 to count, 0 where there is none."""
    return functional.pad(values, (-shift, count + shift - len(values)))


def _diagonal_dots(pairs: Pairs, diagonal: int) -> Tensor:
    """<q_i, k_{i + diagonal}> [N], 0 where there is no such key."""
    n, m = len(pairs.query), len(pairs.key)
    first, last = max(0, -diagonal), min(n, m - diagonal)
    queries, keys = pairs.query[first:last], pairs.key[first + diagonal : last + diagonal]
    return _shifted(row_dots(queries, keys), -first, n)


def _diagonal_logit(pairs: Pairs) -> Tensor:
    """The logits of the first diagonal [N], 0 where its column doesn't exist; [0] without one."""
    n, diagonal = len(pairs.query), _first_diagonal(pairs)
    if diagonal is None:
        return pairs.query_scale.new_zeros(n if pairs.diagonals else 0)
    key_scale = _shifted(pairs.key_scale, diagonal, n)
    return pairs.query_scale * key_scale * _diagonal_dots(pairs, diagonal)
