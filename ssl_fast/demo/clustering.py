"""The train images clustered without labels: ssl_fast's k-means beside scikit-learn's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssl_fast import cluster
from ssl_fast.demo.data import CLASSES
from ssl_fast.demo.extras import require
from ssl_fast.demo.scaling import OURS, alternate

PIXELS, EMBEDDINGS = "raw pixels", "embeddings"
THEIRS = "scikit-learn"
# Of single starts in the embeddings, half end 2 to 9 % above the least inertia (16 of 30 seen); of
# tens, one in twelve did.
STARTS = 10
ROUNDS = 3


@dataclass(frozen=True)
class Fit:
    """What k-means reached, and in how long."""

    rand: float  # adjusted Rand index against the digits
    information: float  # normalised mutual information with the digits
    inertia: float
    iterations: int  # of the best start
    seconds: float  # of all starts


@dataclass(frozen=True)
class Clustering:
    """The same images clustered by ssl_fast and by scikit-learn, from the same starts."""

    fits: dict[str, Fit]  # keys: OURS and THEIRS
    labels: Tensor  # [N] int64, ssl_fast's
    agreement: float  # the share of images with the same label from both


@dataclass(frozen=True)
class Portrait:
    """One cluster, as it is drawn."""

    image: Tensor  # [8, 8], the mean of its images
    digit: int  # the most frequent one; the lowest where several are
    purity: float  # the share of that digit, in (0, 1]


def compare(x: Tensor, digits: Tensor, seed: int) -> Clustering:
    """Cluster x [N, D] on both sides, and score what they find against digits [N]."""
    options: dict[str, Any] = {"n_clusters": CLASSES, "n_init": STARTS, "random_state": seed}
    models: dict[str, Any] = {
        OURS: cluster.KMeans(**options),
        THEIRS: require("sklearn.cluster").KMeans(**options),
    }
    rows = x.numpy()
    seconds = alternate({side: partial(model.fit, rows) for side, model in models.items()}, ROUNDS)
    metrics: Any = require("sklearn.metrics")
    truth = digits.numpy()
    fits = {
        side: Fit(
            float(metrics.adjusted_rand_score(truth, model.labels_)),
            float(metrics.normalized_mutual_info_score(truth, model.labels_)),
            float(model.inertia_),
            int(model.n_iter_),
            seconds[side],
        )
        for side, model in models.items()
    }
    agreement = float((models[OURS].labels_ == models[THEIRS].labels_).mean())
    return Clustering(fits, torch.as_tensor(models[OURS].labels_, dtype=torch.int64), agreement)


def portraits(images: Tensor, labels: Tensor, digits: Tensor) -> list[Portrait]:
    """A portrait of each cluster that has images [N, 1, 8, 8], in the order of their digits."""
    means, _ = cluster.kmeans_update(images.flatten(1), labels, CLASSES)  # [K, 64]
    tally = torch.bincount(labels * CLASSES + digits, minlength=CLASSES * CLASSES)
    tally = tally.view(CLASSES, CLASSES)  # [K, digits]
    found = [
        Portrait(mean.view(images.shape[2:]), int(counts.argmax()), float(counts.max() / total))
        for mean, counts, total in zip(means, tally, tally.sum(1), strict=True)
        if total > 0
    ]
    return sorted(found, key=lambda portrait: (portrait.digit, -portrait.purity))
