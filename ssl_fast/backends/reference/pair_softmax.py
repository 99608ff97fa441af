"""pair_softmax in plain torch: the definition.

Everything here is differentiable torch without in-place writes, because the second derivatives of
every backend are the derivatives of these functions. Rows go in chunks with ``CHUNK_BYTES`` of
logits, of which about four arrays exist at once: 256 MB (more only while autograd is recording).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "accumulation_dtype",
    "inverse_norms",
    "pair_softmax",
    "pair_softmax_backward",
    "pair_softmax_loss",
    "pair_softmax_symmetric_loss",
    "row_loss",
]

CHUNK_BYTES = 64 * 2**20
SMALLEST_NORM = 1e-12  # torch.nn.functional.normalize's eps


def accumulation_dtype(features: Tensor) -> torch.dtype:
    """float64 for float64 features, float32 for all others."""
    return torch.float64 if features.dtype is torch.float64 else torch.float32


def inverse_norms(features: Tensor) -> Tensor:
    """1 / |row| of features [N, D] in the accumulation dtype, [N]; 0 for a zero row."""
    wide = features.to(accumulation_dtype(features))
    squares = (wide * wide).sum(dim=1)
    zero = squares <= SMALLEST_NORM**2
    # The inner where keeps 1/0 out of the derivatives, at every order.
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).rsqrt())


def row_loss(row_lse: Tensor, positive_logit: Tensor) -> Tensor:
    """softplus(lse over the negatives - positive logit), exact in relative terms near zero."""
    return -F.logsigmoid(positive_logit - row_lse)


def _chunks(rows: int, columns: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose logits fit CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // max(1, columns * itemsize))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _excluded(
    start: int,
    stop: int,
    key: Tensor,  # [M, D]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    diagonals: Sequence[int],
) -> Tensor | None:
    """The pairs that leave the softmax, bool [stop - start, M], or None when no rule is given."""
    excluded = None
    if query_ids is not None and key_ids is not None:
        excluded = query_ids[start:stop, None] == key_ids
    if diagonals:
        columns = torch.arange(key.shape[0], device=key.device)
        rows = torch.arange(start, stop, device=key.device)
        for diagonal in diagonals:
            on_diagonal = columns == (rows + diagonal)[:, None]
            excluded = on_diagonal if excluded is None else excluded | on_diagonal
    return excluded


def _log_sum_exp(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and maximum along dim.

    torch.logsumexp, but its gradient is 0 and not NaN where everything is -inf.
    """
    maximum = logits.detach().amax(dim=dim)
    shift = torch.where(torch.isfinite(maximum), maximum, 0.0)
    total = (logits - shift.unsqueeze(dim)).exp().sum(dim=dim)
    empty = total == 0.0
    return torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log() + shift), maximum


def pair_softmax(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    diagonals: Sequence[int],
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of s_ij = query_scale_i key_scale_j <q_i, k_j> over the pairs kept.

    Gives row_lse [N], row_max [N] and column_lse [M] ([0] unless ``columns``).
    """
    wide = accumulation_dtype(query)
    queries, keys = query.to(wide), key.to(wide)
    rows, width = query.shape[0], key.shape[0]
    nothing = query_scale.new_full((0,), -torch.inf)
    row_lse, row_max, column_lse = [nothing], [nothing], [key_scale.new_full((width,), -torch.inf)]
    for start, stop in _chunks(rows, width, queries.element_size()):
        if width == 0:
            row_lse.append(query_scale.new_full((stop - start,), -torch.inf))
            row_max.append(query_scale.new_full((stop - start,), -torch.inf))
            continue
        logits = (queries[start:stop] @ keys.T) * key_scale * query_scale[start:stop, None]
        excluded = _excluded(start, stop, keys, query_ids, key_ids, diagonals)
        if excluded is not None:
            logits = logits.masked_fill(excluded, -torch.inf)
        lse, maximum = _log_sum_exp(logits, dim=1)
        row_lse.append(lse)
        row_max.append(maximum)
        if columns:
            column_lse.append(_log_sum_exp(logits, dim=0)[0])
    merged = (
        _log_sum_exp(torch.stack(column_lse), dim=0)[0] if columns and width else nothing.clone()
    )
    return torch.cat(row_lse), torch.cat(row_max), merged


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
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of sum(row_grad * row_lse) + sum(column_grad * column_lse).

    Gives grad_query [N, D] and grad_key [M, D] ([0] where not needed), grad_query_scale [N] and
    grad_key_scale [M]. The log-sum-exps may be those over more keys than these: each set of keys
    then gives its part.
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
    for start, stop in _chunks(query.shape[0], width, queries.element_size()):
        rows = queries[start:stop]
        row_scale = query_scale[start:stop, None]
        products = rows @ keys.T  # [n, M]
        logits = products * key_scale * row_scale
        excluded = _excluded(start, stop, keys, query_ids, key_ids, diagonals)
        if excluded is not None:
            logits = logits.masked_fill(excluded, -torch.inf)
        weights = row_grad[start:stop, None] * (logits - row_shift[start:stop, None]).exp()
        if column_shift is not None and column_grad is not None:
            weights = weights + column_grad * (logits - column_shift).exp()
        by_query = weights * row_scale
        weights = weights * key_scale
        grad_query_scale.append((weights * products).sum(dim=1))
        grad_key_scale = grad_key_scale + (by_query * products).sum(dim=0)
        if need_query:
            grad_query.append((weights @ keys) * row_scale)
        if need_key:
            grad_key = grad_key + by_query.T @ rows
    return (
        torch.cat(grad_query).to(query.dtype) if need_query else query.new_empty(0),
        (grad_key * key_scale[:, None]).to(key.dtype) if need_key else key.new_empty(0),
        torch.cat(grad_query_scale),
        grad_key_scale,
    )


def _unit(features: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Rows [N, D] in the accumulation dtype, divided by their norms on request; inverse norms."""
    wide = features.to(accumulation_dtype(features))
    if not normalize:
        return wide, None
    inverse = inverse_norms(wide)[:, None]
    return wide * inverse, inverse


def _through_norm(grad: Tensor, unit: Tensor, inverse: Tensor | None) -> Tensor:
    """The gradient for rows [N, D] from the gradient for the same rows divided by their norms."""
    if inverse is None:
        return grad
    return inverse * (grad - unit * (unit * grad).sum(dim=1, keepdim=True))


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
    queries, query_inverse = _unit(query, normalize)
    keys, key_inverse = _unit(key, normalize)
    if positive is None:
        positives, positive_inverse = keys[:rows], None
    else:
        positives, positive_inverse = _unit(positive, normalize)
    query_scale, key_scale = scale.expand(rows), keys.new_ones(keys.shape[0])
    rules = (query_ids, key_ids, diagonals)
    row_lse, row_max, _ = pair_softmax(queries, keys, query_scale, key_scale, *rules, False)
    similarity = (queries * positives).sum(dim=1)
    positive_logit = scale * similarity
    losses = row_loss(row_lse, positive_logit), row_lse, positive_logit, row_max
    none = query.new_empty(0)
    if not (need_query or need_positive or need_key):
        return *losses, none, none.clone(), none.clone(), scale.new_empty(0)

    weight = torch.sigmoid(row_lse - positive_logit)
    grad_query, grad_key, grad_scale, _ = pair_softmax_backward(
        queries, keys, query_scale, key_scale, *rules, row_lse, None, weight, None,
        need_query, need_key,
    )  # fmt: skip
    pull = (scale * weight)[:, None]
    grad_positive = -pull * queries
    if need_query:
        grad_query = _through_norm(grad_query - pull * positives, queries, query_inverse)
    if need_key:
        if positive is None:
            grad_key = grad_key + F.pad(grad_positive, (0, 0, 0, key.shape[0] - rows))
        grad_key = _through_norm(grad_key, keys, key_inverse)
    if positive is not None and need_positive:
        grad_positive = _through_norm(grad_positive, positives, positive_inverse)
    else:
        grad_positive = none
    return (
        *losses,
        grad_query.to(query.dtype),
        grad_positive.to(query.dtype),
        grad_key.to(key.dtype),
        grad_scale - weight * similarity,
    )


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
