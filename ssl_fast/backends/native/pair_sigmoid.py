"""pair_sigmoid on the CPU: from tensors to the pointers of csrc/cpu/pair_sigmoid.cpp.

The function and its arguments are the reference's (backends/reference/pair_sigmoid.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_fast import _native
from ssl_fast.backends.native import DTYPES
from ssl_fast.backends.native.arrays import address, check, gradient, hold, rows_of, run, vector

__all__ = ["pair_sigmoid"]


def pair_sigmoid(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    query_scale: Tensor,  # [N]
    key_scale: Tensor,  # [M]
    bias: Tensor,  # []
    row_weight: Tensor | None,  # [N]
    positive_diagonal: int | None,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss per row and the gradients of its weighted sum, three products in one pass."""
    n, m, d = query.shape[0], key.shape[0], query.shape[1]
    check("query", query, (n, d), query.dtype)
    check("key", key, (m, d), query.dtype)
    # Contiguous copies must outlive the call: they are held by these names.
    query, key = rows_of(query), rows_of(key)
    needed = need_query or need_key
    loss = vector(n)
    grad_query, grad_key = gradient(query, need_query), gradient(key, need_key)
    grad_query_scale, grad_bias = vector(n if needed else 0), vector(n if needed else 0)
    grad_key_scale = vector(m if needed else 0)
    held = hold(
        {
            "query_scale": (query_scale, n),
            "key_scale": (key_scale, m),
            "bias": (bias, None),
            "row_weight": (row_weight, n),
            "loss": (loss, n),
        }
    )
    if needed:
        # The scale of the keys comes from the same sums as their gradient.
        held["grad_key"] = grad_key if need_key else gradient(key, True)
        held["grad_query_scale"] = grad_query_scale
        held["grad_key_scale"] = grad_key_scale
        held["grad_bias"] = grad_bias
    if need_query:
        held["grad_query"] = grad_query
    run(
        _native.pair_sigmoid(
            DTYPES[query.dtype],
            n,
            m,
            d,
            address(query),
            address(key),
            [] if positive_diagonal is None else [positive_diagonal],
            torch.get_num_threads(),
            {name: value.data_ptr() for name, value in held.items()},
        )
    )
    return loss, grad_query, grad_key, grad_query_scale, grad_key_scale, grad_bias
