"""The op and its gradient: every backend against the reference in float64."""

from __future__ import annotations

import itertools

import plain as plainly
import pytest
import torch
from conftest import thread_counts
from tolerances import assert_near

from ssl_fast.backends import dispatch
from ssl_fast.backends.reference import pair_softmax as reference
from ssl_fast.ops.pair_softmax import pair_softmax

# Around the widths of registers, tiles and blocks, and far below them. (N, M, D)
SHAPES = [
    (0, 0, 3), (0, 5, 3), (5, 0, 3), (1, 1, 1), (1, 2, 5), (2, 1, 13), (3, 5, 2), (5, 3, 1),
    (13, 33, 31), (33, 13, 97), (31, 97, 33), (97, 130, 64), (130, 257, 128), (257, 130, 5),
    (1, 300, 130), (300, 1, 2), (64, 512, 16),
]  # fmt: skip
RULES = ["none", "diagonals", "ids", "both"]


def sweep_arguments(features, shape, rule, dtype=torch.float32):
    """query, key, their scales, ids, diagonals."""
    n, m, d = shape
    generator = torch.Generator().manual_seed(n * 1000 + m)
    scales = [torch.rand(size, generator=generator) * 4 for size in (n, m)]
    for scale in scales:
        scale[1::7] = 0.0  # what a zero row under normalisation gives
    ids = [torch.randint(-3, 4, (size,), generator=generator) for size in (n, m)]
    query_ids, key_ids = ids if rule in ("ids", "both") else (None, None)
    diagonals = [0, 2, -3, m + n] if rule in ("diagonals", "both") else []
    query, key = features(n, d, dtype=dtype), features(m, d, dtype=dtype)
    return [query, key, *scales, query_ids, key_ids, diagonals]


def widened(arguments):
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments
    ]


def module(name):
    return dispatch.load(name, "pair_softmax")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(backend, features, shape, rule, dtype):
    arguments = sweep_arguments(features, shape, rule, dtype)
    exact = reference.pair_softmax(*widened(arguments), True)
    plain = reference.pair_softmax(*arguments, True)
    out = module(backend).pair_softmax(*arguments, True)
    for name, x, e, p in zip(("row_lse", "row_max", "column_lse"), out, exact, plain, strict=True):
        assert x.dtype is torch.float32
        assert_near(x, e, torch.float32, plain=p, what=name)
    without_columns = module(backend).pair_softmax(*arguments, False)
    assert without_columns[2].shape == (0,)
    assert torch.equal(without_columns[0], out[0])


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(backend, features, shape, rule, columns, dtype):
    arguments = sweep_arguments(features, shape, rule, dtype)
    wide = widened(arguments)
    row_lse, _, column_lse = reference.pair_softmax(*wide, True)
    row_grad, column_grad = torch.randn_like(row_lse), torch.randn_like(column_lse)
    if not columns:
        column_lse = column_grad = None
    saved = (row_lse, column_lse, row_grad, column_grad)
    exact = reference.pair_softmax_backward(*wide, *saved, True, True)
    narrow = [None if x is None else x.float() for x in saved]
    weights = [row_grad.float()] + ([column_grad.float()] if columns else [])
    plain = plainly.gradients(
        lambda *inputs: plainly.pair_softmax(*inputs, *arguments[4:]), arguments[:4], weights
    )
    out = module(backend).pair_softmax_backward(*arguments, *narrow, True, True)
    names = ("grad_query", "grad_key", "grad_query_scale", "grad_key_scale")
    for name, x, e, p in zip(names, out, exact, plain, strict=True):
        assert x.dtype is (torch.float32 if "scale" in name else dtype)
        assert_near(x, e, dtype, plain=p, what=name)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)), ids=str)
def test_backward_makes_what_is_needed(backend, features, needs):
    arguments = sweep_arguments(features, (13, 33, 31), "both")
    row_lse = module(backend).pair_softmax(*arguments, False)[0]
    saved = (row_lse, None, torch.ones_like(row_lse), None)
    whole = module(backend).pair_softmax_backward(*arguments, *saved, True, True)
    out = module(backend).pair_softmax_backward(*arguments, *saved, *needs)
    for grad, expected, need in zip(out[:2], whole[:2], needs, strict=True):
        assert grad.shape == (expected.shape if need else (0,))
        if need:
            torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(out[2:], whole[2:])


def test_reference_backward_is_the_derivative_of_its_forward(features):
    arguments = widened(sweep_arguments(features, (7, 9, 4), "both"))
    arguments[2:4] = [scale + 0.1 for scale in arguments[2:4]]
    inputs = [x.requires_grad_() for x in arguments[:4]]
    row_lse, _, column_lse = reference.pair_softmax(*arguments, True)
    row_grad, column_grad = torch.randn_like(row_lse), torch.randn_like(column_lse)
    total = (row_grad * row_lse).sum() + (column_grad * column_lse).sum()
    expected = torch.autograd.grad(total, inputs)
    found = reference.pair_softmax_backward(
        *arguments, row_lse, column_lse, row_grad, column_grad, True, True
    )
    torch.testing.assert_close(found, expected)


def test_reference_does_not_depend_on_its_chunks(features, monkeypatch):
    arguments = widened(sweep_arguments(features, (31, 97, 33), "both"))
    whole = reference.pair_softmax(*arguments, True)
    saved = (whole[0], whole[2], torch.ones(31).double(), torch.ones(97).double())
    gradients = reference.pair_softmax_backward(*arguments, *saved, True, True)
    monkeypatch.setattr(reference, "CHUNK_BYTES", 5 * 97 * 8)
    torch.testing.assert_close(reference.pair_softmax(*arguments, True), whole)
    chunked = reference.pair_softmax_backward(*arguments, *saved, True, True)
    torch.testing.assert_close(chunked, gradients)


def test_rows_that_keep_nothing(backend, features, dtype):
    arguments = sweep_arguments(features, (33, 40, 8), "none", dtype)
    arguments[4:6] = [torch.arange(33) % 2, torch.zeros(40, dtype=torch.int64)]
    row_lse, row_max, column_lse = module(backend).pair_softmax(*arguments, True)
    empty = torch.arange(33) % 2 == 0
    assert torch.all(row_lse[empty] == -torch.inf)
    assert torch.all(row_max[empty] == -torch.inf)
    assert torch.isfinite(row_lse[~empty]).all()
    grads = module(backend).pair_softmax_backward(
        *arguments, row_lse, column_lse, torch.ones(33), torch.ones(40), True, True
    )
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert torch.all(grads[0][empty] == 0.0)


def strided_views(x):
    """The same values in other layouts; the last one shifts the storage by one element."""
    n, d = x.shape
    every_other = torch.full((n, 2 * d), torch.nan, dtype=x.dtype)[:, ::2]
    padded = torch.full((n, d + 3), torch.nan, dtype=x.dtype)[:, 1 : d + 1]
    transposed = torch.empty(d, n, dtype=x.dtype).T
    shifted = torch.full((n * d + 1,), torch.nan, dtype=x.dtype)[1:].view(n, d)
    for view in (every_other, padded, transposed, shifted):
        view.copy_(x)
        yield view


@pytest.mark.parametrize("shape", [(13, 33, 31), (97, 40, 64)], ids=str)
def test_layouts(backend, features, shape, dtype):
    arguments = sweep_arguments(features, shape, "both", dtype)
    expected = module(backend).pair_softmax(*arguments, True)
    query, key, query_scale, key_scale, query_ids, key_ids, diagonals = arguments
    spread = [x.repeat_interleave(2)[::2] for x in (query_scale, key_scale, query_ids, key_ids)]
    for other_query, other_key in zip(strided_views(query), strided_views(key), strict=True):
        out = module(backend).pair_softmax(other_query, other_key, *spread, diagonals, True)
        torch.testing.assert_close(out, expected)
        saved = (expected[0], expected[2], torch.ones(shape[0]), torch.ones(shape[1]))
        torch.testing.assert_close(
            module(backend).pair_softmax_backward(
                other_query, other_key, *spread, diagonals, *saved, True, True
            ),
            module(backend).pair_softmax_backward(*arguments, *saved, True, True),
        )


def test_expanded_rows(backend, features, dtype):
    one_row = features(1, 33, dtype=dtype)
    query, key = one_row.expand(20, 33), one_row[:, :1].expand(50, 33)
    ones = [torch.ones(1).expand(size) for size in (20, 50)]
    out = module(backend).pair_softmax(query, key, *ones, None, None, [], True)
    copies = [x.contiguous() for x in (query, key, *ones)]
    expected = module(backend).pair_softmax(*copies, None, None, [], True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_features_propagate(backend, features, value):
    for in_query, rule in itertools.product((True, False), ("none", "both")):
        arguments = sweep_arguments(features, (33, 40, 8), rule)
        arguments[0 if in_query else 1][5, 3] = value
        expected = reference.pair_softmax(*arguments, True)
        out = module(backend).pair_softmax(*arguments, True)
        for name, x, e in zip(("row_lse", "row_max", "column_lse"), out, expected, strict=True):
            assert_near(x, e.double(), torch.float32, what=name)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_is_written(backend, features, shape, dtype):
    arguments = sweep_arguments(features, shape, "both", dtype)
    row_lse, row_max, column_lse = module(backend).pair_softmax(*arguments, True)
    saved = (row_lse, column_lse, torch.ones(shape[0]), torch.ones(shape[1]))
    grads = module(backend).pair_softmax_backward(*arguments, *saved, True, True)
    for result in (row_lse, row_max, column_lse, *grads):
        assert not torch.isnan(result).any()


def test_bits_do_not_depend_on_threads_or_repetition(features, dtype, backend):
    arguments = sweep_arguments(features, (300, 513, 40), "both", dtype)
    results = []
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        row_lse, row_max, column_lse = module(backend).pair_softmax(*arguments, True)
        saved = (row_lse, column_lse, torch.ones(300), torch.ones(513))
        grads = module(backend).pair_softmax_backward(*arguments, *saved, True, True)
        results.append((row_lse, row_max, column_lse, *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_of_the_op(features):
    inputs = [x.double().requires_grad_() for x in (features(5, 3), features(7, 3))]
    inputs += [torch.rand(size).double().add(0.5).requires_grad_() for size in (5, 7)]
    ids = [torch.tensor([0, 1, 2, 3, 4]), torch.tensor([9, 1, 1, 9, 2, 9, 9])]

    def lse(*values):
        found = pair_softmax(
            *values, query_ids=ids[0], key_ids=ids[1], diagonals=[0, -1], columns=True
        )
        return found.row_lse, found.column_lse

    assert torch.autograd.gradcheck(lse, inputs)
    assert torch.autograd.gradgradcheck(lse, inputs)


def test_gradients_of_the_op_reach_only_what_asks(backend, features):
    names = ("query", "key", "query_scale", "key_scale")
    values = (features(13, 5), features(40, 5), torch.rand(13), torch.rand(40))
    for asked in itertools.product([False, True], repeat=4):
        inputs = [x.clone().requires_grad_(ask) for x, ask in zip(values, asked, strict=True)]
        out = pair_softmax(*inputs, columns=True, backend=backend)
        assert out.row_lse.requires_grad is any(asked)
        assert not out.row_max.requires_grad
        if not any(asked):
            continue
        (out.row_lse.sum() + out.column_lse.sum()).backward()
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        wide = pair_softmax(*exact, columns=True)
        (wide.row_lse.sum() + wide.column_lse.sum()).backward()
        for name, x, e in zip(names, inputs, exact, strict=True):
            assert (x.grad is None) is (e.grad is None), name
            if e.grad is not None:
                assert_near(x.grad, e.grad, torch.float32, what=name)


@pytest.mark.parametrize("wrong", ["width", "dtype", "scale", "half scale", "wide scale", "ids"])
def test_native_reads_nothing_that_is_not_what_it_seems(features, wrong):
    """The operators can be called without the public functions' checks, and read by address."""
    query, key = features(6, 8), features(6, 8)
    one, ids = torch.ones(6), None
    arguments = {
        "width": (query, key[:, :3].contiguous(), one, one),
        "dtype": (query, key.bfloat16(), one, one),
        "scale": (query, key, one[:2], one),
        "half scale": (query, key, one.half(), one),
        "wide scale": (query, key, one, one.double()),
        "ids": (query, key, one, one),
    }[wrong]
    if wrong == "ids":
        ids = torch.arange(6, dtype=torch.int32)
    with pytest.raises(ValueError, match="must be a torch"):
        pair_softmax(*arguments, query_ids=ids, key_ids=ids, backend="native")
