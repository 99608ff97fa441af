"""The fused losses on Triton, each with its gradient in the same call.

Vectors of inverse norms and scales stay outside the features, and whatever a small loss is
sensitive to (the positives, the derivative of the normalisation) is added in fp32 after the weights
were rounded.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ssl_fast.backends.triton.device import launching_on
from ssl_fast.backends.triton.launch import rows_of
from ssl_fast.backends.triton.pair_softmax_flash import Expectation, expectation, flashes
from ssl_fast.backends.triton.pair_softmax_products import weight_products
from ssl_fast.backends.triton.pair_softmax_sweep import pairs_of, sweep
from ssl_fast.backends.triton.pair_softmax_weights import MIRROR, ROWS, Weights, without_empty
from ssl_fast.backends.triton.rows import finish_rows, inverse_norms, row_dots


def pair_softmax_loss(
    query: Tensor,  # [N, D]
    positive: Tensor | None,  # [N, D]; None: the positive of row i is key[i]
    key: Tensor,  # [M, D]
    scale: Tensor,  # []
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    diagonals: list[int],
    normalize: bool,
    need_query: bool,
    need_positive: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss per row with its statistics, and the gradients of the rows' sum in the same call.

    Returns loss, row_lse and positive_logit and row_max (all [N], lse and maximum of the negatives
    alone), grad_query, grad_positive, grad_key (empty where not needed), grad_scale [N].
    """
    with launching_on(query):
        n = query.shape[0]
        inverse_query = inverse_norms(query, normalize)
        inverse_key = inverse_norms(key, normalize)
        pairs = pairs_of(
            query, key, inverse_query, inverse_key, query_ids, key_ids, diagonals, scale
        )
        if positive is None:
            paired, inverse_paired = pairs.key[:n], inverse_key[:n]
        else:
            paired, inverse_paired = rows_of(positive), inverse_norms(positive, normalize)
        alignment = inverse_query * inverse_paired
        similarity = alignment * row_dots(pairs.query, paired)
        # the queries' gradient is their expected keys times what the statistics give afterwards
        flash = need_query and flashes(pairs)
        found = expectation(pairs) if flash else sweep(pairs, columns=False)
        positive_logit = pairs.scale * similarity
        loss = functional.softplus(found.row_lse - positive_logit)
        coefficient = torch.sigmoid(found.row_lse - positive_logit)
        nothing = query.new_empty(0)
        grad_query = grad_positive = grad_key = nothing
        grad_scale = coefficient.new_empty(0)
        if need_query or need_positive or need_key:
            row, row_shift = without_empty(coefficient, found.row_lse)
            products = weight_products(
                pairs,
                Weights(ROWS, row_shift, row),
                want_query=need_query and not flash,
                want_key=need_key,
                row_moment=not need_query,
            )
            sums, restore = products.query, products.restore_query
            if isinstance(found, Expectation):
                sums, restore = found.sums, row * inverse_query
                restore = restore if found.restore is None else restore * found.restore
            pull = -coefficient * alignment
            if need_query:
                grad_query, grad_scale = finish_rows(
                    pairs.query, inverse_query, pairs.scale, normalize,
                    sums, restore, paired, pull,
                )  # fmt: skip
            else:
                grad_scale = inverse_query * products.row_sums[0] - coefficient * similarity
            if need_key:
                own = (pairs.query, pull) if positive is None else (None, None)
                grad_key, _ = finish_rows(
                    pairs.key, inverse_key, pairs.scale, normalize,
                    products.key, products.restore_key, *own,
                )  # fmt: skip
            if need_positive and positive is not None:
                grad_positive, _ = finish_rows(
                    paired, inverse_paired, pairs.scale, normalize, None, None, pairs.query, pull
                )
    return (
        loss, found.row_lse, positive_logit, found.row_max,
        grad_query, grad_positive, grad_key, grad_scale,
    )  # fmt: skip


def pair_softmax_symmetric_loss(
    features: Tensor,  # [2N, D]
    scale: Tensor,  # []
    normalize: bool,
    need_features: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of two views stacked, row i and row i + N a pair, with its gradient.

    S is symmetric. The sweep visits the tiles of its upper half alone and takes their columns for
    the other half; the gradient needs one product instead of two, its weights being c_i P_ij +
    c_j P_ji. (The tiles of those are all visited: the library multiplies whole strips.)
    Returns loss, row_lse, positive_logit, row_max, grad_features, grad_scale.
    """
    with launching_on(features):
        count = features.shape[0]
        n = count // 2
        inverse = inverse_norms(features, normalize)
        pairs = pairs_of(features, features, inverse, inverse, None, None, [n], scale)
        found = sweep(pairs, columns=True, triangle=True)
        row_lse = torch.logaddexp(found.row_lse, found.column_lse)
        row_max = torch.maximum(found.row_max, found.column_max)
        partner = inverse.roll(n)
        similarity = inverse * partner * row_dots(pairs.query, pairs.query, shift=n)
        positive_logit = pairs.scale * similarity
        loss = functional.softplus(row_lse - positive_logit)
        grad_features, grad_scale = features.new_empty(0), loss.new_empty(0)
        if need_features:
            coefficient = torch.sigmoid(row_lse - positive_logit)
            row, row_shift = without_empty(coefficient, row_lse)
            all_pairs = pairs_of(
                features, features, inverse, inverse, None, None, [0, n, -n], scale
            )
            products = weight_products(
                all_pairs,
                Weights(MIRROR, row_shift, row, row_shift - row.log()),
                want_query=True,
                row_moment=True,
            )
            pull = -(coefficient + coefficient.roll(n)) * inverse * partner
            grad_features, _ = finish_rows(
                pairs.query, inverse, pairs.scale, normalize,
                products.query, products.restore_query, pairs.query, pull, shift=n, wrap=True,
            )  # fmt: skip
            grad_scale = inverse * products.row_sums[0] - coefficient * similarity
    return loss, row_lse, positive_logit, row_max, grad_features, grad_scale
