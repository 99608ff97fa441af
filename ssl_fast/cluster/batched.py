"""batched_kmeans: many clusterings at once, each by Lloyd's algorithm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl_fast.backends.reference.pairs import accumulation_dtype
from ssl_fast.cluster.checks import (
    accept_lengths,
    accept_rows,
    accept_weight,
    check_backend,
    check_choice,
    check_count,
    check_finite,
    check_metric,
    check_real,
    describe,
)
from ssl_fast.cluster.empty import POLICIES
from ssl_fast.cluster.init import accept_init, seed
from ssl_fast.cluster.lloyd import Iteration, KMeansResult, Rules, better, run
from ssl_fast.cluster.problem import Problem
from ssl_fast.cluster.rows import flattened

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["batched_kmeans", "check_callback", "check_generator"]


def check_generator(generator: Any, x: Tensor) -> None:
    """TypeError unless it is a generator of x's device, or None."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator; got {describe(generator)}")
    if generator.device.type != x.device.type:
        raise ValueError(
            f"generator must be on the device of x, {x.device}; got {generator.device}"
        )


def check_callback(callback: Any) -> None:
    """TypeError unless it can be called, or is None."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable; got {describe(callback)}")


def _variance(problem: Problem, *, needed: bool) -> Tensor:
    """The mean variance of the features, float64 [B]; 0 where not needed. Not finite if x isn't.

    The mean alone takes one pass over x instead of two.
    """
    if needed or problem.cosine:
        return problem.moments().variance
    _, mean = problem.mean()
    return (mean * 0.0).sum(1)


def batched_kmeans(
    x: Tensor,  # [..., N, D]
    n_clusters: int,
    *,
    init: str | Tensor | Callable[..., Any] = "k-means++",
    n_init: int = 1,
    max_iter: int = 300,
    tol: float = 1e-4,
    sample_weight: Tensor | None = None,  # [..., N]
    metric: str = "euclidean",
    empty: str = "relocate",
    lengths: Tensor | None = None,  # [...]
    generator: torch.Generator | None = None,
    callback: Callable[[Iteration], Any] | None = None,
    backend: str | None = None,
) -> KMeansResult:
    """``KMeans(n_clusters).fit(x[b])`` for every b, with no distance matrix and no copy of x.

    Lloyd's algorithm. A problem stops when the squared way of its centroids in an iteration is at
    most ``tol`` times the mean variance of its features, as in scikit-learn, and costs nothing from
    then on. Labels, inertia and counts are always those of the centroids returned, also when
    ``max_iter`` ends it. On a CPU the result has the same bits for any number of threads.

    Args:
        x: [..., N, D]; every leading index is a problem of its own.
        n_clusters: K, 1 to N.
        init: "k-means++" (greedy, Arthur and Vassilvitskii 2007), "k-means||" (Bahmani et al.,
            arXiv:1203.6402), "random" (rows without replacement), centroids [K, D] or
            [..., K, D], or a callable ``init(x, n_clusters, generator=generator)`` that is given
            x as [B, N, D] and returns centroids.
        n_init: how many starts to make; for each problem the one with the least inertia is
            returned. Centroids given as ``init`` are started from once.
        max_iter: the most iterations.
        tol: see above; 0 goes on until no centroid moves.
        sample_weight: [..., N], not negative.
        metric: "euclidean", or "cosine": the distance of the rows and the centroids divided by
            their norms (a zero row stays zero). Centroids are then unit vectors.
        empty: what becomes of a cluster without rows: "relocate" gives it the row farthest from its
            centroid, as scikit-learn does; "keep" leaves its centroid where it is; "split" gives it
            half of the largest cluster.
        lengths: int64 [...], how many rows of each problem count, K at least. The others get
            label -1, whatever they hold.
        generator: where ``init`` takes its random numbers from.
        callback: called with an ``Iteration`` (iteration, inertia, shift, centroids) after each.
        backend: "reference", "native" or "triton"; None lets the dispatcher choose.

    x is float32, bfloat16, float16, or float64 (the reference's). Sums are made in float64.

    Returns:
        KMeansResult: labels int64 [..., N], centroids [..., K, D] in x's dtype, inertia float64
        [...], counts (fp32, float64 for float64) [..., K] and n_iter int64 [...].

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that don't fit, an option out of range; on a CPU, NaN or infinity in x,
            negative weights, lengths below K.
        RuntimeError: ``backend`` can't serve this call.
    """
    rows = accept_rows("x", x).detach()
    n_clusters = check_count("n_clusters", n_clusters)
    n_init, max_iter = check_count("n_init", n_init), check_count("max_iter", max_iter)
    tol = check_real("tol", tol)
    check_metric(metric)
    check_choice("empty", empty, POLICIES)
    check_backend(backend)
    check_generator(generator, x)
    check_callback(callback)
    lead, (n, depth) = tuple(x.shape[:-2]), x.shape[-2:]
    if n_clusters > n:
        raise ValueError(f"n_clusters must be at most the number of rows, {n}; got {n_clusters}")
    counted = accept_lengths(lengths, x, n_clusters)
    weight = accept_weight("sample_weight", sample_weight, x, counted)
    start = accept_init(init, lead, (n_clusters, depth), x)
    flat = flattened(rows)
    with torch.no_grad():
        problem = Problem.of(flat, metric, weight, counted, backend)
        variance = _variance(problem, needed=tol != 0.0 or empty == "split")
        if flat.device.type == "cpu" and not bool(variance.isfinite().all()):
            check_finite("x", flat, counted)
        rules = Rules(max_iter, tol * variance, variance.sqrt(), empty, callback)
        best: KMeansResult | None = None
        for _ in range(1 if isinstance(start, Tensor) else n_init):
            centroids = seed(problem, n_clusters, start, generator)
            best = better(run(problem, centroids, rules), best)
    if best is None:
        raise ValueError(f"n_init must be at least 1; got {n_init}")
    return KMeansResult(
        best.labels.view(*lead, n),
        best.centroids.view(*lead, n_clusters, depth),
        best.inertia.view(lead),
        best.counts.to(accumulation_dtype(x)).view(*lead, n_clusters),
        best.n_iter.view(lead),
    )
