"""pair_softmax in plain torch: the definition.

Everything here is differentiable torch without in-place writes, because the second derivatives of
every backend are the derivatives of these functions. Rows go in chunks with
``pairs.CHUNK_BYTES`` of logits, of which about four arrays exist at once: 256 MB (more only while
autograd is recording).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_fast.backends.reference.pairs import (
    IGNORED_ID,
    accumulation_dtype,
    chunks,
    diagonal_range,
    excluded_pairs,
    inverse_norms,
    log_sum_exp,
    on_diagonal,
    pad_rows,
    pair_diagonal,
    through_norm,
    unit_rows,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "IGNORED_ID",
    "accumulation_dtype",
    "inverse_norms",
    "pair_softmax",
    "pair_softmax_backward",
    "pair_softmax_expectation",
    "pair_softmax_loss",
    "pair_softmax_symmetric",
    "pair_softmax_symmetric_backward",
    "pair_softmax_symmetric_loss",
    "row_loss",
]


def row_loss(row_lse: Tensor, positive_logit: Tensor) -> Tensor:
    """softplus(lse over the negatives - positive logit), exact in relative terms near zero."""
    return -F.logsigmoid(positive_logit - row_lse)


def pair_softmax(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    diagonals: Sequence[int],
    columns: bool,
    *,
    matching: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp of s_ij = query_scale_i key_scale_j <q_i, k_j> over the pairs kept.

    A pair leaves where j - i is one of ``diagonals``, where the ids are equal, or where one of them
    is IGNORED_ID. Rows that have two ids, [N, 2], are equal in either; with ``matching`` the pairs
    without an equal id leave in place of those with one. Gives row_lse [N], row_max [N], column_lse
    [M] ([0] unless ``columns``) and diagonal_logit [N], s_ij at j = i + diagonals[0]: 0 where that
    column doesn't exist, [0] without diagonals.
    """
    wide = accumulation_dtype(query)
    queries, keys = query.to(wide), key.to(wide)
    rows, width = query.shape[0], key.shape[0]
    nothing = query_scale.new_full((0,), -torch.inf)
    row_lse, row_max, column_lse = [nothing], [nothing], [key_scale.new_full((width,), -torch.inf)]
    for start, stop in chunks(rows, width, queries.element_size()):
        if width == 0:
            row_lse.append(query_scale.new_full((stop - start,), -torch.inf))
            row_max.append(query_scale.new_full((stop - start,), -torch.inf))
            continue
        logits = (queries[start:stop] @ keys.T) * key_scale * query_scale[start:stop, None]
        excluded = excluded_pairs(start, stop, keys, query_ids, key_ids, diagonals, matching)
        if excluded is not None:
            logits = logits.masked_fill(excluded, -torch.inf)
        lse, maximum = log_sum_exp(logits, dim=1)
        row_lse.append(lse)
        row_max.append(maximum)
        if columns:
            column_lse.append(log_sum_exp(logits, dim=0)[0])
    merged = (
        log_sum_exp(torch.stack(column_lse), dim=0)[0] if columns and width else nothing.clone()
    )
    diagonal_logit = _diagonal_logit(queries, keys, query_scale, key_scale, diagonals)
    return torch.cat(row_lse), torch.cat(row_max), merged, diagonal_logit


def _diagonal_logit(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    diagonals: Sequence[int],
) -> Tensor:
    if not diagonals:
        return query_scale.new_empty(0)
    products = pair_diagonal(queries, keys * key_scale[:, None], diagonals[0])
    return products * query_scale


def _diagonal_gradient(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    diagonal: int,
    grad: Tensor,  # [N]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of sum(grad * diagonal_logit) for both features and both scales."""
    rows, columns = queries.shape[0], keys.shape[0]
    row, column, count = diagonal_range(rows, columns, diagonal)
    of_row, of_column = slice(row, row + count), slice(column, column + count)
    scaled_query = grad[of_row, None] * query_scale[of_row, None] * queries[of_row]
    scaled_key = key_scale[of_column, None] * keys[of_column]
    to_query = (grad * query_scale)[of_row, None] * scaled_key
    to_key = key_scale[of_column, None] * scaled_query
    to_query_scale = grad[of_row] * (queries[of_row] * scaled_key).sum(dim=1)
    to_key_scale = (scaled_query * keys[of_column]).sum(dim=1)
    return (
        pad_rows(to_query, row, rows),
        pad_rows(to_key, column, columns),
        pad_rows(to_query_scale, row, rows),
        pad_rows(to_key_scale, column, columns),
    )


def pair_softmax_expectation(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    diagonals: Sequence[int],
    *,
    matching: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """pair_softmax without columns, and the scaled keys' mean under each row's softmax.

    Gives row_lse, row_max, diagonal_logit (each as pair_softmax does) and expectation [N, D],
    sum_j exp(s_ij - row_lse_i) key_scale_j k_j in the accumulation dtype, 0 where no pair is kept.
    The gradient of row_lse_i is query_scale_i expectation_i for q_i and <q_i, expectation_i> for
    query_scale_i: a backward that needs no keys.
    """
    scaled = (query, key, query_scale, key_scale)
    rules = (query_ids, key_ids, diagonals)
    row_lse, row_max, _, diagonal_logit = pair_softmax(*scaled, *rules, False, matching=matching)
    ones = torch.ones_like(query_scale)
    wide = accumulation_dtype(query)
    queries = query.to(wide) * query_scale[:, None]
    expectation, *_ = pair_softmax_backward(
        queries, key.to(wide), ones, key_scale, *rules, row_lse, None, ones, None, None,
        True, False, matching=matching,
    )  # fmt: skip
    return row_lse, row_max, diagonal_logit, expectation


def pair_softmax_backward(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    diagonals: Sequence[int],
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
    """The gradient of the forward's results, each weighed by its ``grad`` and summed.

    That is of sum(row_grad row_lse) + sum(column_grad column_lse) + sum(diagonal_grad
    diagonal_logit). Gives grad_query [N, D] and grad_key [M, D] ([0] where not needed),
    grad_query_scale [N] and grad_key_scale [M]. The log-sum-exps may be those over more keys than
    these: each set of keys then gives its part.
    """
    wide = accumulation_dtype(query)
    queries, keys = query.to(wide), key.to(wide)
    width = key.shape[0]
    grad_query, grad_query_scale = [queries[:0]], [query_scale[:0]]
    grad_key, grad_key_scale = torch.zeros_like(keys), torch.zeros_like(key_scale)
    row_shift = torch.where(row_lse == -torch.inf, 0.0, row_lse)
    column_shift = None
    if column_lse is not None:
        column_shift = torch.where(column_lse == -torch.inf, 0.0, column_lse)
    own_weights = diagonal_grad is not None and len(diagonals) > 0
    for start, stop in chunks(query.shape[0], width, queries.element_size()):
        rows = queries[start:stop]
        row_scale = query_scale[start:stop, None]
        products = rows @ keys.T  # [n, M]
        logits = products * key_scale * row_scale
        excluded = excluded_pairs(start, stop, keys, query_ids, key_ids, diagonals, matching)
        if excluded is not None:
            logits = logits.masked_fill(excluded, -torch.inf)
        weights = row_grad[start:stop, None] * (logits - row_shift[start:stop, None]).exp()
        if column_shift is not None and column_grad is not None:
            weights = weights + column_grad * (logits - column_shift).exp()
        if own_weights:
            # Not 0 yet where a log-sum-exp is NaN.
            weights = weights.masked_fill(on_diagonal(start, stop, keys, diagonals[0]), 0.0)
        by_query = weights * row_scale
        weights = weights * key_scale
        grad_query_scale.append((weights * products).sum(dim=1))
        grad_key_scale = grad_key_scale + (by_query * products).sum(dim=0)
        if need_query:
            grad_query.append((weights @ keys) * row_scale)
        if need_key:
            grad_key = grad_key + by_query.T @ rows
    made = [torch.cat(grad_query), grad_key * key_scale[:, None]]
    made += [torch.cat(grad_query_scale), grad_key_scale]
    if own_weights and diagonal_grad is not None:
        own = _diagonal_gradient(queries, keys, query_scale, key_scale, diagonals[0], diagonal_grad)
        needs = (need_query, need_key, True, True)
        made = [x + y if need else x for x, y, need in zip(made, own, needs, strict=True)]
    return (
        made[0].to(query.dtype) if need_query else query.new_empty(0),
        made[1].to(key.dtype) if need_key else key.new_empty(0),
        made[2],
        made[3],
    )


def pair_softmax_loss(
    query: Tensor,  # [N, D]
    positive: Tensor | None,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,  # []
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    diagonals: Sequence[int],
    normalize: bool,
    need_query: bool,
    need_positive: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contrastive loss per row, softplus(lse of the keys kept - positive logit), and its gradient.

    A ``positive`` of None means key i is the positive of row i; the caller then keeps it out of the
    sweep with ``diagonals=[0]``, and its gradient is part of grad_key. Gives loss, row_lse,
    positive_logit, row_max (each [N]), the gradients of loss.sum() for query, positive and key ([0]
    where not needed), and d loss_i / d scale [N] ([0] when no gradient is needed).
    """
    rows = query.shape[0]
    queries, query_inverse = unit_rows(query, normalize)
    keys, key_inverse = unit_rows(key, normalize)
    if positive is None:
        positives, positive_inverse = keys[:rows], None
    else:
        positives, positive_inverse = unit_rows(positive, normalize)
    query_scale, key_scale = scale.expand(rows), keys.new_ones(keys.shape[0])
    rules = (query_ids, key_ids, diagonals)
    row_lse, row_max, *_ = pair_softmax(queries, keys, query_scale, key_scale, *rules, False)
    similarity = (queries * positives).sum(dim=1)
    positive_logit = scale * similarity
    losses = row_loss(row_lse, positive_logit), row_lse, positive_logit, row_max
    none = query.new_empty(0)
    if not (need_query or need_positive or need_key):
        return *losses, none, none.clone(), none.clone(), scale.new_empty(0)

    weight = torch.sigmoid(row_lse - positive_logit)
    grad_query, grad_key, grad_scale, _ = pair_softmax_backward(
        queries, keys, query_scale, key_scale, *rules, row_lse, None, weight, None, None,
        need_query, need_key,
    )  # fmt: skip
    pull = (scale * weight)[:, None]
    grad_positive = -pull * queries
    if need_query:
        grad_query = through_norm(grad_query - pull * positives, queries, query_inverse)
    if need_key:
        if positive is None:
            grad_key = grad_key + F.pad(grad_positive, (0, 0, 0, key.shape[0] - rows))
        grad_key = through_norm(grad_key, keys, key_inverse)
    if positive is not None and need_positive:
        grad_positive = through_norm(grad_positive, positives, positive_inverse)
    else:
        grad_positive = none
    return (
        *losses,
        grad_query.to(query.dtype),
        grad_positive.to(query.dtype),
        grad_key.to(key.dtype),
        grad_scale - weight * similarity,
    )


def _symmetric(
    features: Tensor,  # [N, D]
    scale: Tensor,  # []
    row_scale: Tensor,  # [N]
    ids: Tensor | None,  # [N]
    pairs: int,
) -> tuple[Any, ...]:
    """The same sweep as arguments of the functions with queries and keys."""
    diagonals = (0, pairs, -pairs) if pairs > 0 else (0,)
    return features, features, scale * row_scale, row_scale, ids, ids, diagonals


def pair_softmax_symmetric(
    features: Tensor,  # [N, D]
    scale: Tensor,  # []
    row_scale: Tensor,  # [N]
    ids: Tensor | None,  # [N]
    pairs: int,
    *,
    matching: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [N] and maximum [N] of s_ij = scale row_scale_i row_scale_j <x_i, x_j>.

    A row leaves its own softmax, as do rows with its id, rows where either id is IGNORED_ID and,
    with ``pairs`` above 0, the rows that many further on and back.
    """
    sweep: Any = pair_softmax
    arguments = _symmetric(features, scale, row_scale, ids, pairs)
    lse, maximum, *_ = sweep(*arguments, False, matching=matching)
    return lse, maximum


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
    """Gradient of sum(row_grad * lse): grad_features [N, D] and moment [N].

    moment_i = sum_j (W_ij + W_ji) row_scale_j <x_i, x_j>, W_ij = row_grad_i exp(s_ij - lse_i). The
    gradient for row_scale is scale * moment, that for scale 0.5 sum(row_scale * moment).
    """
    # s_ij = s_ji: the columns' log-sum-exps are the rows', and W_ij + W_ji one pair's weight.
    arguments = _symmetric(features, scale, row_scale, ids, pairs)
    backward: Any = pair_softmax_backward
    grad_features, _, moment, _ = backward(
        *arguments, lse, lse, row_grad, row_grad, None, True, False, matching=matching
    )
    return grad_features, moment


def pair_softmax_symmetric_loss(
    features: Tensor,  # [2N, D]
    scale: Tensor,  # []
    normalize: bool,
    need_features: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contrastive loss of rows whose positive is the row N further on, and its gradient.

    The keys of row i are all rows but i and its positive. Gives loss, row_lse, positive_logit,
    row_max (each [2N]), the gradient of loss.sum() for features and d loss_i / d scale [2N] ([0]
    when not needed).
    """
    half = features.shape[0] // 2
    rows = features.to(accumulation_dtype(features))
    loss, row_lse, positive_logit, row_max, *grads, grad_scale = pair_softmax_loss(
        rows, rows.roll(half, 0), rows, scale, None, None, (0, half, -half), normalize,
        need_features, need_features, need_features,
    )  # fmt: skip
    grad_features, grad_positive, grad_key = grads
    if need_features:
        grad_features = grad_features + grad_key + grad_positive.roll(half, 0)
    grad_features = grad_features.to(features.dtype)
    return loss, row_lse, positive_logit, row_max, grad_features, grad_scale
