"""knn: the k nearest of other rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_fast.cluster.checks import (
    accept_rows,
    check_backend,
    check_count,
    check_finite,
    check_like,
    check_metric,
)
from ssl_fast.cluster.rows import flattened, inverse_norms
from ssl_fast.ops.top_k import top_k

__all__ = ["knn"]


def knn(
    x: Tensor,  # [..., N, D]
    y: Tensor,  # [..., M, D]
    k: int,
    *,
    metric: str = "euclidean",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch.cdist(x, y).square().topk(k, largest=False)``, without the matrix.

    Exact, by brute force: FAISS's flat index.

    Args:
        x: [..., N, D], the queries.
        y: [..., M, D], the rows to search, with x's leading dimensions, dtype and device.
        k: 1 to M.
        metric: "euclidean", or "cosine": the distance of the rows divided by their norms (a zero
            row stays zero), 2 - 2 cos for others.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    x is float32, bfloat16, float16, or float64 (the reference's).

    Returns:
        squared_distances [..., N, k], fp32 (float64 for float64), and indices int64 [..., N, k] in
        the order of (distance, index). No gradient.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that don't fit, k out of range; on a CPU, NaN or infinity.
        RuntimeError: ``backend`` can't serve this call.
    """
    accept_rows("x", x)
    accept_rows("y", y, "M")
    check_like("y", y, "x", x)
    k = check_count("k", k)
    if k > y.shape[-2]:
        raise ValueError(f"k must be at most the number of rows of y, {y.shape[-2]}; got {k}")
    check_metric(metric)
    check_backend(backend)
    with torch.no_grad():
        queries = flattened(x.detach())
        rows = flattened(y.detach())
        check_finite("x", queries)
        check_finite("y", rows)
        cosine = metric == "cosine"
        distances, indices = top_k(
            queries, rows, k,
            x_scale=inverse_norms(queries) if cosine else None,
            y_scale=inverse_norms(rows) if cosine else None,
            backend=backend,
        )  # fmt: skip
    shape = (*x.shape[:-1], k)
    return distances.view(shape), indices.view(shape)
