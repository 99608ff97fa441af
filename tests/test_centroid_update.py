"""The sums of each cluster's rows: every backend against a product with the labels' one-hot."""

from __future__ import annotations

import pytest
import torch
from conftest import thread_counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_clusters import scaled, strided_views
from tolerances import assert_near

from ssl_fast.backends import dispatch
from ssl_fast.backends.reference import centroid_update as reference
from ssl_fast.backends.reference import pairs
from ssl_fast.ops.centroid_update import centroid_update

# (B, N, K, D)
SHAPES = [
    (0, 5, 3, 4), (2, 0, 3, 4), (1, 1, 1, 1), (2, 1, 3, 5), (1, 50, 1, 2), (3, 13, 33, 1),
    (2, 33, 13, 31), (1, 970, 130, 64), (2, 130, 257, 96), (1, 300, 3, 130), (1, 40, 5000, 3),
    (9, 64, 4, 16),
]  # fmt: skip


def module(name):
    return dispatch.load(name, "centroid_update")


def cluster_arguments(features, shape, dtype=torch.float32, scales=False, weighted=False):
    """x, labels, x_scale, weight, n_clusters; rows that take no part hold NaN."""
    batch, n, k, d = shape
    generator = torch.Generator().manual_seed(n * 1000 + k)
    x = features(batch, n, d, dtype=dtype)
    labels = torch.randint(0, k, (batch, n), generator=generator)
    labels[:, 3::5] = -1
    labels[:, 4::11] = -(2**40)
    x_scale = torch.rand(batch, n, generator=generator) * 2 if scales else None
    weight = None
    if weighted:
        weight = torch.rand(batch, n, generator=generator)
        weight[:, 2::7] = 0.0
    x[out_of_it(labels, weight)] = torch.nan
    return [x, labels, x_scale, weight, k]


def out_of_it(labels, weight):
    return labels < 0 if weight is None else (labels < 0) | (weight == 0.0)


def plain_update(x, labels, x_scale, weight, n_clusters):
    """The definition in float64."""
    out = out_of_it(labels, weight)
    u = torch.where(out.unsqueeze(2), 0.0, scaled(x, x_scale))
    w = torch.ones(labels.shape).double() if weight is None else weight.double()
    w = torch.where(out, 0.0, w)
    one_hot = (labels.unsqueeze(2) == torch.arange(n_clusters)).double() * w.unsqueeze(2)
    return one_hot.mT @ u, one_hot.sum(1)


def assert_right(found, arguments):
    sums, counts = found
    x, _, x_scale, weight, k = arguments
    assert sums.dtype is counts.dtype is torch.float64
    assert sums.shape == (x.shape[0], k, x.shape[2])
    exact_sums, exact_counts = plain_update(*arguments)
    # the products of scale, weight and row may be rounded to fp32, their sum not
    rounded = torch.float64 if x_scale is None and weight is None else torch.float32
    assert_near(sums, exact_sums, rounded, what="sums")
    assert_near(counts, exact_counts, torch.float64, what="counts")


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("scales", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_counts(backend, features, shape, scales, weighted, dtype):
    arguments = cluster_arguments(features, shape, dtype, scales, weighted)
    assert_right(module(backend).centroid_update(*arguments), arguments)


def test_sums_keep_small_rows(backend):
    """A million's worth of rows beside ones that fp32 sums would lose."""
    x = torch.full((1, 20000, 2), 1e-4)
    x[:, ::2] = 1e6
    labels = torch.zeros(1, 20000, dtype=torch.int64)
    arguments = [x, labels, None, None, 1]
    assert_right(module(backend).centroid_update(*arguments), arguments)


def test_one_cluster_takes_all(backend, features, dtype):
    arguments = cluster_arguments(features, (2, 3000, 70, 20), dtype)
    arguments[1] = torch.full((2, 3000), 69)
    arguments[0] = features(2, 3000, 20, dtype=dtype)
    assert_right(module(backend).centroid_update(*arguments), arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite_rows_reach_their_cluster_alone(backend, features, dtype, value):
    arguments = cluster_arguments(features, (2, 40, 6, 8), dtype)
    arguments[0][0, 0, 2] = value
    clean = arguments[0].nan_to_num(0.0, 0.0, 0.0)
    sums, counts = module(backend).centroid_update(*arguments)
    expected, _ = module(backend).centroid_update(clean, *arguments[1:])
    place = (0, int(arguments[1][0, 0]), 2)
    torch.testing.assert_close(sums[place].item(), value, equal_nan=True)
    sums[place] = expected[place]
    assert torch.equal(sums, expected)
    assert counts.isfinite().all()


@pytest.mark.parametrize("value", [6, 7, 2**40])
def test_a_label_beyond_the_clusters(backend, features, value):
    arguments = cluster_arguments(features, (2, 40, 6, 8))
    arguments[1][1, 17] = value
    with pytest.raises(ValueError, match=rf"labels.*n_clusters.*{value}"):
        module(backend).centroid_update(*arguments)


def test_layouts(backend, features, dtype):
    arguments = cluster_arguments(features, (3, 33, 13, 31), dtype, True, True)
    x, *vectors, k = arguments
    x.nan_to_num_()
    expected = module(backend).centroid_update(*arguments)
    spread = [value.repeat_interleave(2, dim=1)[:, ::2] for value in vectors]
    for other in strided_views(x):
        for a, b in zip(module(backend).centroid_update(other, *spread, k), expected, strict=True):
            torch.testing.assert_close(a, b)
    turned = [value.mT.contiguous().mT for value in vectors]
    torch.testing.assert_close(module(backend).centroid_update(x, *turned, k), expected)


def test_expanded(backend, features, dtype):
    x, labels, *_, k = cluster_arguments(features, (1, 33, 13, 31), dtype)
    x.nan_to_num_()
    ones = torch.ones(1).expand(4, 33)
    arguments = [x.expand(4, 33, 31), labels.expand(4, 33), ones, ones, k]
    assert_right(module(backend).centroid_update(*arguments), arguments)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_is_written(backend, features, shape, dtype):
    arguments = cluster_arguments(features, shape, dtype, True, True)
    assert not any(x.isnan().any() for x in module(backend).centroid_update(*arguments))


@pytest.mark.parametrize("shape", [(1, 3000, 513, 40), (7, 90, 5, 8), (1, 5000, 2, 3)], ids=str)
def test_bits_do_not_depend_on_threads_or_repetition(backend, features, dtype, shape):
    arguments = cluster_arguments(features, shape, dtype, True, True)
    results = []
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        results.append(module(backend).centroid_update(*arguments))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_reference_does_not_depend_on_its_chunks(features, monkeypatch):
    arguments = cluster_arguments(features, (3, 31, 9, 33), scales=True, weighted=True)
    whole = reference.centroid_update(*arguments)
    for size in (5 * 33, 40 * 33):
        monkeypatch.setattr(pairs, "CHUNK_BYTES", size * 8)
        assert all(map(torch.equal, reference.centroid_update(*arguments), whole))


def test_opcheck(backend, features, dtype):
    for options in ((False, False), (True, True)):
        arguments = cluster_arguments(features, (2, 7, 5, 3), dtype, *options)
        operator = torch.ops.ssl_fast.centroid_update.default
        torch.library.opcheck(operator, tuple(arguments), {"backend": backend})


def test_the_op_in_torch(backend, features):
    x, labels, *_, k = cluster_arguments(features, (2, 7, 5, 3))
    x.requires_grad_()
    expected = centroid_update(x, labels, k, backend=backend)
    assert not any(value.requires_grad for value in expected)
    torch._dynamo.reset()
    compiled = torch.compile(centroid_update, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(x, labels, k, backend=backend), expected))


WRONG = {
    "x must be a floating tensor": {"x": torch.zeros(7, 3)},
    "labels must be a torch.int64": {"labels": torch.zeros(2, 7)},
    "labels must be": {"labels": torch.zeros(2, 6, dtype=torch.int64)},
    "n_clusters must be at least 1": {"n_clusters": 0},
    "x_scale must be": {"x_scale": torch.ones(7)},
    "weight must be a torch.float32": {"weight": torch.ones(2, 7).double()},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(backend, message):
    arguments = {
        "x": torch.zeros(2, 7, 3),
        "labels": torch.zeros(2, 7, dtype=torch.int64),
        "n_clusters": 4,
    }
    with pytest.raises(ValueError, match=message):
        centroid_update(**arguments | WRONG[message], backend=backend)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(0, 4),
    n=st.integers(0, 200),
    k=st.integers(1, 140),
    d=st.integers(1, 70),
    scales=st.booleans(),
    weighted=st.booleans(),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_centroid_update(backend, features, batch, n, k, d, scales, weighted, kind):
    arguments = cluster_arguments(features, (batch, n, k, d), kind, scales, weighted)
    assert_right(module(backend).centroid_update(*arguments), arguments)
