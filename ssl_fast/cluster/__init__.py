"""k-means and nearest neighbours, on NumPy arrays and on tensors of any device.

The estimators ``KMeans`` and ``MiniBatchKMeans`` are scikit-learn's, which is an extra:
``pip install ssl_fast[sklearn]``. It is imported when one of them is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssl_fast.cluster.batched import batched_kmeans
from ssl_fast.cluster.functions import kmeans_assign, kmeans_update
from ssl_fast.cluster.lloyd import Iteration, KMeansResult
from ssl_fast.cluster.neighbors import knn
from ssl_fast.cluster.parallel import distributed_kmeans

if TYPE_CHECKING:
    from ssl_fast.cluster.kmeans import KMeans
    from ssl_fast.cluster.minibatch import MiniBatchKMeans

__all__ = [
    "Iteration",
    "KMeans",
    "KMeansResult",
    "MiniBatchKMeans",
    "batched_kmeans",
    "distributed_kmeans",
    "kmeans_assign",
    "kmeans_update",
    "knn",
]

_ESTIMATORS = {"KMeans": "kmeans", "MiniBatchKMeans": "minibatch"}


def __getattr__(name: str) -> Any:
    if name not in _ESTIMATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        module = importlib.import_module(f"ssl_fast.cluster.{_ESTIMATORS[name]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "sklearn":
            raise
        raise ImportError(
            f"ssl_fast.cluster.{name} needs scikit-learn: pip install ssl_fast[sklearn]"
        ) from error
    found = globals()[name] = getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
