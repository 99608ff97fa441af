"""Triton's pair_softmax in Triton's interpreter, against a formula in float64.

test_triton_pair_softmax.py runs the interpreted_*.py files in a process that has TRITON_INTERPRET=1
from the start: Triton reads it when a kernel is decorated, and compiling and interpreting don't mix
in one process. The interpreter's tiles are 16 wide, so that a few dozen rows make several tiles,
chunks and tails.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from tolerances import assert_near

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

from triton_checks import (
    IGNORED_ID,
    arguments,
    check_expectation,
    check_loss,
    check_sweep,
    check_symmetric,
    exact_loss,
    wide,
)

from ssl_fast.backends.triton import pair_softmax as triton_backend

# numpy warns where a GPU says nothing: log(0) and inf - inf are results here
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [(5, 7, 3), (1, 1, 1), (33, 50, 17), (50, 20, 40), (16, 64, 16), (2, 1, 70)]
HALVES = [torch.float16, torch.bfloat16]
RULES = ["none", "diagonals", "ids", "both"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sweep(features, shape, rule, poisoned_memory):
    check_sweep(arguments(features, shape, rule, torch.float32), torch.float32)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sweep_in_sixteen_bits(features, shape, dtype, poisoned_memory):
    check_sweep(arguments(features, shape, "both", dtype), dtype)


@pytest.mark.parametrize("need", list(itertools.product([True, False], repeat=2)), ids=str)
def test_only_what_is_needed(features, need):
    given = arguments(features, (20, 33, 5), "diagonals", torch.float32)
    check_sweep(given, torch.float32, columns=False)
    row_lse, _, column_lse, _ = triton_backend.pair_softmax(*given, True)
    grads = [torch.ones(20), torch.ones(33), torch.ones(20)]
    full = triton_backend.pair_softmax_backward(*given, row_lse, column_lse, *grads, True, True)
    part = triton_backend.pair_softmax_backward(*given, row_lse, column_lse, *grads, *need)
    for asked, whole, some in zip(need, full[:2], part[:2], strict=True):
        assert torch.equal(some, whole) if asked else some.shape == (0,)
    assert torch.equal(full[2], part[2])
    assert torch.equal(full[3], part[3])


@pytest.mark.parametrize("diagonal", [0, 3, -2, 49, -32, 50, -33], ids=str)
def test_diagonal_in_and_out_of_the_pairs(features, diagonal, poisoned_memory):
    given = arguments(features, (33, 50, 17), "ids", torch.float32)
    check_sweep([*given[:-1], [diagonal, 1]], torch.float32)
    check_sweep([*given[:-1], [diagonal]], torch.float32, columns=False)


def test_diagonal_reads_its_own_pairs_alone(features):
    """NaN in a key that no row has on the diagonal stays out of every other gradient."""
    query, key = features(20, 8), features(30, 8)
    key[25:] = torch.nan
    ids = torch.arange(20), torch.arange(100, 130)
    ids[1][25:] = IGNORED_ID
    given = (query, key, torch.ones(20), torch.ones(30), *ids, [0])
    row_lse, _, _, diagonal_logit = triton_backend.pair_softmax(*given, False)
    assert row_lse.isfinite().all()
    assert diagonal_logit.isfinite().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expectation(features, shape, rule, poisoned_memory):
    check_expectation(arguments(features, shape, rule, torch.float32), torch.float32)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_expectation_in_sixteen_bits(features, shape, dtype, poisoned_memory):
    check_expectation(arguments(features, shape, "both", dtype), dtype)


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "all"])
@pytest.mark.parametrize(
    ("n", "pairs"), [(1, 0), (2, 1), (16, 8), (33, 0), (54, 27), (50, 0)], ids=str
)
def test_symmetric(features, n, pairs, ids, dtype, poisoned_memory):
    """Gradients of both signs come in, and some scales are 0."""
    given = arguments(features, (n, n, 19), "ids", dtype)
    check_symmetric(given[0], torch.tensor(3.0), given[2], given[4] if ids else None, pairs, dtype)


def test_symmetric_with_scale_zero(features):
    given = features(40, 8), torch.tensor(0.0), torch.rand(40)
    check_symmetric(*given, None, 20, torch.float32)


@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("shape", [(5, 5, 3), (1, 1, 4), (33, 50, 20)], ids=str)
def test_loss_in_batch(features, shape, normalize, dtype, poisoned_memory):
    n, m, d = shape
    given = [features(n, d, dtype=dtype), None, features(m, d, dtype=dtype), torch.tensor(10.0)]
    check_loss([*given, None, None, [0], normalize], dtype)


@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("ids", [True, False], ids=["ids", "all"])
def test_loss_with_positives(features, ids, normalize, dtype, poisoned_memory):
    query, positive = (features(30, 9, dtype=dtype) for _ in range(2))
    key = features(21, 9, dtype=dtype)
    rules = [torch.arange(30) % 5, torch.arange(21) % 7] if ids else [None, None]
    check_loss([query, positive, key, torch.tensor(5.0), *rules, [], normalize], dtype)


@pytest.mark.parametrize("needed", [("query",), ("positive",), ("key",), ("query", "key")], ids=str)
def test_loss_gives_what_is_needed(features, needed):
    query, positive, key = features(18, 9), features(18, 9), features(25, 9)
    given = [query, positive, key, torch.tensor(5.0), None, None, [], True]
    check_loss(given, torch.float32, names=needed)
    nothing = triton_backend.pair_softmax_loss(*given, False, False, False)
    assert [x.shape for x in nothing[4:]] == [(0,)] * 4


@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("n", [1, 2, 8, 27])
def test_symmetric_loss(features, n, normalize, dtype, poisoned_memory):
    rows, scale = features(2 * n, 19, dtype=dtype), torch.tensor(4.0)
    (x,) = wide(rows)
    per_row = scale.double().expand(2 * n).clone().requires_grad_()
    exact = exact_loss(x, x.roll(n, 0), x, per_row, None, None, [0, n, -n], normalize)
    expected = torch.autograd.grad(exact[0].sum(), [x, per_row])
    out = triton_backend.pair_softmax_symmetric_loss(rows, scale, normalize, True)
    names = ("loss", "row_lse", "positive_logit", "row_max")
    for name, y, e in zip(names, out[:4], exact, strict=True):
        assert_near(y, e, torch.float32, what=name)
    assert out[4].dtype is dtype
    assert_near(out[4], expected[0], dtype, what="grad_features")
    assert_near(out[5], expected[1], dtype, what="grad_scale")
    loss, *_, grad_features, grad_scale = triton_backend.pair_softmax_symmetric_loss(
        rows, scale, normalize, False
    )
    assert torch.equal(loss, out[0])
    assert grad_features.shape == grad_scale.shape == (0,)
