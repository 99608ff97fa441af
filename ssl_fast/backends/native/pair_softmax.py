"""pair_softmax on the CPU: from tensors to the pointers of csrc/cpu/pair_softmax.cpp.

Everything is allocated here: results, gradients, and a workspace that grows with
threads x block x keys, never with queries x keys. The functions and their arguments are the
reference's (backends/reference/pair_softmax.py).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl_fast import _native
from ssl_fast.backends.native import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "pair_softmax",
    "pair_softmax_backward",
    "pair_softmax_loss",
    "pair_softmax_symmetric_loss",
]

# A smaller buffer spans no huge page.
_HUGE_PAGE = 2 << 20
# Up to this many bytes each thread keeps its workspace: a small loss then touches no fresh pages.
_KEPT = 2 << 20
_thread = threading.local()
# What the kernels read beside features and ids, by length.
_PER_ROW = frozenset(("query_scale", "row_lse", "row_grad"))
_PER_KEY = frozenset(("key_scale", "column_lse", "column_grad"))


def _check(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What a kernel is about to read by its address is what it will take it for."""
    if value.device.type != "cpu" or value.dtype is not dtype or value.shape != shape:
        raise ValueError(
            f"{name} must be a {dtype} tensor of shape {shape} on the CPU; got a {value.dtype} "
            f"tensor of shape {tuple(value.shape)} on {value.device}"
        )


def _rows(features: Tensor) -> Tensor:
    """The features with contiguous rows; any distance between them will do."""
    features = features.resolve_neg()
    return features if features.stride(1) == 1 or features.shape[1] == 1 else features.contiguous()


def _address(rows: Tensor) -> tuple[int, int]:
    return rows.data_ptr(), rows.stride(0)


def _pointer(vector: Tensor | None) -> int | None:
    return None if vector is None else vector.data_ptr()


def _run(prepared: Any) -> None:
    size = prepared.workspace_bytes()
    if size > _KEPT:
        workspace = torch.empty(size, dtype=torch.uint8)
    else:
        kept: Tensor | None = getattr(_thread, "workspace", None)
        if kept is None:
            kept = _thread.workspace = torch.empty(_KEPT, dtype=torch.uint8)
        workspace = kept
    prepared.run(workspace.data_ptr())


def _sweep(
    kind: str,
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    positive: Tensor | None,  # [N, D]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    diagonals: Sequence[int],
    normalize: bool,
    **vectors: Tensor | None,
) -> None:
    n, m, d = query.shape[0], key.shape[0], query.shape[1]
    _check("query", query, (n, d), query.dtype)
    _check("key", key, (m, d), query.dtype)
    if positive is not None:
        _check("positive", positive, (n, d), query.dtype)
    for name, rows, given in (("query_ids", n, query_ids), ("key_ids", m, key_ids)):
        if given is not None:
            _check(name, given, (rows,), torch.int64)
    for name, vector in vectors.items():
        if vector is not None and name in _PER_ROW:
            _check(name, vector, (n,), torch.float32)
        elif vector is not None and name in _PER_KEY:
            _check(name, vector, (m,), torch.float32)
    # Contiguous copies must outlive the call: they are held by these names.
    query, key = _rows(query), _rows(key)
    positive = None if positive is None else _rows(positive)
    ids = [None if i is None else i.contiguous() for i in (query_ids, key_ids)]
    held = {
        name: v if v.is_contiguous() else v.contiguous()
        for name, v in vectors.items()
        if v is not None
    }
    _run(
        _native.pair_softmax(
            kind,
            DTYPES[query.dtype],
            n,
            m,
            d,
            _address(query),
            _address(key),
            None if positive is None else _address(positive),
            list(diagonals),
            _pointer(ids[0]),
            _pointer(ids[1]),
            normalize,
            torch.get_num_threads(),
            {name: v.data_ptr() for name, v in held.items()},
        )
    )


def _vector(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32)


def _gradient(features: Tensor, needed: bool) -> Tensor:
    gradient = torch.empty(features.shape if needed else 0, dtype=features.dtype)
    if gradient.nbytes >= _HUGE_PAGE:
        _native.advise_huge_pages(gradient.data_ptr(), gradient.nbytes)
    return gradient


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
    """Row log-sum-exps, row maxima and, in a second sweep with the roles swapped, column ones."""
    n, m = query.shape[0], key.shape[0]
    row_lse, row_max = _vector(n), _vector(n)
    _sweep(
        "forward", query, key, None, query_ids, key_ids, diagonals, False,
        query_scale=query_scale, key_scale=key_scale, row_lse=row_lse, row_max=row_max,
    )  # fmt: skip
    column_lse = _vector(m if columns else 0)
    if columns:
        _sweep(
            "forward", key, query, None, key_ids, query_ids, [-d for d in diagonals], False,
            query_scale=key_scale, key_scale=query_scale, row_lse=column_lse,
            row_max=_vector(m),
        )  # fmt: skip
    return row_lse, row_max, column_lse


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
    """Gradients of the features and of both scales: logits recomputed, two more products."""
    grad_query, grad_key = _gradient(query, need_query), _gradient(key, need_key)
    grad_query_scale = _vector(query.shape[0])
    grad_key_scale = _vector(key.shape[0])
    # The scale of the keys comes from the same sums as their gradient, so these are always made.
    key_sums = grad_key if need_key else _gradient(key, True)
    _sweep(
        "backward", query, key, None, query_ids, key_ids, diagonals, False,
        query_scale=query_scale, key_scale=key_scale, row_lse=row_lse, row_grad=row_grad,
        column_lse=column_lse, column_grad=column_grad,
        grad_query=grad_query if need_query else None, grad_key=key_sums,
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
    _check("scale", scale, (), torch.float32)
    loss, row_lse, positive_logit, row_max = (_vector(n) for _ in range(4))
    need_positive = need_positive and positive is not None
    grad_query = _gradient(query, need_query)
    grad_positive = _gradient(query, need_positive)
    grad_key = _gradient(key, need_key)
    grad_scale = _vector(n if need_query or need_positive or need_key else 0)
    _sweep(
        "loss", query, key, positive, query_ids, key_ids, diagonals, normalize,
        scale=scale, loss=loss, row_lse=row_lse, positive_logit=positive_logit, row_max=row_max,
        grad_query=grad_query if need_query else None,
        grad_positive=grad_positive if need_positive else None,
        grad_key=grad_key if need_key else None,
        grad_scale=grad_scale if need_query or need_positive or need_key else None,
    )  # fmt: skip
    return loss, row_lse, positive_logit, row_max, grad_query, grad_positive, grad_key, grad_scale


def pair_softmax_symmetric_loss(
    features: Tensor,  # [2N, D]
    scale: Tensor,  # []
    normalize: bool,
    need_features: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """NT-Xent on half of the tiles, two products in all. Only the sum of grad_scale is defined."""
    n = features.shape[0]
    _check("features", features, (n // 2 * 2, features.shape[1]), features.dtype)
    _check("scale", scale, (), torch.float32)
    rows = _rows(features)
    loss, row_lse, positive_logit, row_max = (_vector(n) for _ in range(4))
    grad_features = _gradient(features, need_features)
    grad_scale = _vector(n if need_features else 0)
    _run(
        _native.pair_softmax_symmetric(
            DTYPES[rows.dtype],
            n // 2,
            rows.shape[1],
            _address(rows),
            scale.data_ptr(),
            normalize,
            torch.get_num_threads(),
            loss.data_ptr(),
            row_lse.data_ptr(),
            positive_logit.data_ptr(),
            row_max.data_ptr(),
            grad_features.data_ptr() if need_features else None,
            grad_scale.data_ptr() if need_features else None,
        )
    )
    return loss, row_lse, positive_logit, row_max, grad_features, grad_scale
