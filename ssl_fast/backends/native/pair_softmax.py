"""pair_softmax on the CPU: from tensors to the pointers of csrc/cpu/pair_softmax.cpp.

The functions and their arguments are the reference's (backends/reference/pair_softmax.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssl_fast import _native
from ssl_fast.backends.native import DTYPES
from ssl_fast.backends.native.arrays import (
    address,
    check,
    gradient,
    hold,
    id_rule,
    ids_of,
    rows_of,
    run,
    vector,
)
from ssl_fast.backends.native.pair_softmax_symmetric import (
    pair_softmax_symmetric,
    pair_softmax_symmetric_backward,
    pair_softmax_symmetric_loss,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "pair_softmax",
    "pair_softmax_backward",
    "pair_softmax_expectation",
    "pair_softmax_loss",
    "pair_softmax_symmetric",
    "pair_softmax_symmetric_backward",
    "pair_softmax_symmetric_loss",
]

# The vectors that a kernel reads or writes, by their length; all others are [N].
_PER_KEY = frozenset(("key_scale", "column_lse", "column_grad", "grad_key_scale"))


def _sweep(
    kind: str,
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    positive: Tensor | None,  # [N, D]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    diagonals: Sequence[int],
    matching: bool,
    normalize: bool,
    features: dict[str, Tensor | None],
    **vectors: Tensor | None,
) -> None:
    """Run a kernel; ``features`` are the [*, D] results that it writes, fresh and contiguous."""
    n, m, d = query.shape[0], key.shape[0], query.shape[1]
    check("query", query, (n, d), query.dtype)
    check("key", key, (m, d), query.dtype)
    if positive is not None:
        check("positive", positive, (n, d), query.dtype)
    # Contiguous copies must outlive the call: they are held by these names.
    query, key = rows_of(query), rows_of(key)
    positive = None if positive is None else rows_of(positive)
    query_ids, key_ids = ids_of("query_ids", query_ids, n), ids_of("key_ids", key_ids, m)
    lengths = {name: None if name == "scale" else m if name in _PER_KEY else n for name in vectors}
    held = hold({name: (vectors[name], lengths[name]) for name in vectors})
    written = {name: value for name, value in features.items() if value is not None}
    run(
        _native.pair_softmax(
            kind,
            DTYPES[query.dtype],
            n,
            m,
            d,
            address(query),
            address(key),
            None if positive is None else address(positive),
            list(diagonals),
            id_rule(query_ids, key_ids, matching),
            normalize,
            torch.get_num_threads(),
            {name: value.data_ptr() for name, value in (*held.items(), *written.items())},
        )
    )


def _diagonal_logit(query: Tensor, diagonals: Sequence[int]) -> Tensor:
    """0 where the column doesn't exist, which the kernel leaves as it is."""
    return torch.zeros(query.shape[0] if diagonals else 0, dtype=torch.float32)


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
    """Log-sum-exps of rows and columns, row maxima and the first diagonal's logits in one sweep."""
    row_lse, row_max = vector(query.shape[0]), vector(query.shape[0])
    column_lse = vector(key.shape[0] if columns else 0)
    diagonal_logit = _diagonal_logit(query, diagonals)
    _sweep(
        "forward", query, key, None, query_ids, key_ids, diagonals, matching, False, {},
        query_scale=query_scale, key_scale=key_scale, row_lse=row_lse, row_max=row_max,
        column_lse=column_lse if columns else None,
        diagonal_logit=diagonal_logit if diagonals else None,
    )  # fmt: skip
    return row_lse, row_max, column_lse, diagonal_logit


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
    """The same and the rows' mean key in one sweep of two products, after which no key is read."""
    row_lse, row_max = vector(query.shape[0]), vector(query.shape[0])
    diagonal_logit = _diagonal_logit(query, diagonals)
    expectation = gradient(query, True, torch.float32)
    _sweep(
        "forward", query, key, None, query_ids, key_ids, diagonals, matching, False,
        {"expectation": expectation},
        query_scale=query_scale, key_scale=key_scale, row_lse=row_lse, row_max=row_max,
        diagonal_logit=diagonal_logit if diagonals else None,
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
    """Gradients of the features and of both scales: logits recomputed, two more products."""
    grad_query, grad_key = gradient(query, need_query), gradient(key, need_key)
    grad_query_scale = vector(query.shape[0])
    grad_key_scale = vector(key.shape[0])
    # The scale of the keys comes from the same sums as their gradient, so these are always made.
    key_sums = grad_key if need_key else gradient(key, True)
    columns = column_lse is not None and column_grad is not None
    _sweep(
        "backward", query, key, None, query_ids, key_ids, diagonals, matching, False,
        {"grad_query": grad_query if need_query else None, "grad_key": key_sums},
        query_scale=query_scale, key_scale=key_scale, row_lse=row_lse, row_grad=row_grad,
        column_lse=column_lse if columns else None, column_grad=column_grad if columns else None,
        diagonal_grad=diagonal_grad if diagonals else None,
        grad_query_scale=grad_query_scale, grad_key_scale=grad_key_scale,
    )  # fmt: skip
    return grad_query, grad_key, grad_query_scale, grad_key_scale


def pair_softmax_loss(
    query: Tensor,  # [N, D]
    positive: Tensor | None,  # [N, D]; None: row i's positive is key i
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
    """Loss per row and the gradients of its sum, three products in one call."""
    n = query.shape[0]
    loss, row_lse, positive_logit, row_max = (vector(n) for _ in range(4))
    need_positive = need_positive and positive is not None
    grad_query = gradient(query, need_query)
    grad_positive = gradient(query, need_positive)
    grad_key = gradient(key, need_key)
    grad_scale = vector(n if need_query or need_positive or need_key else 0)
    _sweep(
        "loss", query, key, positive, query_ids, key_ids, diagonals, False, normalize,
        {
            "grad_query": grad_query if need_query else None,
            "grad_positive": grad_positive if need_positive else None,
            "grad_key": grad_key if need_key else None,
        },
        scale=scale, loss=loss, row_lse=row_lse, positive_logit=positive_logit, row_max=row_max,
        grad_scale=grad_scale if need_query or need_positive or need_key else None,
    )  # fmt: skip
    return loss, row_lse, positive_logit, row_max, grad_query, grad_positive, grad_key, grad_scale
