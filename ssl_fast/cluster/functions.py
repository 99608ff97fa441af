"""The two halves of a k-means iteration: rows to centroids, and centroids from rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.cluster.checks import (
    accept_labels,
    accept_rows,
    accept_weight,
    check_backend,
    check_count,
    check_finite,
    check_like,
    check_metric,
    describe,
)
from ssl_fast.cluster.problem import Problem, means
from ssl_fast.cluster.rows import flattened, inverse_norms, parts, select
from ssl_fast.ops import nearest as nearest_op
from ssl_fast.ops.centroid_update import centroid_update
from ssl_fast.ops.gradients import (
    differentiated_again,
    open_signature,
    vector_jacobian,
    wants,
)

__all__ = ["kmeans_assign", "kmeans_update"]


def _distances(
    x: Tensor,  # [B, N, D]
    centroids: Tensor,  # [B, K, D]
    labels: Tensor,  # [B, N]
    cosine: bool,
) -> Tensor:
    """The distances as a formula of torch's, whose derivatives autograd takes to any order."""
    wide = accumulation_dtype(x)
    u, v = x.to(wide), centroids.to(wide)
    if cosine:
        u, v = (
            torch.where(rows.ne(0.0).any(2, keepdim=True), rows, 1.0).square().sum(2, keepdim=True)
            .rsqrt() * rows
            for rows in (u, v)
        )  # fmt: skip
    return (u - select(v, labels)).square().sum(2)


class _Assign(Function):
    """Labels and squared distances; the distances' gradient is 2 (u_i - v_label)."""

    @staticmethod
    @open_signature
    def forward(*inputs: Any) -> Any:
        x, centroids, x_scale, centroid_scale, backend = inputs
        return nearest_op.nearest(
            x, centroids, x_scale=x_scale, centroid_scale=centroid_scale, backend=backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output[0])
        ctx.backend = inputs[4]
        ctx.save_for_backward(*inputs[:4], output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, centroids, x_scale, centroid_scale, labels = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if differentiated_again():

            def formula(u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
                return (_distances(u, v, labels, x_scale is not None),)

            found = vector_jacobian(formula, (x, centroids), needed, (grads[1],))
            return *found, None, None, None
        arguments = x, centroids, x_scale, centroid_scale, labels, grads[1]
        return (
            _rows_gradient(*arguments) if needed[0] else None,
            _centroids_gradient(*arguments, ctx.backend) if needed[1] else None,
            None, None, None,
        )  # fmt: skip


def _through_norm(
    gradient: Tensor,  # [..., D], of the loss for unit vectors
    unit: Tensor,  # [..., D]
    scale: Tensor,  # [...]
) -> Tensor:
    """The gradient for the vectors that scale made unit ones; 0 for zeros."""
    along = (gradient * unit).sum(-1, keepdim=True)
    return (gradient - unit * along) * scale.unsqueeze(-1)


def _rows_gradient(
    x: Tensor,  # [B, N, D]
    centroids: Tensor,  # [B, K, D]
    x_scale: Tensor | None,  # [B, N]
    centroid_scale: Tensor | None,  # [B, K]
    labels: Tensor,  # [B, N]
    grad: Tensor,  # [B, N]
) -> Tensor:
    """``2 grad (u - v_label)`` for the rows, made in chunks."""
    found = torch.empty_like(x)
    v = centroids.to(grad.dtype)
    if centroid_scale is not None:
        v = v * centroid_scale.unsqueeze(2)
    for problems, part in parts(*x.shape):
        u = x[problems, part].to(grad.dtype)
        if x_scale is not None:
            u = u * x_scale[problems, part].unsqueeze(2)
        chunk = (u - select(v[problems], labels[problems, part])).mul_(
            2.0 * grad[problems, part].unsqueeze(2)
        )
        if x_scale is not None:
            chunk = _through_norm(chunk, u, x_scale[problems, part])
        found[problems, part] = chunk.to(x.dtype)
    return found


def _centroids_gradient(
    x: Tensor,  # [B, N, D]
    centroids: Tensor,  # [B, K, D]
    x_scale: Tensor | None,  # [B, N]
    centroid_scale: Tensor | None,  # [B, K]
    labels: Tensor,  # [B, N]
    grad: Tensor,  # [B, N]
    backend: str | None,
) -> Tensor:
    """``2 (v_k sum(grad) - sum(grad u))`` over the rows of each cluster.

    The sums are the op's, which takes no negative weights: two calls.
    """
    v = centroids.double()
    if centroid_scale is not None:
        v = v * centroid_scale.double().unsqueeze(2)
    total = torch.zeros_like(v)
    for sign in (1.0, -1.0):
        weight = (sign * grad).clamp_min(0.0)
        sums, counts = centroid_update(
            x, labels, v.shape[1], x_scale=x_scale, weight=weight, backend=backend
        )
        total += sign * (v * counts.unsqueeze(2) - sums)
    total *= 2.0
    if centroid_scale is not None:
        total = _through_norm(total, v, centroid_scale.double())
    return total.to(centroids.dtype)


def kmeans_assign(
    x: Tensor,  # [..., N, D]
    centroids: Tensor,  # [..., K, D]
    *,
    metric: str = "euclidean",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch.cdist(x, centroids).square().min(dim=-1)``, without the matrix: (labels, distances).

    Args:
        x: [..., N, D].
        centroids: [..., K, D], with x's leading dimensions, dtype and device.
        metric: "euclidean", or "cosine": the distance of the rows divided by their norms (a zero
            row stays zero), 2 - 2 cos for others.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    x is float32, bfloat16, float16, or float64 (the reference's).

    Returns:
        labels int64 [..., N], ties to the lowest, and squared_distances [..., N], fp32 (float64 for
        float64), differentiable in x and centroids: 2 (x - c_label), labels held fixed.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that don't fit; on a CPU, NaN or infinity.
        RuntimeError: ``backend`` can't serve this call.
    """
    accept_rows("x", x)
    accept_rows("centroids", centroids, "K")
    check_like("centroids", centroids, "x", x)
    check_metric(metric)
    check_backend(backend)
    if centroids.shape[-2] == 0:
        raise ValueError(
            f"centroids must hold at least one row; got shape {tuple(centroids.shape)}"
        )
    rows = flattened(x)
    points = flattened(centroids)
    check_finite("centroids", points.detach())
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    if metric == "cosine":
        scales = inverse_norms(rows.detach()), inverse_norms(points.detach())
    if wants(x) or wants(centroids):
        labels, distances = _Assign.apply(rows, points, *scales, backend)  # type: ignore[no-untyped-call]
    else:
        labels, distances = nearest_op.nearest(
            rows, points, x_scale=scales[0], centroid_scale=scales[1], backend=backend
        )
    # NaN and infinity in a row show in its distance, so that x is read again only then.
    if x.device.type == "cpu" and not bool(distances.detach().isfinite().all()):
        check_finite("x", rows.detach())
    return labels.view(x.shape[:-1]), distances.view(x.shape[:-1])


def kmeans_update(
    x: Tensor,  # [..., N, D]
    labels: Tensor,  # [..., N]
    n_clusters: int,
    sample_weight: Tensor | None = None,  # [..., N]
    *,
    previous: Tensor | None = None,  # [..., K, D]
    metric: str = "euclidean",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``one_hot(labels).T @ x / one_hot(labels).sum(0)``: (centroids, counts), no gradient.

    Args:
        x: [..., N, D].
        labels: int64 (or int32) [..., N], below n_clusters; rows with a negative one take no part.
        n_clusters: K.
        sample_weight: [..., N], not negative; a row with weight 0 takes no part.
        previous: [..., K, D] in x's dtype; what clusters without rows keep, zeros where None.
        metric: "euclidean", or "cosine": the mean direction of the rows, a unit vector.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    x is float32, bfloat16, float16, or float64 (the reference's). Sums are made in float64.

    Returns:
        centroids [..., K, D] in x's dtype, and counts [..., K], the sums of the weights, fp32
        (float64 for float64).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that don't fit; on a CPU, NaN or infinity, negative weights, a
            label from n_clusters up.
        RuntimeError: ``backend`` can't serve this call.
    """
    accept_rows("x", x)
    n_clusters = check_count("n_clusters", n_clusters)
    check_metric(metric)
    check_backend(backend)
    lead, depth = tuple(x.shape[:-2]), x.shape[-1]
    chosen = accept_labels("labels", labels, x)
    weight = accept_weight("sample_weight", sample_weight, x)
    if previous is not None:
        accept_rows("previous", previous, "K")
        check_like("previous", previous, "x", x)
        if previous.shape[-2] != n_clusters:
            raise ValueError(
                f"previous must have n_clusters={n_clusters} rows; got {describe(previous)}"
            )
        check_finite("previous", flattened(previous.detach()))
    with torch.no_grad():
        rows = flattened(x.detach())
        problem = Problem.of(rows, metric, weight, None, backend)
        sums, counts = centroid_update(
            rows, chosen, n_clusters, x_scale=problem.x_scale, weight=weight, backend=backend
        )
        if x.device.type == "cpu" and not bool(sums.isfinite().all()):
            taken = chosen if weight is None else chosen.masked_fill(weight == 0.0, -1)
            for index in range(rows.shape[0]):
                check_finite("x", rows[index, taken[index] >= 0][None])
        if previous is None:
            before = rows.new_zeros(rows.shape[0], n_clusters, depth)
        else:
            before = flattened(previous.detach())
        centroids = means(sums, counts, before, problem.cosine)
    return (
        centroids.view(*lead, n_clusters, depth),
        counts.to(accumulation_dtype(x)).view(*lead, n_clusters),
    )
