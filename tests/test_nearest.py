"""The nearest centroid and the Lloyd step: every backend against distances written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import thread_counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_clusters import (
    all_distances,
    assert_near_distances,
    assert_near_labels,
    rows_with,
    scaled,
    strided_views,
)
from tolerances import assert_near

from ssl_fast.backends import dispatch
from ssl_fast.backends.reference import nearest as reference
from ssl_fast.backends.reference import pairs
from ssl_fast.ops.nearest import lloyd, nearest

# Around the widths of registers, tiles and blocks, and far below them. (B, N, K, D)
SHAPES = [
    (0, 5, 3, 4), (2, 0, 3, 4), (1, 1, 1, 1), (2, 1, 3, 5), (1, 5, 1, 2), (3, 13, 33, 1),
    (2, 33, 13, 31), (1, 97, 130, 64), (2, 130, 257, 96), (1, 300, 3, 130), (5, 7, 9, 17),
    (1, 64, 512, 16), (1, 257, 40, 33),
]  # fmt: skip
HALVES = [torch.bfloat16, torch.float16]


def module(name):
    return dispatch.load(name, "nearest")


def problems(features, shape, dtype=torch.float32, scales=False, ragged=False):
    """x, centroids, x_scale, centroid_scale, lengths; what lies in the padding is NaN."""
    batch, n, k, d = shape
    generator = torch.Generator().manual_seed(n * 1000 + k)
    x, centroids = features(batch, n, d, dtype=dtype), features(batch, k, d, dtype=dtype)
    x_scale = centroid_scale = lengths = None
    if scales:
        x_scale = torch.rand(batch, n, generator=generator) * 2
        x_scale[:, 1::7] = 0.0  # what a zero row under normalisation gives
        centroid_scale = torch.rand(batch, k, generator=generator) + 0.5
    if ragged:
        lengths = torch.randint(0, n + 1, (batch,), generator=generator)
        lengths[::3] = n
        lengths[1::3] = 0
        padding = torch.arange(n) >= lengths[:, None]
        x[padding] = torch.nan
        if scales:
            x_scale[padding] = torch.nan
    return [x, centroids, x_scale, centroid_scale, lengths]


def assert_right(found, arguments):
    """Labels that are float64's for 16 bits and fp32's for fp32, the padding's, the distances."""
    labels, squared = found
    x, centroids, x_scale, centroid_scale, lengths = arguments
    assert labels.shape == squared.shape == x.shape[:2]
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    if lengths is not None:
        padding = torch.arange(x.shape[1]) >= lengths[:, None]
    assert torch.all(labels[padding] == -1)
    assert torch.all(squared[padding] == 0.0)
    labels = torch.where(padding, 0, labels)
    x = torch.where(padding.unsqueeze(2), centroids[:, :1], x)
    if x_scale is not None:
        x_scale = torch.where(padding, centroid_scale[:, :1], x_scale)
    scales = x_scale, centroid_scale
    exact = all_distances(x, centroids, *scales)
    kept = ~padding
    if x.dtype in HALVES:
        assert torch.equal(labels[kept], exact.argmin(2)[kept])
    assert_near_labels(torch.where(padding, exact.argmin(2), labels), exact)
    assert_near_distances(squared, labels, x, centroids, *scales)


@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
@pytest.mark.parametrize("scales", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_labels_and_distances(backend, features, shape, scales, ragged, dtype):
    arguments = problems(features, shape, dtype, scales, ragged)
    found = module(backend).nearest(*arguments, True)
    assert found[1].dtype is torch.float32
    assert_right(found, arguments)
    labels, nothing = module(backend).nearest(*arguments, False)
    assert torch.equal(labels, found[0])
    assert nothing.shape == (shape[0], 0)


@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("scales", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lloyd_is_both_steps(backend, features, shape, scales, weighted, ragged, dtype):
    arguments = problems(features, shape, dtype, scales, ragged)
    weight = None
    if weighted:
        weight = torch.rand(shape[:2])
        weight[:, 2::5] = 0.0
    labels, squared, sums, counts = module(backend).lloyd(
        *arguments[:4], weight, arguments[4], True
    )
    alone = module(backend).nearest(*arguments, True)
    assert torch.equal(labels, alone[0])
    assert torch.equal(squared, alone[1])
    update = dispatch.load("reference", "centroid_update").centroid_update
    exact = update(arguments[0], labels, arguments[2], weight, shape[2])
    assert sums.dtype is counts.dtype is torch.float64
    rounded = torch.float32 if scales or weighted else torch.float64
    assert_near(sums, exact[0], rounded, what="sums")
    assert_near(counts, exact[1], torch.float64, what="counts")
    without = module(backend).lloyd(*arguments[:4], weight, arguments[4], False)
    assert without[1].shape == (shape[0], 0)
    assert all(torch.equal(without[i], x) for i, x in ((0, labels), (2, sums), (3, counts)))


@pytest.mark.parametrize("depth", [1, 3, 16, 100])
def test_exact_ties_go_to_the_lowest(backend, dtype, depth):
    """Small integers, whose distances every dtype computes exactly, and centroids that repeat."""
    generator = torch.Generator().manual_seed(depth)
    x = torch.randint(-2, 3, (2, 150, depth), generator=generator).to(dtype)
    some = torch.randint(-2, 3, (2, 60, depth), generator=generator).to(dtype)
    centroids = torch.cat([some, some[:, torch.randperm(60, generator=generator)]], dim=1)
    arguments = [x, centroids, None, None, None]
    labels, squared = module(backend).nearest(*arguments, True)
    exact = all_distances(x, centroids)
    assert torch.equal(labels, exact.argmin(2))
    assert torch.equal(squared.double(), exact.amin(2))


def test_repeated_centroids(backend, features, dtype):
    """Copies of one centroid are equally far at any rounding, wherever they stand in a tile."""
    arguments = problems(features, (1, 97, 5, 33), dtype)
    arguments[1] = arguments[1].repeat(1, 41, 1)
    labels, _ = module(backend).nearest(*arguments, True)
    assert torch.all(labels < 5)
    assert_right((labels, module(backend).nearest(*arguments, True)[1]), arguments)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e4, 1e15])
def test_near_ties_in_sixteen_bits(backend, features, half, size):
    """Pairs of centroids one step of the format apart in one place, rows about half way."""
    if half is torch.float16 and size not in (1.0, 1e4):
        pytest.skip("beyond fp16")
    batch, pair_count, d = 2, 40, 24
    base = (features(batch, pair_count, d).clamp(-1, 1) * size).to(half)
    twin = base.clone()
    place = torch.arange(pair_count) % d
    rows = torch.arange(pair_count)
    bits = twin.view(torch.int16)
    bits[:, rows, place] = bits[:, rows, place] + 1
    centroids = torch.stack([base, twin], dim=2).flatten(1, 2)[:, torch.randperm(2 * pair_count)]
    x = torch.cat([base, twin, (base.double() * 1.5).to(half)], dim=1)
    # a row that differs from the pair elsewhere leaves the gap a tiny part of the distance
    far = base.clone()
    far[:, rows, (place + 1) % d] = torch.tensor(1.5 * size).to(half)
    x = torch.cat([x, far], dim=1)
    arguments = [x, centroids, None, None, None]
    assert_right(module(backend).nearest(*arguments, True), arguments)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_large_and_small_norms(backend, features, dtype, size):
    arguments = problems(features, (2, 97, 65, 40), dtype)
    arguments[:2] = [(x.double() * size).to(dtype) for x in arguments[:2]]
    if dtype is torch.float16 and size > 1:
        arguments[:2] = [x.clamp(-3e4, 3e4) for x in arguments[:2]]
        assert arguments[0].abs().max() > 5e3
    assert_right(module(backend).nearest(*arguments, True), arguments)


@pytest.mark.parametrize("scale", [False, True])
def test_data_far_from_the_origin(backend, features, scale):
    arguments = problems(features, (2, 130, 67, 24))
    offset = torch.randn(1, 1, 24) * 1e4
    arguments[:2] = [x * 4 + offset for x in arguments[:2]]
    if scale:
        arguments[2:4] = [torch.full((2, 130), 0.5), torch.full((2, 67), 0.5)]
    assert_right(module(backend).nearest(*arguments, True), arguments)


def test_rows_that_are_centroids(backend, features, dtype):
    """A distance that vanishes is 0, not the rounding of a difference of large squares."""
    arguments = problems(features, (2, 50, 50, 33), dtype)
    arguments[1] = arguments[0].clone()
    arguments[2] = arguments[3] = torch.rand(2, 50) + 0.5
    labels, squared = module(backend).nearest(*arguments, True)
    assert torch.equal(labels, torch.arange(50).expand(2, 50))
    assert torch.all(squared == 0.0)


@pytest.mark.parametrize("shape", [(3, 13, 33, 31), (2, 97, 40, 64)], ids=str)
def test_layouts(backend, features, shape, dtype):
    x, centroids, *scales, _ = problems(features, shape, dtype, scales=True)
    weight, lengths = torch.rand(shape[:2]), torch.tensor([5, 13, 0])[: shape[0]]
    expected = module(backend).lloyd(x, centroids, *scales, weight, lengths, True)
    spread = [value.repeat_interleave(2, dim=1)[:, ::2] for value in (*scales, weight)]
    other_lengths = lengths.repeat_interleave(2)[::2]
    for other_x, other_c in zip(strided_views(x), strided_views(centroids), strict=True):
        out = module(backend).lloyd(other_x, other_c, *spread, other_lengths, True)
        for a, b in zip(out, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_expanded(backend, features, dtype):
    """One problem's rows against many centroids, all rows one row, all columns one column."""
    x, centroids = features(1, 1, 33, dtype=dtype), features(4, 50, 1, dtype=dtype)
    for one, many in (
        (x.expand(4, 20, 33), centroids.expand(4, 50, 33)),
        (features(1, 20, 33, dtype=dtype).expand(4, 20, 33), features(4, 9, 33, dtype=dtype)),
    ):
        arguments = [one, many, None, None, None]
        found = module(backend).nearest(*arguments, True)
        assert_right(found, arguments)
        copied = module(backend).nearest(*(y.contiguous() for y in arguments[:2]), *[None] * 3, 1)
        assert torch.equal(found[0], copied[0])


def test_not_finite_rows(backend, features, dtype):
    arguments = problems(features, (2, 40, 21, 8), dtype)
    clean = module(backend).nearest(*arguments, True)
    arguments[0] = arguments[0].clone()
    arguments[0][0, 3, 2] = torch.nan
    arguments[0][1, 5, 7] = torch.inf
    arguments[0][1, 6, 0] = -torch.inf
    labels, squared = module(backend).nearest(*arguments, True)
    assert labels[0, 3] == 0
    assert squared[0, 3].isnan()
    assert torch.all(squared[1, 5:7] == torch.inf)
    assert torch.all((labels >= 0) & (labels < 21))
    others = torch.ones(2, 40, dtype=torch.bool)
    others[0, 3] = others[1, 5] = others[1, 6] = False
    assert torch.equal(labels[others], clean[0][others])
    assert torch.equal(squared[others], clean[1][others])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_centroids(backend, features, dtype, value):
    """Nobody's nearest, the first of them neither; alone they are all there is."""
    arguments = problems(features, (2, 40, 21, 8), dtype)
    arguments[1] = arguments[1].clone()
    for place in (0, 7, 20):
        arguments[1][:, place, 3] = value
    assert_right(module(backend).nearest(*arguments, True), arguments)
    arguments[1] = torch.full_like(arguments[1], torch.nan)
    labels, squared = module(backend).nearest(*arguments, True)
    assert torch.all(labels == 0)
    assert torch.all(squared.isnan())


def test_a_row_scale_of_zero_is_a_row_at_the_origin(backend, features, dtype):
    arguments = problems(features, (2, 20, 30, 9), dtype)
    arguments[2] = torch.zeros(2, 20)
    labels, squared = module(backend).nearest(*arguments, True)
    smallest = scaled(arguments[1]).square().sum(2)
    assert torch.equal(
        rows_with(labels, smallest[:, None].expand(2, 20, 30)),
        labels * 0.0 + smallest.amin(1)[:, None],
    )
    assert_near_distances(squared, labels, arguments[0], arguments[1], arguments[2])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_is_written(backend, features, shape, dtype):
    arguments = problems(features, shape, dtype, scales=True, ragged=True)
    labels, squared, sums, counts = module(backend).lloyd(*arguments[:4], None, arguments[4], True)
    assert torch.all((labels >= -1) & (labels < shape[2]))
    assert not any(x.isnan().any() for x in (squared, sums, counts))
    assert_right((labels, squared), arguments)


@pytest.mark.parametrize("shape", [(1, 700, 513, 40), (7, 90, 65, 8)], ids=str)
def test_bits_do_not_depend_on_threads_or_repetition(backend, features, dtype, shape):
    arguments = problems(features, shape, dtype, scales=True, ragged=shape[0] > 1)
    weight = torch.rand(shape[:2])
    results = []
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        out = module(backend).lloyd(*arguments[:4], weight, arguments[4], True)
        results.append((*out, *module(backend).nearest(*arguments, True)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_problem_does_not_depend_on_its_neighbours(backend, features, dtype):
    arguments = problems(features, (5, 33, 20, 17), dtype, scales=True, ragged=True)
    labels, squared = module(backend).nearest(*arguments, True)
    for b in range(5):
        one = module(backend).nearest(*(x[b : b + 1] for x in arguments), True)
        assert torch.equal(one[0], labels[b : b + 1])
        torch.testing.assert_close(one[1], squared[b : b + 1])


def test_reference_does_not_depend_on_its_chunks(features, monkeypatch):
    arguments = problems(features, (3, 31, 97, 33), scales=True, ragged=True)
    weight = torch.rand(3, 31)
    whole = reference.lloyd(*arguments[:4], weight, arguments[4], True)
    for size in (5 * 130, 40 * 130):
        monkeypatch.setattr(pairs, "CHUNK_BYTES", size * 8)
        chunked = reference.lloyd(*arguments[:4], weight, arguments[4], True)
        torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=1e-13)


def test_reference_in_float64(features):
    x, centroids = features(2, 60, 9, dtype=torch.float64), features(2, 31, 9, dtype=torch.float64)
    for offset in (0.0, 1e8):
        arguments = [x + offset, centroids + offset, None, None, None]
        labels, squared = reference.nearest(*arguments, True)
        exact = all_distances(*arguments[:2])
        assert torch.equal(labels, exact.argmin(2))
        torch.testing.assert_close(squared, exact.amin(2))


@pytest.mark.parametrize("name", ["nearest", "lloyd"])
def test_opcheck(backend, features, dtype, name):
    operator = getattr(torch.ops.ssl_fast, name).default
    for options in itertools.product([False, True], repeat=2):
        x, centroids, *scales, lengths = problems(features, (2, 7, 5, 3), dtype, *options)
        weight = (torch.rand(2, 7),) if name == "lloyd" else ()
        previous = torch.zeros(2, 7, dtype=torch.int64)
        hints = ((None, 1), (previous, 2)) if name == "lloyd" else ((),)
        for distances, hint in itertools.product([False, True], hints):
            given_ = (x, centroids, *scales, *weight, lengths, distances, *hint)
            torch.library.opcheck(operator, given_, {"backend": backend})


def test_the_op_in_torch(backend, features):
    """Inputs may ask for a gradient, which no result has; torch.compile takes it whole."""
    x, centroids, *_ = problems(features, (2, 7, 5, 3))
    x.requires_grad_()
    options = {"weight": torch.rand(2, 7), "lengths": torch.tensor([7, 3]), "backend": backend}
    expected = lloyd(x, centroids, **options)
    assert not any(value.requires_grad for value in expected)
    torch._dynamo.reset()
    compiled = torch.compile(lloyd, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, centroids, **options), expected, strict=True):
        assert torch.equal(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lloyd(x, centroids, **options)[0], expected[0])


WRONG = {
    "x must be a floating tensor": {"x": torch.zeros(7, 3)},
    "x must be": {"x": torch.zeros(2, 7, 3, dtype=torch.int64)},
    "centroids must be three-dimensional": {"centroids": torch.zeros(2, 0, 3)},
    "centroids must be a torch.float32": {"centroids": torch.zeros(2, 5, 4)},
    "centroids must be a torch.float32 tensor of shape": {"centroids": torch.zeros(1, 5, 3)},
    "got a torch.float16": {"centroids": torch.zeros(2, 5, 3).half()},
    "x_scale must be": {"x_scale": torch.ones(2, 6)},
    "x_scale must be a torch.float32": {"x_scale": torch.ones(2, 7).double()},
    "centroid_scale must be": {"centroid_scale": torch.ones(5)},
    "lengths must be a torch.int64": {"lengths": torch.tensor([1, 2], dtype=torch.int32)},
    "lengths must be": {"lengths": torch.tensor([1, 2, 3])},
    "weight must be": {"weight": torch.ones(2, 7).half()},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(backend, message):
    arguments = {"x": torch.zeros(2, 7, 3), "centroids": torch.zeros(2, 5, 3)} | WRONG[message]
    with pytest.raises(ValueError, match=message):
        lloyd(**arguments, backend=backend)
    if "weight" not in arguments:
        with pytest.raises(ValueError, match=message):
            nearest(**arguments, backend=backend)


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(0, 4),
    n=st.integers(0, 70),
    k=st.integers(1, 140),
    d=st.integers(1, 70),
    scales=st.booleans(),
    ragged=st.booleans(),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_nearest(backend, features, batch, n, k, d, scales, ragged, kind):
    arguments = problems(features, (batch, n, k, d), kind, scales, ragged)
    assert_right(module(backend).nearest(*arguments, True), arguments)
    labels, _, sums, counts = module(backend).lloyd(*arguments[:4], None, arguments[4], False)
    update = dispatch.load("reference", "centroid_update").centroid_update
    exact = update(arguments[0], labels, arguments[2], None, k)
    assert_near(sums, exact[0], torch.float32 if scales else torch.float64, what="sums")
    assert torch.equal(counts, exact[1])
