"""k-means and nearest neighbours beside distances in float64, taken from differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import ssl_fast
from benchmarks.gpu.compare import RELATIVE, Shape, generator, part_of_allowed

if TYPE_CHECKING:
    from collections.abc import Callable

# 16-bit labels are certified in float64; of fp32 features, a label may be further than the nearest
# by what fp32 loses of the largest distance.
EXCESS = {torch.float32: 3e-6, torch.float16: 1e-11, torch.bfloat16: 1e-11}
PROBLEMS = 2


@dataclass(frozen=True)
class Search:
    """A function of clustering and its check, which raises AssertionError."""

    name: str
    check: Callable[[Shape, torch.dtype, str, str], str]


def distances(x: Tensor, others: Tensor) -> Tensor:
    """|x_i - y_j|^2 in float64, [B, N, M], from differences, a problem and some rows at a time."""
    found = []
    for rows, columns in zip(x.double(), others.double(), strict=True):
        step = max(1, 2**23 // max(1, columns.numel()))
        parts = [(part[:, None] - columns).square().sum(2) for part in rows.split(step)]
        found.append(torch.cat(parts))
    return torch.stack(found)


def clusters_of(shape: Shape) -> int:
    return max(1, min(3 * shape.rows // 8, 300))


def rows_of(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Rows [B, N, D] around centroids [B, K, D], two of which are equal."""
    count = clusters_of(shape)
    made = generator(*shape)
    centroids = torch.randn(PROBLEMS, count, shape.dim, generator=made)
    centroids[:, -1] = centroids[:, 0]
    own = torch.randint(count, (PROBLEMS, shape.rows, 1), generator=made)
    x = centroids.gather(1, own.expand(-1, -1, shape.dim))
    x = x + torch.randn(x.shape, generator=made)
    return x.to(device, dtype), centroids.to(device, dtype)


def _chosen(exact: Tensor, labels: Tensor) -> Tensor:
    return exact.gather(2, labels.unsqueeze(2)).squeeze(2)


def _assign(shape: Shape, dtype: torch.dtype, device: str, backend: str) -> str:
    x, centroids = rows_of(shape, dtype, device)
    labels, squared = ssl_fast.kmeans_assign(x, centroids, backend=backend)
    exact = distances(x, centroids)
    count = centroids.shape[1]
    if not ((labels >= 0) & (labels < count)).all():
        raise AssertionError(f"labels: some are not in 0 to {count - 1}")
    chosen, best = _chosen(exact, labels), exact.min(2)
    over = float(((chosen - best.values) / exact.amax()).max())
    if over > EXCESS[dtype]:
        raise AssertionError(f"labels: one is {over:.1e} of the largest distance too far")
    if dtype != torch.float32 and not torch.equal(labels, _lowest(exact)):
        raise AssertionError("labels: a tie did not go to the lowest index")
    part = part_of_allowed(squared, chosen, torch.float32, what="distances")
    return f"labels within {over:.0e}, distances at {100 * part:.0f}% of the error allowed"


def _lowest(exact: Tensor) -> Tensor:
    """The lowest index of each row's least distance: equal centroids give the same float64."""
    least = exact == exact.amin(2, keepdim=True)
    return least.to(torch.int8).argmax(2)


def _assign_gradient(shape: Shape, dtype: torch.dtype, device: str, backend: str) -> str:
    x, centroids = (v.requires_grad_() for v in rows_of(shape, dtype, device))
    labels, squared = ssl_fast.kmeans_assign(x, centroids, backend=backend)
    gradients = torch.autograd.grad(squared.sum(), (x, centroids))
    wide, others = x.detach().double(), centroids.detach().double()
    index = labels.unsqueeze(2).expand(-1, -1, shape.dim)
    difference = 2 * (wide - others.gather(1, index))
    of_centroids = torch.zeros_like(others).scatter_add_(1, index, -difference)
    parts = [
        part_of_allowed(g, e, dtype, what=f"gradient of {name}")
        for name, g, e in zip(
            ("x", "centroids"), gradients, (difference, of_centroids), strict=True
        )
    ]
    return f"gradients at {100 * max(parts):.0f}% of the error allowed"


def _update(shape: Shape, dtype: torch.dtype, device: str, backend: str) -> str:
    x, centroids = rows_of(shape, dtype, device)
    count = centroids.shape[1]
    made = generator(*shape, 1)
    # Some rows take no part, and some clusters stay empty.
    labels = torch.randint(-1, max(1, count - 2), x.shape[:2], generator=made).to(device)
    weight = torch.rand(x.shape[:2], generator=made).to(device)
    found, counts = ssl_fast.kmeans_update(
        x, labels, count, weight, previous=centroids, backend=backend
    )
    used = weight.double() * (labels >= 0)
    index = labels.clamp(min=0)
    sums = torch.zeros(PROBLEMS, count, shape.dim, dtype=torch.float64, device=device)
    wide = index.unsqueeze(2).expand(-1, -1, shape.dim)
    sums.scatter_add_(1, wide, x.double() * used.unsqueeze(2))
    exact_counts = sums.new_zeros(PROBLEMS, count).scatter_add_(1, index, used)
    empty = exact_counts == 0
    means = sums / exact_counts.masked_fill(empty, 1.0).unsqueeze(2)
    means = torch.where(empty.unsqueeze(2), centroids.double(), means)
    parts = (
        part_of_allowed(found, means, dtype, what="centroids"),
        part_of_allowed(counts, exact_counts, torch.float32, what="counts"),
    )
    return f"{int(empty.sum())} empty, at {100 * max(parts):.0f}% of the error allowed"


def _lloyd(shape: Shape, dtype: torch.dtype, device: str, backend: str) -> str:
    """Three iterations: the labels are those of the centroids, and these the means of before."""
    x, centroids = rows_of(shape, dtype, device)
    result = ssl_fast.batched_kmeans(
        x, centroids.shape[1], init=centroids, max_iter=3, tol=0.0, backend=backend
    )
    exact = distances(x, result.centroids)
    best = exact.amin(2)
    over = float(((_chosen(exact, result.labels) - best) / exact.amax()).max())
    if over > EXCESS[dtype]:
        raise AssertionError(f"labels: one is {over:.1e} of the largest distance too far")
    part = part_of_allowed(result.inertia, best.sum(1), torch.float32, what="inertia")
    before = distances(x, centroids).amin(2).sum(1)
    if not (result.inertia <= before * (1 + RELATIVE[dtype])).all():
        raise AssertionError("inertia: it grew over three iterations")
    counted = torch.zeros_like(result.counts).scatter_add_(
        1, result.labels, torch.ones_like(result.labels, dtype=result.counts.dtype)
    )
    part_of_allowed(result.counts, counted.double(), torch.float32, what="counts")
    return f"inertia at {100 * part:.0f}% of the error allowed"


def _knn(shape: Shape, dtype: torch.dtype, device: str, backend: str) -> str:
    x, y = rows_of(shape, dtype, device)
    k = min(10, y.shape[1])
    squared, indices = ssl_fast.knn(x, y, k, backend=backend)
    exact = distances(x, y)
    if indices.sort(2).values.diff(dim=2).eq(0).any():
        raise AssertionError("indices: a row names a neighbour twice")
    best = exact.topk(k, dim=2, largest=False).values
    chosen = exact.gather(2, indices)
    over = float(((chosen - best) / exact.amax()).max())
    if over > EXCESS[torch.float32]:
        raise AssertionError(f"indices: one is {over:.1e} of the largest distance too far")
    part = part_of_allowed(squared, chosen, torch.float32, what="distances")
    return f"neighbours within {over:.0e}, distances at {100 * part:.0f}% of the error allowed"


SEARCHES = (
    Search("kmeans_assign", _assign),
    Search("kmeans_assign gradient", _assign_gradient),
    Search("kmeans_update", _update),
    Search("batched_kmeans", _lloyd),
    Search("knn", _knn),
)
