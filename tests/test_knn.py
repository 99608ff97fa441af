"""knn against all distances in float64."""

from __future__ import annotations

import pytest
import torch

from ssl_fast.cluster import knn


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_knn_is_the_smallest_distances(features, dtype, metric, lead):
    x, y = features(*lead, 9, 5, dtype=dtype), features(*lead, 30, 5, dtype=dtype)
    distances, indices = knn(x, y, 4, metric=metric)
    u, v = x.double(), y.double()
    if metric == "cosine":
        u, v = (torch.nn.functional.normalize(t, dim=-1) for t in (u, v))
    exact = (u.unsqueeze(-2) - v.unsqueeze(-3)).square().sum(-1)
    expected = exact.sort(dim=-1).values[..., :4]
    assert indices.dtype is torch.int64
    assert indices.shape == distances.shape == (*lead, 9, 4)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(exact.gather(-1, indices), expected, rtol=1e-5, atol=1e-6)


def test_equal_distances_are_in_the_order_of_their_indices():
    y = torch.tensor([[1.0], [-1.0], [3.0], [1.0]])
    distances, indices = knn(torch.zeros(1, 1), y, 3)
    assert indices.tolist() == [[0, 1, 3]]
    assert distances.tolist() == [[1.0, 1.0, 1.0]]


def test_a_zero_row_under_cosine():
    distances, _ = knn(torch.zeros(1, 2), torch.eye(2), 2, metric="cosine")
    assert distances.tolist() == [[1.0, 1.0]]


def test_the_neighbours_of_scikit_learn(features):
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y = features(50, 8, dtype=torch.float64), features(200, 8, dtype=torch.float64)
    distances, indices = knn(x, y, 5)
    model = neighbors.NearestNeighbors(n_neighbors=5, algorithm="brute").fit(y.numpy())
    expected, nearest = model.kneighbors(x.numpy())
    assert (indices.numpy() == nearest).all()
    torch.testing.assert_close(distances.sqrt(), torch.from_numpy(expected))


X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((X, X, 5), {}, ValueError, "k must be at most the number of rows of y, 4; got 5"),
        ((X, X, 0), {}, ValueError, "k must be at least 1"),
        ((X, X, 1.0), {}, TypeError, "k must be an integer"),
        ((X, torch.ones(4, 2), 1), {}, ValueError, "y must have as many columns as x"),
        ((X, X.double(), 1), {}, TypeError, "y must have the dtype of x"),
        ((X, X, 1), {"metric": "l1"}, ValueError, "metric must be one of"),
        ((X * torch.nan, X, 1), {}, ValueError, "x must be finite"),
        ((X, X * torch.nan, 1), {}, ValueError, "y must be finite"),
        ((X[0], X, 1), {}, ValueError, "x must have shape"),
    ],
)
def test_knn_refuses(arguments, options, error, words):
    with pytest.raises(error, match=words):
        knn(*arguments, **options)
