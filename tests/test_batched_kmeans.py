"""batched_kmeans: its result, when it stops, empty clusters, inits, bits and memory."""

from __future__ import annotations

import pytest
import torch

from ssl_fast.backends.reference.sums import ordered_sum
from ssl_fast.cluster import batched_kmeans, kmeans_assign
from ssl_fast.cluster.init import INITS
from ssl_fast.cluster.plus_plus import draw, trials

POLICIES = ("relocate", "keep", "split")


@pytest.fixture
def blobs():
    """``blobs(problems, n, d, k)``: rows around k centers each, and the centers."""
    generator = torch.Generator().manual_seed(1)

    def make(*shape, k=5, dtype=torch.float32):
        *lead, n, d = shape
        centers = 10.0 * torch.randn(*lead, k, d, generator=generator)
        noise = torch.randn(*lead, n, d, generator=generator)
        return (centers[..., torch.arange(n) % k, :] + noise).to(dtype), centers.to(dtype)

    return make


def plain_lloyd(x, centroids, weight, max_iter, threshold):
    """Lloyd's iterations of one problem in float64."""
    x, centroids = x.double(), centroids.double()
    n_iter = 0
    while n_iter < max_iter:
        n_iter += 1
        labels = torch.cdist(x, centroids).argmin(1)
        onehot = torch.nn.functional.one_hot(labels, len(centroids)).double() * weight[:, None]
        new = onehot.T @ x / onehot.sum(0)[:, None]
        shift = (new - centroids).square().sum()
        centroids = new
        if shift <= threshold:
            break
    distances = torch.cdist(x, centroids).square()
    labels = distances.argmin(1)
    return labels, centroids, (distances.amin(1) * weight).sum(), n_iter


def assert_consistent(x, found, weight=None, lengths=None, metric="euclidean"):
    """Labels, inertia and counts are those of the centroids returned."""
    labels, distances = kmeans_assign(x, found.centroids, metric=metric)
    mass = torch.ones_like(distances) if weight is None else weight.clone()
    if lengths is not None:
        padding = torch.arange(x.shape[-2]) >= lengths[..., None]
        labels = labels.masked_fill(padding, -1)
        mass = mass.masked_fill(padding, 0.0)
    assert torch.equal(found.labels, labels)
    inertia = (distances.double() * mass).sum(-1)
    torch.testing.assert_close(found.inertia, inertia, rtol=1e-6, atol=1e-9)
    onehot = labels.unsqueeze(-1) == torch.arange(found.centroids.shape[-2])
    torch.testing.assert_close(found.counts, (onehot * mass.unsqueeze(-1)).sum(-2))
    assert found.centroids.isfinite().all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("max_iter", [1, 3, 300])
def test_the_iterations_are_lloyds(blobs, weighted, max_iter):
    x, _ = blobs(3, 200, 4)
    start = x[:, :5].clone()
    weight = torch.rand(3, 200) + 0.1 if weighted else None
    found = batched_kmeans(x, 5, init=start, max_iter=max_iter, sample_weight=weight)
    assert_consistent(x, found, weight)
    for b in range(3):
        threshold = 1e-4 * x[b].double().var(dim=0, correction=0).mean()
        mass = torch.ones(200, dtype=torch.float64) if weight is None else weight[b].double()
        expected = plain_lloyd(x[b], start[b], mass, max_iter, threshold)
        assert torch.equal(found.labels[b], expected[0])
        torch.testing.assert_close(found.centroids[b].double(), expected[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.inertia[b], expected[2], rtol=1e-5, atol=0.0)
        assert int(found.n_iter[b]) == expected[3]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_every_init_metric_and_dtype(blobs, dtype, init, metric):
    x, _ = blobs(2, 3, 60, 4, dtype=dtype)
    found = batched_kmeans(x, 5, init=init, metric=metric, max_iter=5)
    assert found.labels.shape == (2, 3, 60)
    assert found.centroids.shape == (2, 3, 5, 4)
    assert found.centroids.dtype is dtype
    assert found.inertia.shape == found.n_iter.shape == (2, 3)
    assert_consistent(x, found, metric=metric)
    if metric == "cosine":
        norms = found.centroids.double().norm(dim=-1)
        assert (norms - 1.0).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("init", ["k-means++", "k-means||"])
def test_seeding_finds_far_clusters(blobs, init):
    x, centers = blobs(2, 500, 3, k=8)
    x = x + 100.0 * centers.repeat_interleave(1, 1)[:, torch.arange(500) % 8]
    found = batched_kmeans(x, 8, init=init)
    assert torch.all(found.inertia < 500 * 3 * 2.0)


def test_greedy_seeding_is_as_good_as_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))

    def potential(centers):
        return float(torch.cdist(x, torch.as_tensor(centers)).amin(1).square().sum())

    ours, theirs = [], []
    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        caught = []

        def keep(step, caught=caught):
            caught.append(float(step.inertia))

        batched_kmeans(x, 50, max_iter=1, generator=generator, callback=keep)
        ours.append(caught[0])
        centers, _ = cluster.kmeans_plusplus(x.numpy(), 50, random_state=number)
        theirs.append(potential(centers))
    # The standard deviation between seeds is 1 %.
    assert abs(sum(ours) / sum(theirs) - 1.0) < 0.03


def test_seeding_without_room_for_distances(blobs, monkeypatch):
    from ssl_fast.ops import plus_plus

    x, _ = blobs(2, 400, 3, k=6)
    weight = torch.rand(2, 400)
    monkeypatch.setattr(plus_plus, "ROOM", 0)
    found = batched_kmeans(x, 6, sample_weight=weight, n_init=3)
    assert_consistent(x, found, weight)
    assert torch.all(found.inertia < 2.0 * 3 * weight.sum(-1))


def test_draws_follow_the_mass():
    mass = torch.tensor([[0.0, 1.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    drawn = draw(mass, 4000, torch.Generator().manual_seed(0), torch.tensor([4, 2]))
    counts = torch.bincount(drawn[0], minlength=4)
    assert counts[0] == counts[3] == 0
    assert abs(counts[1] / 4000 - 0.25) < 0.03
    assert drawn[1].tolist() == [1] * 4000
    assert trials(1024) == 8


def test_random_takes_each_row_once_and_by_weight(blobs):
    x, _ = blobs(2, 30, 2)
    weight = torch.ones(2, 30)
    weight[:, 10:] = 0.0
    found = batched_kmeans(x, 10, init="random", sample_weight=weight, max_iter=1, empty="keep")
    torch.testing.assert_close(found.counts, torch.ones(2, 10))


def test_ragged_problems_are_those_of_their_rows(blobs):
    x, _ = blobs(3, 90, 4)
    lengths = torch.tensor([90, 40, 5])
    padding = torch.arange(90) >= lengths[:, None]
    filled = x.masked_fill(padding[..., None], torch.nan)
    start = x[:, :5].clone()
    found = batched_kmeans(filled, 5, init=start, lengths=lengths)
    assert_consistent(x, found, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        alone = batched_kmeans(x[b, :length], 5, init=start[b])
        assert torch.equal(found.labels[b, :length], alone.labels)
        assert torch.equal(found.centroids[b], alone.centroids)
        assert found.inertia[b] == alone.inertia
        assert found.n_iter[b] == alone.n_iter
    for init in INITS:
        weight = torch.rand(3, 90).masked_fill(padding, torch.nan).nan_to_num(1.0)
        found = batched_kmeans(filled, 5, init=init, lengths=lengths, sample_weight=weight)
        assert_consistent(x, found, weight, lengths)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("empty", POLICIES)
def test_empty_clusters(blobs, dtype, empty, metric):
    x, _ = blobs(2, 100, 3, dtype=dtype)
    start = x[:, :4].clone()
    start[:, 2:] = -start[:, :1] * 3
    start[1, 2] = x[1, 2]
    found = batched_kmeans(x, 4, init=start, empty=empty, metric=metric)
    assert_consistent(x, found, metric=metric)
    if empty != "keep":
        assert torch.all(found.counts > 0)


def test_keep_leaves_the_centroid_where_it_is(blobs):
    x, _ = blobs(50, 3)
    start = torch.cat([x[:2], torch.full((1, 3), 1e3)])
    found = batched_kmeans(x, 3, init=start, empty="keep")
    assert torch.equal(found.centroids[2], start[2])
    assert found.counts[2] == 0.0


@pytest.mark.parametrize("empty", POLICIES)
def test_fewer_distinct_rows_than_clusters(empty):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(10, 1)
    for init in INITS:
        found = batched_kmeans(x, 5, init=init, empty=empty, max_iter=20)
        assert_consistent(x, found)
    assert found.counts.sum() == 20


def test_relocation_is_scikit_learns(blobs):
    cluster = pytest.importorskip("sklearn.cluster")
    x, _ = blobs(200, 3, dtype=torch.float64)
    start = torch.cat([x[:4], torch.full((1, 3), 1e3, dtype=torch.float64)])
    found = batched_kmeans(x, 5, init=start)
    model = cluster.KMeans(5, init=start.numpy(), n_init=1).fit(x.numpy())
    assert (found.labels.numpy() == model.labels_).all()
    assert float(found.inertia) == pytest.approx(model.inertia_, rel=1e-9)
    assert int(found.n_iter) == model.n_iter_


def test_more_starts_are_never_worse(blobs):
    x, _ = blobs(4, 80, 2, k=7)
    one = batched_kmeans(x, 7, init="random", generator=torch.Generator().manual_seed(0))
    many = batched_kmeans(x, 7, init="random", n_init=5, generator=torch.Generator().manual_seed(0))
    assert torch.all(many.inertia <= one.inertia)
    assert_consistent(x, many)


def test_a_callable_and_an_array_as_init(blobs):
    x, _ = blobs(2, 60, 3)

    def first(rows, n_clusters, generator):
        assert generator is None
        return rows[:, :n_clusters]

    found = batched_kmeans(x, 5, init=first)
    same = batched_kmeans(x, 5, init=x[:, :5].numpy())
    assert torch.equal(found.centroids, same.centroids)
    shared = batched_kmeans(x, 5, init=x[0, :5])
    assert torch.equal(shared.centroids[0], found.centroids[0])
    with pytest.raises(ValueError, match="init must return centroids of shape"):
        batched_kmeans(x, 5, init=lambda rows, *_, **__: rows)


def test_callbacks_see_every_iteration(blobs):
    x, _ = blobs(2, 200, 3)
    seen = []
    found = batched_kmeans(x, 5, init="random", callback=seen.append)
    assert [step.iteration for step in seen] == list(range(1, int(found.n_iter.max()) + 1))
    inertia = torch.stack([step.inertia for step in seen])
    longest = int(found.n_iter.argmax())
    assert torch.all(inertia[1:, longest] <= inertia[:-1, longest] * (1 + 1e-6))
    assert torch.equal(seen[-1].centroids, found.centroids)


@pytest.mark.parametrize("init", INITS)
def test_the_same_bits_for_any_number_of_threads(init):
    x = torch.randn(2, 3000, 24, generator=torch.Generator().manual_seed(3))
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(5)
        results.append(batched_kmeans(x, 20, init=init, max_iter=4, generator=generator))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_ordered_sum():
    for n in (0, 1, 1024, 1025, 5000, 1024 * 1024 + 3):
        values = torch.rand(2, n)
        torch.testing.assert_close(ordered_sum(values), values.double().sum(1))


def test_memory(tmp_path):
    """N = 300 000, D = 64: what a fit adds to data, labels and centroids."""
    import subprocess
    import sys

    code = """
import resource, torch
from ssl_fast.cluster import batched_kmeans
x = torch.randn(300_000, 64)
batched_kmeans(x[:2000], 64, max_iter=2)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
found = batched_kmeans(x, 64, init=x[:64].clone(), max_iter=3)
print(peak() - before - found.labels.numel() * 8 / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(done.stdout) < 16.0, done.stdout


X = torch.ones(6, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((X, 7), {}, ValueError, "n_clusters must be at most the number of rows, 6; got 7"),
        ((X, 0), {}, ValueError, "n_clusters must be at least 1"),
        ((torch.ones(0, 3), 1), {}, ValueError, "at most the number of rows, 0"),
        ((torch.ones(3), 1), {}, ValueError, "x must have shape"),
        ((X.long(), 1), {}, TypeError, "x must be float32"),
        ((X * torch.nan, 1), {}, ValueError, "x must be finite"),
        ((X * torch.inf, 1), {}, ValueError, "x must be finite"),
        ((X * torch.nan, 1), {"tol": 0.0}, ValueError, "x must be finite"),
        ((X * torch.inf, 1), {"tol": 0.0}, ValueError, "x must be finite"),
        ((X.abs() * torch.inf, 1), {"tol": 0.0}, ValueError, "x must be finite"),
        ((X, 2), {"init": "best"}, ValueError, "init must be one of"),
        ((X, 2), {"init": torch.ones(3, 3)}, ValueError, "init must have shape"),
        ((X, 2), {"init": X[:2] * torch.nan}, ValueError, "init must be finite"),
        ((X, 2), {"init": object()}, TypeError, "init must be one of"),
        ((X, 2), {"n_init": 0}, ValueError, "n_init must be at least 1"),
        ((X, 2), {"max_iter": 0}, ValueError, "max_iter must be at least 1"),
        ((X, 2), {"tol": -1.0}, ValueError, "tol must be finite and at least 0"),
        ((X, 2), {"tol": "small"}, TypeError, "tol must be a number"),
        ((X, 2), {"sample_weight": torch.ones(5)}, ValueError, "sample_weight must have a number"),
        ((X, 2), {"sample_weight": -torch.ones(6)}, ValueError, "not negative"),
        ((X, 2), {"metric": "l1"}, ValueError, "metric must be one of"),
        ((X, 2), {"empty": "drop"}, ValueError, "empty must be one of"),
        ((X, 2), {"lengths": torch.tensor([6])}, ValueError, "lengths must have the leading"),
        ((X[None], 2), {"lengths": torch.tensor([1])}, ValueError, "lengths must be from"),
        ((X[None], 2), {"lengths": torch.tensor([7])}, ValueError, "lengths must be from"),
        ((X[None], 2), {"lengths": [6]}, TypeError, "lengths must be an int64 tensor"),
        ((X, 2), {"generator": 0}, TypeError, "generator must be a torch.Generator"),
        ((X, 2), {"callback": 0}, TypeError, "callback must be callable"),
        ((X, 2), {"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_refuses(arguments, options, error, words):
    with pytest.raises(error, match=words):
        batched_kmeans(*arguments, **options)


def test_no_problems():
    found = batched_kmeans(torch.ones(0, 6, 3), 2)
    assert found.labels.shape == (0, 6)
    assert found.centroids.shape == (0, 2, 3)
