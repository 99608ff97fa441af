"""The op and its gradient: every backend against the reference in float64."""

from __future__ import annotations

import itertools

import plain as plainly
import pytest
import torch
from conftest import thread_counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_near

from ssl_fast.backends import dispatch
from ssl_fast.backends.reference import pair_softmax as reference
from ssl_fast.backends.reference import pairs
from ssl_fast.ops.pair_softmax import IGNORED_ID, pair_softmax

# Around the widths of registers, tiles and blocks, and far below them. (N, M, D)
SHAPES = [
    (0, 0, 3), (0, 5, 3), (5, 0, 3), (1, 1, 1), (1, 2, 5), (2, 1, 13), (3, 5, 2), (5, 3, 1),
    (13, 33, 31), (33, 13, 97), (31, 97, 33), (97, 130, 64), (130, 257, 128), (257, 130, 5),
    (1, 300, 130), (300, 1, 2), (64, 512, 16),
]  # fmt: skip
RULES = ["none", "diagonals", "ids", "both"]
NAMES = ("row_lse", "row_max", "column_lse", "diagonal_logit")
GRADIENTS = ("grad_query", "grad_key", "grad_query_scale", "grad_key_scale")


def sweep_arguments(features, shape, rule, dtype=torch.float32):
    """query, key, their scales, ids, diagonals."""
    n, m, d = shape
    generator = torch.Generator().manual_seed(n * 1000 + m)
    scales = [torch.rand(size, generator=generator) * 4 for size in (n, m)]
    for scale in scales:
        scale[1::7] = 0.0  # what a zero row under normalisation gives
    ids = [torch.randint(-3, 4, (size,), generator=generator) for size in (n, m)]
    for some in ids:
        some[2::5] = IGNORED_ID
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
    for name, x, e, p in zip(NAMES, out, exact, plain, strict=True):
        assert x.dtype is torch.float32
        assert_near(x, e, torch.float32, plain=p, what=name)
    without_columns = module(backend).pair_softmax(*arguments, False)
    assert without_columns[2].shape == (0,)
    assert_near(without_columns[0], exact[0], torch.float32, plain=plain[0])
    torch.testing.assert_close(without_columns[3], out[3])


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(backend, features, shape, rule, columns, dtype):
    arguments = sweep_arguments(features, shape, rule, dtype)
    wide = widened(arguments)
    row_lse, _, column_lse, logit = reference.pair_softmax(*wide, True)
    row_grad, column_grad = torch.randn_like(row_lse), torch.randn_like(column_lse)
    diagonal_grad = torch.randn_like(logit) if arguments[6] else None
    if not columns:
        column_lse = column_grad = None
    saved = (row_lse, column_lse, row_grad, column_grad, diagonal_grad)
    exact = reference.pair_softmax_backward(*wide, *saved, True, True)
    narrow = [None if x is None else x.float() for x in saved]
    weights = [row_grad.float()] + ([column_grad.float()] if columns else [])
    weights += [] if diagonal_grad is None else [diagonal_grad.float()]

    def results(*inputs):
        row, column = plainly.pair_softmax(*inputs, *arguments[4:])
        found = (row, column) if columns else (row,)
        if diagonal_grad is not None:
            found += (plainly.diagonal_logit(*inputs, arguments[6][0]),)
        return found

    plain = plainly.gradients(results, arguments[:4], weights)
    out = module(backend).pair_softmax_backward(*arguments, *narrow, True, True)
    for name, x, e, p in zip(GRADIENTS, out, exact, plain, strict=True):
        assert x.dtype is (torch.float32 if "scale" in name else dtype)
        assert_near(x, e, dtype, plain=p, what=name)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)), ids=str)
def test_backward_makes_what_is_needed(backend, features, needs):
    arguments = sweep_arguments(features, (13, 33, 31), "both")
    row_lse = module(backend).pair_softmax(*arguments, False)[0]
    saved = (row_lse, None, torch.ones_like(row_lse), None, torch.ones_like(row_lse))
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
    row_lse, _, column_lse, logit = reference.pair_softmax(*arguments, True)
    grads = [torch.randn_like(x) for x in (row_lse, column_lse, logit)]
    total = sum((g * x).sum() for g, x in zip(grads, (row_lse, column_lse, logit), strict=True))
    expected = torch.autograd.grad(total, inputs)
    found = reference.pair_softmax_backward(*arguments, row_lse, column_lse, *grads, True, True)
    torch.testing.assert_close(found, expected)


def test_reference_does_not_depend_on_its_chunks(features, monkeypatch):
    arguments = widened(sweep_arguments(features, (31, 97, 33), "both"))
    whole = reference.pair_softmax(*arguments, True)
    ones = torch.ones(97).double()
    saved = (whole[0], whole[2], ones[:31], ones, ones[:31])
    gradients = reference.pair_softmax_backward(*arguments, *saved, True, True)
    expected_keys = reference.pair_softmax_expectation(*arguments)
    monkeypatch.setattr(pairs, "CHUNK_BYTES", 5 * 97 * 8)
    torch.testing.assert_close(reference.pair_softmax(*arguments, True), whole)
    chunked = reference.pair_softmax_backward(*arguments, *saved, True, True)
    torch.testing.assert_close(chunked, gradients)
    torch.testing.assert_close(reference.pair_softmax_expectation(*arguments), expected_keys)


def test_rows_that_keep_nothing(backend, features, dtype):
    arguments = sweep_arguments(features, (33, 40, 8), "none", dtype)
    arguments[4:6] = [torch.arange(33) % 2, torch.zeros(40, dtype=torch.int64)]
    row_lse, row_max, column_lse, _ = module(backend).pair_softmax(*arguments, True)
    empty = torch.arange(33) % 2 == 0
    assert torch.all(row_lse[empty] == -torch.inf)
    assert torch.all(row_max[empty] == -torch.inf)
    assert torch.isfinite(row_lse[~empty]).all()
    grads = module(backend).pair_softmax_backward(
        *arguments, row_lse, column_lse, torch.ones(33), torch.ones(40), None, True, True
    )
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert torch.all(grads[0][empty] == 0.0)
    lse, *_, expectation = module(backend).pair_softmax_expectation(*arguments)
    assert torch.all(lse[empty] == -torch.inf)
    assert torch.all(expectation[empty] == 0.0)


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
        saved = (expected[0], expected[2], *(torch.ones(size) for size in (*shape[:2], shape[0])))
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
        for name, x, e in zip(NAMES, out, expected, strict=True):
            assert_near(x, e.double(), torch.float32, what=name)
        *_, expectation = module(backend).pair_softmax_expectation(*arguments)
        *_, exact = reference.pair_softmax_expectation(*arguments)
        assert torch.equal(torch.isfinite(expectation), torch.isfinite(exact))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_is_written(backend, features, shape, dtype):
    arguments = sweep_arguments(features, shape, "both", dtype)
    out = module(backend).pair_softmax(*arguments, True)
    saved = (out[0], out[2], *(torch.ones(size) for size in (*shape[:2], shape[0])))
    grads = module(backend).pair_softmax_backward(*arguments, *saved, True, True)
    expected_keys = module(backend).pair_softmax_expectation(*arguments)
    for result in (*out, *grads, *expected_keys):
        assert not torch.isnan(result).any()


def test_bits_do_not_depend_on_threads_or_repetition(features, dtype, backend):
    arguments = sweep_arguments(features, (300, 513, 40), "both", dtype)
    results = []
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        out = module(backend).pair_softmax(*arguments, True)
        saved = (out[0], out[2], torch.ones(300), torch.ones(513), torch.ones(300))
        grads = module(backend).pair_softmax_backward(*arguments, *saved, True, True)
        results.append((*out, *grads, *module(backend).pair_softmax_expectation(*arguments)))
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
        return found.row_lse, found.column_lse, found.diagonal_logit

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


def test_scale_100(backend, features, dtype):
    arguments = sweep_arguments(features, (97, 130, 64), "both", dtype)
    arguments[2:4] = [torch.full((97,), 50.0), torch.full((130,), 2.0)]
    wide = widened(arguments)
    exact, plain = (reference.pair_softmax(*x, True) for x in (wide, arguments))
    out = module(backend).pair_softmax(*arguments, True)
    for name, x, e, p in zip(NAMES, out, exact, plain, strict=True):
        assert_near(x, e, torch.float32, plain=p, what=name)
    exact_keys, plain_keys = (reference.pair_softmax_expectation(*x)[3] for x in (wide, arguments))
    keys = module(backend).pair_softmax_expectation(*arguments)[3]
    assert_near(keys, exact_keys, dtype, plain=plain_keys)


def test_gradient_of_a_share_of_the_keys(backend, features, dtype):
    """With log-sum-exps over more keys than these, each share of the keys gives its part."""
    arguments = sweep_arguments(features, (33, 60, 31), "ids", dtype)
    query, key, query_scale, key_scale, query_ids, key_ids, _ = arguments
    row_lse = module(backend).pair_softmax(*arguments, False)[0]
    row_grad = torch.randn(33)
    whole = reference.pair_softmax_backward(
        *widened(arguments), row_lse.double(), None, row_grad.double(), None, None, True, True
    )
    parts = [
        module(backend).pair_softmax_backward(
            query, key[share], query_scale, key_scale[share], query_ids, key_ids[share], [],
            row_lse, None, row_grad, None, None, True, True,
        )
        for share in (slice(0, 23), slice(23, 60))
    ]  # fmt: skip
    query_parts, key_parts = ([part[i : 3 + i : 2] for part in parts] for i in (0, 1))
    of_query = [a + b for a, b in zip(*query_parts, strict=True)]
    of_key = [torch.cat(both) for both in zip(*key_parts, strict=True)]
    found = (of_query[0], of_key[0], of_query[1], of_key[1])
    for name, x, e in zip(GRADIENTS, found, whole, strict=True):
        assert_near(x, e, dtype, what=name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_of_not_finite_features(backend, features, value):
    for place, rule in itertools.product((0, 1), ("none", "diagonals")):
        arguments = sweep_arguments(features, (33, 40, 8), rule)
        arguments[2:4] = [scale + 0.1 for scale in arguments[2:4]]
        arguments[place][5, 3] = value
        row_lse, _, column_lse, _ = reference.pair_softmax(*arguments, True)
        ones = torch.ones(40)
        for saved in (
            (row_lse, column_lse, ones[:33], ones, ones[:33]),
            (row_lse, None, ones[:33], None, None),
        ):
            exact = reference.pair_softmax_backward(*arguments, *saved, True, True)
            out = module(backend).pair_softmax_backward(*arguments, *saved, True, True)
            for name, x, e in zip(GRADIENTS, out, exact, strict=True):
                assert torch.equal(torch.isfinite(x), torch.isfinite(e)), (name, place, rule)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    n=st.integers(0, 70),
    m=st.integers(0, 70),
    d=st.integers(1, 70),
    ids=st.booleans(),
    diagonals=st.lists(st.integers(-75, 75), max_size=3, unique=True),
    columns=st.booleans(),
    half=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_sweep(backend, features, n, m, d, ids, diagonals, columns, half):
    arguments = sweep_arguments(features, (n, m, d), "ids" if ids else "none", half)
    arguments[6] = diagonals
    wide = widened(arguments)
    exact, plain = (reference.pair_softmax(*x, columns) for x in (wide, arguments))
    out = module(backend).pair_softmax(*arguments, columns)
    for name, x, e, p in zip(NAMES, out, exact, plain, strict=True):
        assert_near(x, e, torch.float32, plain=p, what=name)
    saved = [exact[0], None, torch.randn(n).double(), None, None]
    if columns:
        saved[1], saved[3] = exact[2], torch.randn(m).double()
    if diagonals:
        saved[4] = torch.randn(n).double()
    narrow = [None if x is None else x.float() for x in saved]
    exact, plain = (
        reference.pair_softmax_backward(*x, *s, True, True)
        for x, s in ((wide, saved), (arguments, narrow))
    )
    out = module(backend).pair_softmax_backward(*arguments, *narrow, True, True)
    for name, x, e, p in zip(GRADIENTS, out, exact, plain, strict=True):
        assert_near(x, e, half, plain=p, what=name)


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
