"""pair_softmax on Triton: four functions, composed of a sweep, strips of weights and row work.

The sweep gives the statistics; a gradient is three more products (two where S is symmetric): the
logits again for the weights, and the weights times K and times Q in the library. Vectors of
inverse norms and scales stay outside the features, and whatever a small loss is sensitive to (the
positives, the derivative of the normalisation) is added in fp32 after the weights were rounded.
Every result is reproducible, and no value is read on the host.
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional

from ssl_fast.backends.triton import row_kernels
from ssl_fast.backends.triton.device import launching_on, written_dtype
from ssl_fast.backends.triton.pair_softmax_strips import (
    BOTH,
    MIRROR,
    ROWS,
    Weights,
    weight_products,
)
from ssl_fast.backends.triton.pair_softmax_sweep import Pairs, rows_of, sweep

NORM_FLOOR = 1e-12
ROW_BLOCK = 8
DEPTH_BLOCK = 128


def pair_softmax(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    diagonals: list[int],
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row log-sum-exp [N], row maximum [N], and column log-sum-exp [M] ([0] without columns)."""
    with launching_on(query):
        pairs = _pairs(query, key, query_scale, key_scale, query_ids, key_ids, diagonals)
        found = sweep(pairs, columns=columns)
    return found.row_lse, found.row_max, found.column_lse


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
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the features (empty when not needed) and of both scales.

    The scales' are summed in the weights' kernel, before the weights are rounded: dividing them
    out of the features' gradients would fail where a scale is 0.
    """
    with launching_on(query):
        pairs = _pairs(query, key, query_scale, key_scale, query_ids, key_ids, diagonals)
        row, row_shift = _without_empty(row_grad, row_lse)
        sides, column, column_shift, bound = ROWS, None, None, _largest(row)
        if column_lse is not None and column_grad is not None:
            column, column_shift = _without_empty(column_grad, column_lse)
            sides, bound = BOTH, bound + _largest(column)
        products = weight_products(
            pairs,
            Weights(sides, row_shift, row, column_shift, column, bound),
            want_query=need_query,
            want_key=need_key,
            row_moment=True,
            column_moment=True,
        )
    return (
        _as_gradient(products.query, products.restore_query, query),
        _as_gradient(products.key, products.restore_key, key),
        products.row_moment,
        products.column_moment,
    )


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
        inverse_query = _inverse_norms(query, normalize)
        inverse_key = _inverse_norms(key, normalize)
        pairs = _pairs(query, key, inverse_query, inverse_key, query_ids, key_ids, diagonals, scale)
        if positive is None:
            paired, inverse_paired = pairs.key[:n], inverse_key[:n]
        else:
            paired, inverse_paired = rows_of(positive), _inverse_norms(positive, normalize)
        alignment = inverse_query * inverse_paired
        similarity = alignment * _row_dots(pairs.query, paired)
        found = sweep(pairs, columns=False)
        positive_logit = pairs.scale * similarity
        loss = functional.softplus(found.row_lse - positive_logit)
        coefficient = torch.sigmoid(found.row_lse - positive_logit)
        nothing = query.new_empty(0)
        grad_query = grad_positive = grad_key = nothing
        grad_scale = coefficient.new_empty(0)
        if need_query or need_positive or need_key:
            row, row_shift = _without_empty(coefficient, found.row_lse)
            products = weight_products(
                pairs,
                Weights(ROWS, row_shift, row),
                want_query=need_query,
                want_key=need_key,
                row_moment=not need_query,
            )
            pull = -coefficient * alignment
            if need_query:
                grad_query, grad_scale = _finish_rows(
                    pairs.query, inverse_query, pairs.scale, normalize,
                    products.query, products.restore_query, paired, pull,
                )  # fmt: skip
            else:
                grad_scale = inverse_query * products.row_moment - coefficient * similarity
            if need_key:
                own = (pairs.query, pull) if positive is None else (None, None)
                grad_key, _ = _finish_rows(
                    pairs.key, inverse_key, pairs.scale, normalize,
                    products.key, products.restore_key, *own,
                )  # fmt: skip
            if need_positive and positive is not None:
                grad_positive, _ = _finish_rows(
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
        inverse = _inverse_norms(features, normalize)
        pairs = _pairs(features, features, inverse, inverse, None, None, [n], scale)
        found = sweep(pairs, columns=True, triangle=True)
        row_lse = torch.logaddexp(found.row_lse, found.column_lse)
        row_max = torch.maximum(found.row_max, found.column_max)
        partner = inverse.roll(n)
        similarity = inverse * partner * _row_dots(pairs.query, pairs.query, shift=n)
        positive_logit = pairs.scale * similarity
        loss = functional.softplus(row_lse - positive_logit)
        grad_features, grad_scale = features.new_empty(0), loss.new_empty(0)
        if need_features:
            coefficient = torch.sigmoid(row_lse - positive_logit)
            row, row_shift = _without_empty(coefficient, row_lse)
            all_pairs = _pairs(features, features, inverse, inverse, None, None, [0, n, -n], scale)
            products = weight_products(
                all_pairs,
                Weights(MIRROR, row_shift, row, row_shift - row.log()),
                want_query=True,
                row_moment=True,
            )
            pull = -(coefficient + coefficient.roll(n)) * inverse * partner
            grad_features, _ = _finish_rows(
                pairs.query, inverse, pairs.scale, normalize,
                products.query, products.restore_query, pairs.query, pull, shift=n,
            )  # fmt: skip
            grad_scale = inverse * products.row_moment - coefficient * similarity
    return loss, row_lse, positive_logit, row_max, grad_features, grad_scale


def _pairs(
    query: Tensor,
    key: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    diagonals: list[int],
    scale: Tensor | None = None,
) -> Pairs:
    if scale is None:
        scale = torch.ones((), device=query.device)
    return Pairs(
        rows_of(query),
        rows_of(key),
        query_scale.contiguous(),
        key_scale.contiguous(),
        scale,
        None if query_ids is None else query_ids.contiguous(),
        None if key_ids is None else key_ids.contiguous(),
        diagonals,
    )


def _inverse_norms(features: Tensor, normalize: bool) -> Tensor:
    """1/norm per row in fp32, 0 for a row of zeros; all 1 without normalisation."""
    if not normalize:
        return torch.ones(features.shape[0], device=features.device)
    norms = torch.linalg.vector_norm(features, dim=1, dtype=torch.float32)
    # NaN > floor is false, and a NaN row must not pass for a row of zeros
    return torch.where(norms <= NORM_FLOOR, 0.0, 1.0 / norms)


def _without_empty(weight: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and its log-sum-exp, both 0 where nothing was summed (exp(s + inf) is inf)."""
    empty = lse == -torch.inf
    return weight.float().masked_fill(empty, 0.0), lse.masked_fill(empty, 0.0)


def _largest(weight: Tensor) -> Tensor:
    return weight.abs().amax() if weight.numel() else weight.new_zeros(())


def _as_gradient(sums: Tensor | None, restore: Tensor | None, features: Tensor) -> Tensor:
    if sums is None:
        return features.new_empty(0)
    if restore is not None:
        sums = sums * restore[:, None]
    return sums.to(features.dtype)


def _row_grid(rows: int) -> tuple[int]:
    return (triton.cdiv(rows, ROW_BLOCK),)


def _row_dots(left: Tensor, right: Tensor, shift: int = 0) -> Tensor:
    """<left_i, right_{(i + shift) mod N}> in fp32."""
    n, depth = left.shape
    dots = torch.empty(n, device=left.device)
    if n:
        row_kernels.row_dot_kernel[_row_grid(n)](
            left, right, dots, n, depth, left.stride(0), right.stride(0), shift,
            BLOCK_ROWS=ROW_BLOCK, BLOCK_DEPTH=DEPTH_BLOCK,
        )  # fmt: skip
    return dots


def _finish_rows(
    features: Tensor,  # [N, D]
    inverse: Tensor,  # [N]
    scale: Tensor,  # []
    normalize: bool,
    sums: Tensor | None,  # [N, D] fp32
    restore: Tensor | None,  # [N]
    other: Tensor | None,  # [P, D]
    coefficient: Tensor | None,  # [P]
    shift: int = 0,
) -> tuple[Tensor, Tensor]:
    """The features' gradient, and per row its product with the features over the scale.

    Of t_i = restore_i sums_i + coefficient_i other_{(i + shift) mod P}, both zero where missing,
    the gradient is scale (t_i - inverse_i² <x_i, t_i> x_i), the last term with normalisation.
    """
    n, depth = features.shape
    gradient = torch.empty(n, depth, dtype=written_dtype(features), device=features.device)
    dots = torch.empty(n, device=features.device)
    if n:
        has_other = other is not None and coefficient is not None and len(other) > 0
        others = other if has_other and other is not None else features
        row_kernels.finish_rows_kernel[_row_grid(n)](
            inverse if sums is None else sums,
            inverse if restore is None else restore,
            others, inverse if coefficient is None else coefficient,
            features, inverse, scale, gradient, dots,
            n, others.shape[0], depth, others.stride(0), features.stride(0), shift,
            HAS_PRODUCT=sums is not None, HAS_RESTORE=restore is not None,
            HAS_OTHER=has_other, PROJECT=normalize,
            BLOCK_ROWS=ROW_BLOCK, BLOCK_DEPTH=DEPTH_BLOCK,
        )  # fmt: skip
    return gradient.to(features.dtype), dots
