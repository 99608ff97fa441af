"""scikit-learn's own draws: the same rows chosen from the same random state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ssl_fast.cluster.plus_plus import trials

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["MOST_PRODUCTS", "draws", "plus_plus", "products"]

# Multiplications of a seeding in float64 as scikit-learn does it, up to a second or two.
MOST_PRODUCTS = 1 << 34
_KEPT_BYTES = 16 << 20
_CHUNK = 1 << 18


def products(n: int, depth: int, n_clusters: int) -> int:
    """How many multiplications k-means++ takes."""
    return n * depth * (n_clusters - 1) * trials(n_clusters)


def draws(random_state: Any, cumulated: NDArray[Any], count: int) -> NDArray[Any]:
    """``random_state.choice(n, count, p=p)`` where ``cumulated`` is ``p.cumsum()`` in float64.

    The same numbers from the same state, without a pass over the probabilities each time.
    """
    found = cumulated.searchsorted(random_state.random_sample(count), side="right")
    limited: NDArray[Any] = np.minimum(found, len(cumulated) - 1)
    return limited


class _Rows:
    """The rows in float64, kept where that is little, made in chunks where it isn't."""

    def __init__(self, x: NDArray[Any], shift: NDArray[Any] | None) -> None:
        self.x, self.shift = x, shift
        self.wide = self._wide(slice(None)) if x.size * 8 <= _KEPT_BYTES else None
        self.norms = np.empty(len(x))
        for part, rows in self.chunks():
            self.norms[part] = np.einsum("ij,ij->i", rows, rows)

    def _wide(self, part: Any) -> NDArray[Any]:
        rows: NDArray[Any] = self.x[part]
        if self.shift is not None:
            rows = rows - self.shift
        return rows.astype(np.float64, copy=False)

    def chunks(self) -> Iterator[tuple[slice, NDArray[Any]]]:
        if self.wide is not None:
            yield slice(0, len(self.x)), self.wide
            return
        step = max(1, _CHUNK // self.x.shape[1])
        for start in range(0, len(self.x), step):
            part = slice(start, start + step)
            yield part, self._wide(part)

    def distances(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Squared, of some rows from all, [T, N] in the dtype of x."""
        chosen, own = self._wide(indices), self.norms[indices]
        found = np.empty((len(indices), len(self.x)), dtype=self.x.dtype)
        for part, rows in self.chunks():
            products = -2.0 * np.dot(chosen, rows.T)
            products += own[:, None]
            products += self.norms[part]
            found[:, part] = products
        return np.maximum(found, 0.0, out=found)


def plus_plus(
    x: NDArray[Any],  # [N, D]
    n_clusters: int,
    weight: NDArray[Any],  # [N]
    random_state: Any,
    shift: NDArray[Any] | None = None,  # [D], to take from the rows
) -> NDArray[Any]:
    """The rows that ``sklearn.cluster.kmeans_plusplus`` chooses, [K].

    It computes distances in float64, rounds them to x's dtype and adds them up one by one in that:
    other arithmetic would draw other rows.
    """
    rows = _Rows(x, shift)
    first = random_state.choice(len(x), p=weight / weight.sum())
    indices = [int(first)]
    closest = rows.distances(np.array(indices))
    potential: Any = closest @ weight
    closest = closest[0]
    for _ in range(1, n_clusters):
        at = random_state.uniform(size=trials(n_clusters)) * potential
        tried = np.searchsorted(np.cumsum(weight * closest), at)
        np.clip(tried, None, len(x) - 1, out=tried)
        distances = rows.distances(tried)
        np.minimum(closest, distances, out=distances)
        potentials = distances @ weight.reshape(-1, 1)
        best = int(np.argmin(potentials))
        potential, closest = potentials[best], distances[best]
        indices.append(int(tried[best]))
    return np.array(indices)
