"""How good features are: a linear probe, a nearest-neighbour vote, and a map to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_fast.demo.data import CLASSES
from ssl_fast.demo.encoder import Encoder, features_of
from ssl_fast.demo.extras import require

if TYPE_CHECKING:
    from ssl_fast.demo.data import Digits

NEIGHBOURS = 5


@dataclass(frozen=True)
class Scores:
    """Accuracies on the test images, in [0, 1]."""

    probe: float  # linear probe, a few labels of each class
    neighbours: float  # k nearest neighbours, the same labels


def few_labels(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Indices of ``per_class`` random images of each class: all the labels a probe may see."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for value in range(CLASSES):
        members = (labels == value).nonzero().squeeze(1)
        order = torch.randperm(members.numel(), generator=generator)
        chosen.append(members[order[:per_class]])
    return torch.cat(chosen)


def score(encoder: Encoder, digits: Digits, labelled: Tensor) -> Scores:
    """Fit both classifiers on frozen features of the ``labelled`` train images; test them."""
    train = features_of(encoder, digits.train_images[labelled])
    test = features_of(encoder, digits.test_images)
    return score_features(train, digits.train_labels[labelled], test, digits.test_labels)


def score_features(
    train: Tensor,  # [N, F]
    train_labels: Tensor,  # [N]
    test: Tensor,  # [T, F]
    test_labels: Tensor,  # [T]
) -> Scores:
    """Accuracy of a logistic regression and of a k-nearest-neighbour vote."""
    linear: Any = require("sklearn.linear_model")
    neighbors: Any = require("sklearn.neighbors")
    pipeline: Any = require("sklearn.pipeline")
    preprocessing: Any = require("sklearn.preprocessing")
    probe = pipeline.make_pipeline(
        preprocessing.StandardScaler(), linear.LogisticRegression(max_iter=2000)
    )
    probe.fit(train.numpy(), train_labels.numpy())
    vote = neighbors.KNeighborsClassifier(NEIGHBOURS, metric="cosine")
    vote.fit(train.numpy(), train_labels.numpy())
    return Scores(
        float(probe.score(test.numpy(), test_labels.numpy())),
        float(vote.score(test.numpy(), test_labels.numpy())),
    )


def map_to_plane(features: Tensor, seed: int) -> Tensor:
    """A t-SNE map [N, 2] of features [N, F], compared by cosine as the loss does."""
    manifold: Any = require("sklearn.manifold")
    directions = F.normalize(features, dim=1).numpy()
    plane = manifold.TSNE(2, init="pca", perplexity=30, random_state=seed).fit_transform(directions)
    return torch.as_tensor(plane)
