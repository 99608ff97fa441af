"""Other packages' calls, each made for the version that is installed."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.workloads import Loss

CCE, LIGER = "cut-cross-entropy", "liger-kernel"
FLASH, FAST = "flash-kmeans", "fastkmeans"
MODULES = {
    CCE: "cut_cross_entropy",
    LIGER: "liger_kernel",
    FLASH: "flash_kmeans",
    FAST: "fastkmeans",
}
# A loss of rows against classes: (rows [N, D], classes [M, D], labels [N]).
ClassLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def installed(name: str) -> bool:
    return importlib.util.find_spec(MODULES[name]) is not None


def versions() -> dict[str, str | None]:
    """The version of each peer, None where it is not installed."""
    from importlib.metadata import version

    return {name: version(name) if installed(name) else None for name in MODULES}


def plain_class_loss(rows: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """What the fused ones compute: the tests hold the formulas around them against it."""
    return F.cross_entropy(rows @ classes.T, labels)


def cut_cross_entropy() -> ClassLoss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(rows: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
        # Its filter drops the gradients of probabilities below 2^-12: those of a batch are that
        # small, and with it there would be no gradient but the positives'.
        found: Tensor = linear_cross_entropy(rows, classes, labels, filter_eps=None)
        return found

    return loss


def liger() -> ClassLoss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()

    def loss(rows: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = fused(classes, rows, labels)
        return found

    return loss


def _labels(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device)


def info_nce_by(loss: ClassLoss, temperature: float) -> Loss:
    """InfoNCE as a classification whose classes are the keys."""

    def call(query: Tensor, key: Tensor) -> Tensor:
        rows = F.normalize(query, dim=1) / temperature
        return loss(rows, F.normalize(key, dim=1), _labels(query))

    return call


def clip_by(loss: ClassLoss) -> Loss:
    """Both directions: the classification called twice."""

    def call(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        labels = _labels(image)
        # A scale in fp32 leaves the features' dtype as it is.
        one, other = loss(scale * image, text, labels), loss(scale * text, image, labels)
        return (one + other) / 2

    return call


def _accepted(function: Callable[..., Any], **named: Any) -> dict[str, Any]:
    """Those of the arguments that this version has."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in named.items() if name in names}


def flash_assign(x: Tensor, centroids: Tensor) -> Callable[[], Tensor]:
    """Labels [B, N]; the rows' squared norms, which older versions want, are made beforehand."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    squares = {"x_sq": x.float().square().sum(-1)}
    given = _accepted(euclid_assign_triton, **squares)
    return lambda: euclid_assign_triton(x, centroids, **given)


def flash_iteration(x: Tensor, centroids: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Labels and the new centroids of one iteration over x [1, N, D]."""
    from flash_kmeans import triton_centroid_update_sorted_euclid as update

    assign = flash_assign(x, centroids)

    def step() -> tuple[Tensor, Tensor]:
        labels = assign()
        return labels, update(x, labels, centroids)

    return step


def fast_iteration(x: Tensor, n_clusters: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Labels and centroids of one iteration over x [N, D] from rows that it draws itself.

    Called below its class, which takes a host array and would measure the copy.
    """
    from fastkmeans.kmeans import _kmeans_torch_double_chunked as iterate

    squares = x.float().square().sum(1)
    given = _accepted(
        iterate, device=x.device, dtype=x.dtype, max_iters=1, tol=-1.0,
        max_points_per_centroid=None, use_triton=x.is_cuda,
    )  # fmt: skip

    def step() -> tuple[Tensor, Tensor]:
        centroids, labels = iterate(x, squares, n_clusters, **given)
        return labels.to(x.device), centroids.to(x.device)

    return step
