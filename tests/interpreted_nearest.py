"""Triton's nearest, centroid_update and top_k in Triton's interpreter, against float64.

Run as interpreted_pair_softmax.py is. The inputs and what is asked of the results are those of
test_nearest.py, test_centroid_update.py and test_top_k.py, at sizes that an interpreter can walk.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

import test_centroid_update as of_update
import test_nearest as of_nearest
import test_top_k as of_top_k
from plain_clusters import all_distances, strided_views

from ssl_fast.backends.triton import centroid_update as triton_update
from ssl_fast.backends.triton import nearest as triton_nearest
from ssl_fast.backends.triton import top_k as triton_top_k

# numpy warns where a GPU says nothing: inf - inf and 0 * inf are results here
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 18, 35, 17), (1, 33, 16, 40)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["", "scaled-ragged"])
def test_nearest(features, shape, given, dtype, poisoned_memory):
    arguments = of_nearest.problems(features, shape, dtype, given, given)
    labels, squared = triton_nearest.nearest(*arguments, True)
    of_nearest.assert_right((labels, squared), arguments)
    alone, nothing = triton_nearest.nearest(*arguments, False)
    assert torch.equal(alone, labels)
    assert nothing.shape == (shape[0], 0)


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 0, 3, 4)], ids=str)
def test_empty(features, shape, dtype):
    arguments = of_nearest.problems(features, shape, dtype)
    results = triton_nearest.lloyd(*arguments[:4], None, None, True)
    assert [x.shape for x in results[:2]] == [shape[:2]] * 2
    assert torch.equal(results[2], torch.zeros(shape[0], 3, 4).double())
    assert torch.equal(results[3], torch.zeros(shape[0], 3).double())
    squared, indices = triton_top_k.top_k(*arguments[:4], 2)
    assert squared.shape == indices.shape == (*shape[:2], 2)


def test_ties_go_to_the_lowest(dtype):
    x, y = (torch.randint(-2, 3, (2, size, 3)).to(dtype) for size in (20, 20))
    y = torch.cat([y, y], dim=1)
    exact, order = all_distances(x, y).sort(dim=2, stable=True)
    labels, squared = triton_nearest.nearest(x, y, None, None, None, True)
    assert torch.equal(labels, order[..., 0])
    assert torch.equal(squared.double(), exact[..., 0])
    for k in (1, 5):
        squared, indices = triton_top_k.top_k(x, y, None, None, k)
        assert torch.equal(indices, order[..., :k])
        assert torch.equal(squared.double(), exact[..., :k])


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_near_ties(features, half, size):
    """Pairs of centroids one step of the format apart in one place."""
    base = (features(1, 12, 5).clamp(-1, 1) * size).to(half)
    twin = base.clone()
    bits = twin.view(torch.int16)
    bits[:, :, 2] = bits[:, :, 2] + 1
    far = base.clone()
    far[..., 1] = torch.tensor(1.5 * size).to(half)
    arguments = [torch.cat([base, far], 1), torch.cat([twin, base], 1), None, None, None]
    of_nearest.assert_right(triton_nearest.nearest(*arguments, True), arguments)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_every_row_in_doubt(features, half, monkeypatch):
    """With an error that makes all rows doubtful, each is scored again, and only within its length.

    More rows than programs, so that a program has several.
    """
    arguments = of_nearest.problems(features, (3, 20, 18, 20), half, True, True)
    monkeypatch.setattr(triton_nearest, "_score_error", lambda *_: 1e6)
    of_nearest.assert_right(triton_nearest.nearest(*arguments, True), arguments)


def test_far_from_the_origin(features):
    arguments = of_nearest.problems(features, (2, 20, 35, 9))
    offset = torch.randn(1, 1, 9) * 1e4
    arguments[:2] = [x * 4 + offset for x in arguments[:2]]
    of_nearest.assert_right(triton_nearest.nearest(*arguments, True), arguments)
    of_top_k.assert_right(triton_top_k.top_k(*arguments[:4], 2), arguments[:4], 2)
    arguments[2:4] = [torch.full((2, 20), 0.5), torch.full((2, 35), 0.5)]
    of_nearest.assert_right(triton_nearest.nearest(*arguments, True), arguments)


def test_not_finite(features, dtype):
    arguments = of_nearest.problems(features, (2, 20, 18, 8), dtype)
    clean = triton_nearest.nearest(*arguments, True)
    arguments[0] = arguments[0].clone()
    arguments[0][0, 3, 2] = torch.nan
    arguments[0][1, 5, 7] = torch.inf
    labels, squared = triton_nearest.nearest(*arguments, True)
    assert labels[0, 3] == 0
    assert squared[0, 3].isnan()
    assert squared[1, 5] == torch.inf
    others = torch.ones(2, 20, dtype=torch.bool)
    others[0, 3] = others[1, 5] = False
    assert torch.equal(labels[others], clean[0][others])
    assert torch.equal(squared[others], clean[1][others])
    arguments[0] = arguments[0].nan_to_num(0.0, 0.0, 0.0)
    for value in (torch.nan, torch.inf):
        arguments[1] = arguments[1].clone()
        arguments[1][:, [0, 17], 3] = value
        of_nearest.assert_right(triton_nearest.nearest(*arguments, True), arguments)
    squared, indices = triton_top_k.top_k(*arguments[:4], 18)
    assert torch.equal(indices[..., 16:], torch.tensor([0, 17]).expand(2, 20, 2))
    assert squared[..., :16].isfinite().all()


def test_layouts(features, dtype):
    """Neighbours in memory are NaN: they would show."""
    shape = (2, 17, 19, 5)
    x, y, *scales, _ = of_nearest.problems(features, shape, dtype, scales=True)
    weight, lengths = torch.rand(2, 17), torch.tensor([17, 9])
    expected = triton_nearest.lloyd(x, y, *scales, weight, lengths, True)
    spread = [value.repeat_interleave(2, dim=1)[:, ::2] for value in (*scales, weight)]
    views = zip(strided_views(x), strided_views(y), strict=True)
    for other_x, other_y in views:
        out = triton_nearest.lloyd(other_x, other_y, *spread, lengths, True)
        assert all(map(torch.equal, out, expected))
    one = x[:1, :1].expand(2, 17, 5)
    arguments = [one, y, None, None, None]
    of_nearest.assert_right(triton_nearest.nearest(*arguments, True), arguments)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 33, 5, 17), (1, 200, 2, 3), (1, 7, 50, 130)], ids=str
)
@pytest.mark.parametrize("given", [False, True], ids=["", "scaled-weighted"])
@pytest.mark.parametrize("processors", [1, 32])
def test_centroid_update(features, shape, given, processors, dtype, monkeypatch, poisoned_memory):
    """One part of each cluster, and many."""
    monkeypatch.setattr(triton_update, "processor_count", lambda _: processors)
    arguments = of_update.cluster_arguments(features, shape, dtype, given, given)
    of_update.assert_right(triton_update.centroid_update(*arguments), arguments)


def test_labels_beyond_the_clusters_are_passed_over(features):
    arguments = of_update.cluster_arguments(features, (2, 20, 4, 3))
    expected = triton_update.centroid_update(*arguments)
    arguments[1] = torch.where(arguments[1] < 0, 4, arguments[1])
    assert all(map(torch.equal, triton_update.centroid_update(*arguments), expected))


@pytest.mark.parametrize(
    ("shape", "k"),
    [((1, 1, 1, 1), 1), ((2, 18, 35, 17), 3), ((1, 5, 40, 40), 20)],
    ids=str,
)
@pytest.mark.parametrize("scales", [False, True], ids=["", "scaled"])
def test_top_k(features, shape, k, scales, dtype, poisoned_memory):
    arguments = of_top_k.search_arguments(features, shape, dtype, scales)
    of_top_k.assert_right(triton_top_k.top_k(*arguments, k), arguments, k)


def test_same_bits_again(features):
    arguments = of_nearest.problems(features, (2, 20, 18, 20), torch.bfloat16, True, True)
    first, second = (
        (
            *triton_nearest.lloyd(*arguments[:4], None, arguments[4], True),
            *triton_top_k.top_k(arguments[1], arguments[1], None, None, 2),
        )
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
