"""fit_batches and distributed_kmeans: the result of one fit on all rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run

from ssl_fast.cluster import batched_kmeans, distributed_kmeans


def rows(n=500, d=5, k=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    centers = 6.0 * torch.randn(k, d, generator=generator)
    return (centers[torch.arange(n) % k] + torch.randn(n, d, generator=generator)).to(dtype)


def falling_rows(n):
    """[n, 128] whose variance falls along the columns: most centroids are ruled out by a few."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 128, generator=generator) / torch.arange(1, 129)


class TestBatches:
    @pytest.fixture(autouse=True)
    def _estimators(self):
        pytest.importorskip("sklearn")

    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    @pytest.mark.parametrize("kind", ["numpy", "tensor", "loader"])
    def test_as_fit_on_the_concatenation(self, kind, metric):
        from ssl_fast.cluster import KMeans

        x = rows() + 3
        start = x[:6].clone()
        batches = list(x.split([7, 200, 1, 292]))
        if kind == "loader":
            dataset = torch.utils.data.TensorDataset(x)
            batches = torch.utils.data.DataLoader(dataset, batch_size=64)
        if kind == "numpy":
            x, start, batches = x.numpy(), start.numpy(), [b.numpy() for b in batches]
        model = KMeans(6, init=start, n_init=1, metric=metric)
        whole = model.fit(x)
        labels, centers = whole.labels_, whole.cluster_centers_
        inertia, n_iter = whole.inertia_, whole.n_iter_
        parts = KMeans(6, init=start, n_init=1, metric=metric).fit_batches(batches)
        assert (parts.labels_ == labels).all()
        assert type(parts.cluster_centers_) is type(centers)
        np.testing.assert_allclose(parts.cluster_centers_, centers, rtol=1e-5, atol=1e-6)
        assert parts.inertia_ == pytest.approx(inertia, rel=1e-6)
        assert parts.n_iter_ == n_iter
        assert parts.n_features_in_ == 5
        assert (parts.predict(x) == labels).all()

    def test_an_empty_cluster_gets_the_farthest_row(self):
        from ssl_fast.cluster import KMeans

        x = rows()
        start = torch.cat([x[:5], torch.full((1, 5), 1e3)])
        whole = KMeans(6, init=start, n_init=1).fit(x)
        parts = KMeans(6, init=start, n_init=1).fit_batches(x.split(90))
        assert torch.equal(parts.labels_, whole.labels_)
        assert parts.n_iter_ == whole.n_iter_

    @pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
    def test_inits_by_name(self, init, capsys):
        from ssl_fast.cluster import KMeans

        x = rows(3000)
        seen = []
        model = KMeans(6, init=init, n_init=5, random_state=0, verbose=1, callback=seen.append)
        model.fit_batches(x.split(256))
        # Rows at random can leave two centers in one blob, whatever the number of starts.
        assert init == "random" or model.inertia_ < 3000 * 5 * 1.1
        assert len(seen) >= model.n_iter_
        assert "KMeans 1/5" in capsys.readouterr().err
        again = KMeans(6, init=init, n_init=5, random_state=0).fit_batches(x.split(256))
        assert torch.equal(again.cluster_centers_, model.cluster_centers_)

    def test_a_sample_of_all_rows_starts_as_fit_does(self):
        from ssl_fast.cluster import KMeans

        x = rows(384)
        for init in ("k-means++", "random"):
            whole = KMeans(6, init=init, random_state=2).fit(x)
            starts = 1 if init == "k-means++" else 10
            parts = KMeans(6, init=init, n_init=starts, random_state=2).fit_batches(x.split(50))
            assert parts.inertia_ <= whole.inertia_ * (1 + 1e-5)

    def test_the_reservoir_is_uniform(self):
        from ssl_fast.cluster.streaming import _refill

        state = np.random.RandomState(0)
        counts = torch.zeros(50)
        for _ in range(400):
            kept = torch.zeros(10, 1)
            seen = 0
            for part in torch.arange(50.0)[:, None].split([3, 20, 27]):
                _refill(kept, part, seen, state)
                seen += len(part)
            counts += torch.bincount(kept[:, 0].long(), minlength=50)
        # 80 each, with a standard deviation of 8.
        assert counts.min() > 45
        assert counts.max() < 115
        assert counts.sum() == 4000

    @pytest.mark.parametrize("shuffled", [False, True], ids=["", "shuffled"])
    def test_labels_of_the_pass_before(self, shuffled):
        """Of large batches they may make the next pass faster, also where they are others' rows."""
        from ssl_fast.cluster import KMeans

        x = falling_rows(18000)
        model = KMeans(170, init=x[:170].clone(), n_init=1, max_iter=4, tol=0.0)
        whole = model.fit(x)
        labels, centers = whole.labels_, whole.cluster_centers_
        batches = list(x.split([8800, 8900, 300]))

        class Reordered(list):
            def __iter__(self):
                if shuffled:
                    self.append(self.pop(0))
                return super().__iter__()

        parts = model.fit_batches(Reordered(batches))
        np.testing.assert_allclose(parts.cluster_centers_, centers, rtol=1e-5, atol=1e-6)
        if not shuffled:
            assert torch.equal(parts.labels_, labels)

    def test_refuses(self):
        from ssl_fast.cluster import KMeans

        x = rows(20)
        model = KMeans(3, random_state=0)
        with pytest.raises(TypeError, match="iterable again and again"):
            model.fit_batches(iter([x]))
        with pytest.raises(ValueError, match="at least one batch"):
            model.fit_batches([])
        with pytest.raises(ValueError, match="batches must all be like the first"):
            model.fit_batches([x, x[:, :3]])
        with pytest.raises(ValueError, match="n_samples=2 should be >= n_clusters=3"):
            model.fit_batches([x[:1], x[1:2]])
        with pytest.raises(ValueError, match="contains NaN"):
            model.fit_batches([x, x * torch.nan])
        assert not hasattr(model, "n_features_in_")

        class Shrinking(list):
            def __iter__(self):
                yield from [self.pop()]

        with pytest.raises(RuntimeError, match="rows in the first pass"):
            model.fit_batches(Shrinking([x[:5], x]))


def _as_one(rank, world_size):
    x = rows()
    weight = torch.rand(500, generator=torch.Generator().manual_seed(1))
    mine = slice(0, 120) if rank == 0 else slice(120, 500)
    start = x[:6].clone()
    far = torch.cat([x[:4], torch.full((2, 5), 1e3)])
    for options in (
        {"init": start},
        {"init": start, "max_iter": 1},
        {"init": start, "metric": "cosine"},
        {"init": far},
        {"init": far, "empty": "split"},
        {"init": far, "empty": "keep"},
    ):
        one = batched_kmeans(x, 6, sample_weight=weight, **options)
        # The first process's centroids are everyone's.
        given = dict(options, init=options["init"] * (1 if rank == 0 else 2))
        kept = given["init"].clone()
        found = distributed_kmeans(x[mine], 6, sample_weight=weight[mine], **given)
        assert torch.equal(given["init"], kept)
        assert torch.equal(found.labels, one.labels[mine]), options
        torch.testing.assert_close(found.centroids, one.centroids)
        torch.testing.assert_close(found.counts, one.counts)
        torch.testing.assert_close(found.inertia, one.inertia, rtol=1e-6, atol=0.0)
        assert int(found.n_iter) == int(one.n_iter), options

    # One process without rows.
    found = distributed_kmeans(x if rank else x[:0], 6, init=start)
    one = batched_kmeans(x, 6, init=start)
    assert torch.equal(found.labels, one.labels if rank else one.labels[:0])

    for init in ("k-means++", "k-means||", "random"):
        generator = torch.Generator().manual_seed(rank)
        found = distributed_kmeans(x[mine], 6, init=init, generator=generator)
        both = [torch.empty_like(found.centroids) for _ in range(world_size)]
        dist.all_gather(both, found.centroids)
        assert torch.equal(both[0], both[1])
        assert found.counts.sum() == 500

    x = falling_rows(18000)
    mine = slice(0, 9500) if rank == 0 else slice(9500, 18000)
    options = {"init": x[:170].clone(), "max_iter": 4, "tol": 0.0}
    one, found = batched_kmeans(x, 170, **options), distributed_kmeans(x[mine], 170, **options)
    assert torch.equal(found.labels, one.labels[mine])
    torch.testing.assert_close(found.centroids, one.centroids)

    with pytest.raises(ValueError, match="at most the number of all rows, 4"):
        distributed_kmeans(x[:2], 5)


def _one_has_nan(rank, world_size):
    x = rows(20)
    if rank == 1:
        x[7, 2] = torch.nan
    with pytest.raises(ValueError, match="x must be finite; it" if rank == 1 else "of another"):
        distributed_kmeans(x, 3)
    # the group is still in step
    assert int(distributed_kmeans(rows(20), 3, init=rows(3)).counts.sum()) == 40


def test_no_process_waits_for_one_whose_rows_are_refused():
    run(_one_has_nan, 2)


def test_two_processes_are_as_one():
    run(_as_one, 2)


def test_distributed_refuses_without_a_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed_kmeans(rows(), 3)
    with pytest.raises(ValueError, match=r"x must have shape \[N, D\]"):
        distributed_kmeans(rows()[None], 3)
