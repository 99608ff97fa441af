"""pair_softmax of a symmetric matrix on the CPU: csrc/cpu/pair_softmax_symmetric.cpp.

Only half of the tiles are computed, once for the statistics and once for a gradient: two products
in all. The functions and their arguments are the reference's.
"""

from __future__ import annotations

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

__all__ = [
    "pair_softmax_symmetric",
    "pair_softmax_symmetric_backward",
    "pair_softmax_symmetric_loss",
]


def _sweep(
    kind: str,
    features: Tensor,  # [N, D]
    ids: Tensor | None,  # [N]
    pairs: int,
    matching: bool,
    normalize: bool,
    grad_features: Tensor | None,  # [N, D]
    **vectors: Tensor | None,
) -> None:
    n, d = features.shape
    rows = rows_of(features)
    ids = ids_of("ids", ids, n)
    held = hold({name: (v, None if name == "scale" else n) for name, v in vectors.items()})
    if grad_features is not None:
        held["grad_features"] = grad_features
    check("features", rows, (n, d), features.dtype)
    run(
        _native.pair_softmax_symmetric(
            kind,
            DTYPES[rows.dtype],
            n,
            d,
            pairs,
            address(rows),
            id_rule(ids, ids, matching),
            normalize,
            torch.get_num_threads(),
            {name: value.data_ptr() for name, value in held.items()},
        )
    )


def pair_softmax_symmetric(
    features: Tensor,  # [N, D]
    scale: Tensor,  # []
    row_scale: Tensor,  # [N]
    ids: Tensor | None,  # [N]
    pairs: int,
    *,
    matching: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and maximum of every row."""
    lse, maximum = vector(features.shape[0]), vector(features.shape[0])
    _sweep(
        "forward", features, ids, pairs, matching, False, None,
        scale=scale, row_scale=row_scale, row_lse=lse, row_max=maximum,
    )  # fmt: skip
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
    """The features' gradient, and the rows' moments, of which both scales' are made."""
    grad_features, moment = gradient(features, True), vector(features.shape[0])
    _sweep(
        "backward", features, ids, pairs, matching, False, grad_features,
        scale=scale, row_scale=row_scale, row_lse=lse, row_grad=row_grad, moment=moment,
    )  # fmt: skip
    return grad_features, moment


def pair_softmax_symmetric_loss(
    features: Tensor,  # [2N, D]
    scale: Tensor,  # []
    normalize: bool,
    need_features: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """NT-Xent in one call. Only the sum of grad_scale is defined."""
    n = features.shape[0]
    check("features", features, (n // 2 * 2, features.shape[1]), features.dtype)
    loss, row_lse, positive_logit, row_max = (vector(n) for _ in range(4))
    grad_features = gradient(features, need_features)
    grad_scale = vector(n if need_features else 0)
    _sweep(
        "loss", features, None, n // 2, False, normalize, grad_features if need_features else None,
        scale=scale, loss=loss, row_lse=row_lse, positive_logit=positive_logit, row_max=row_max,
        grad_scale=grad_scale if need_features else None,
    )  # fmt: skip
    return loss, row_lse, positive_logit, row_max, grad_features, grad_scale
