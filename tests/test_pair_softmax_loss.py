"""The fused losses of the backends: value and gradient against the reference in float64."""

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

NAMES = ("loss", "row_lse", "positive_logit", "row_max")
GRADIENTS = ("grad_query", "grad_positive", "grad_key", "grad_scale")
# (N, M, D); in-batch positives need M >= N, for which the larger of both is taken.
SHAPES = [
    (0, 0, 3), (0, 5, 3), (5, 0, 3), (1, 1, 1), (2, 2, 5), (3, 5, 2), (5, 3, 13), (33, 13, 97),
    (31, 97, 33), (97, 130, 64), (130, 257, 128), (257, 130, 5), (300, 1, 16), (513, 513, 16),
]  # fmt: skip
PAIRS = [0, 1, 2, 3, 5, 13, 31, 33, 97, 130, 257]  # half of the symmetric loss's rows
ALL = (True, True, True)


def module(name):
    return dispatch.load(name, "pair_softmax")


def wide(arguments):
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments
    ]


def loss_arguments(features, shape, positives, *, normalize=True, scale=10.0, ids=False, dtype):
    """Up to ``normalize``. ``positives``: "in-batch" or "given"."""
    n, m, d = shape
    m = max(n, m) if positives == "in-batch" else m
    query, key = features(n, d, dtype=dtype), features(m, d, dtype=dtype)
    positive = features(n, d, dtype=dtype) if positives == "given" else None
    both = [None, None]
    if ids:
        # Every row's positive has the row's id, as labels of one image would.
        query_ids = torch.arange(n) // 3
        both = [query_ids, torch.cat([query_ids, torch.arange(n, n + m)])[:m]]
    diagonals = [] if positives == "given" else [0]
    return [query, positive, key, torch.tensor(scale), *both, diagonals, normalize]


def plain_gradients(arguments):
    """Plain torch's gradients of sum(loss) for query, positive, key and scale, at their dtype."""
    query, positive, key, scale, query_ids, key_ids, diagonals, normalize = arguments

    def loss(query, key, scale, positive=None):
        if normalize:
            query, key = (torch.nn.functional.normalize(x, dim=1) for x in (query, key))
            positive = positive if positive is None else torch.nn.functional.normalize(positive)
        n, m = len(query), len(key)
        ones = [query.new_ones(n), query.new_ones(m) * scale]
        lse, _ = plainly.pair_softmax(query, key, *ones, query_ids, key_ids, diagonals)
        other = key[:n] if positive is None else positive
        logit = (query * other).sum(dim=1) * scale.to(query.dtype)
        return (torch.nn.functional.softplus(lse - logit),)

    inputs = [query, key, scale] + ([] if positive is None else [positive])
    found = plainly.gradients(loss, inputs, [1.0])
    return [found[0], query.new_empty(0) if positive is None else found[3], found[1], found[2]]


def assert_loss(out, exact, plain_values, plain_grads, dtype):
    for name, x, e, p in zip(NAMES, out, exact, plain_values, strict=False):
        assert x.dtype is torch.float32
        assert_near(x, e, torch.float32, plain=p, what=name)
    *grads, grad_scale = out[4:]
    *exact_grads, exact_scale = exact[4:]
    *plains, plain_scale = plain_grads
    for name, x, e, p in zip(GRADIENTS, grads, exact_grads, plains, strict=False):
        assert x.dtype is dtype
        assert_near(x, e, dtype, plain=p, what=name)
    assert_near(grad_scale.sum(), exact_scale.sum(), dtype, plain=plain_scale, what="grad_scale")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("positives", ["in-batch", "given"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss(backend, features, shape, positives, normalize, dtype):
    for ids, scale in ((False, 10.0), (True, 2.0)):
        arguments = loss_arguments(
            features, shape, positives, normalize=normalize, scale=scale, ids=ids, dtype=dtype
        )
        exact = reference.pair_softmax_loss(*wide(arguments), *ALL)
        plain = reference.pair_softmax_loss(*arguments, *ALL)
        out = module(backend).pair_softmax_loss(*arguments, *ALL)
        assert_loss(out, exact, plain, plain_gradients(arguments), dtype)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pairs", PAIRS)
def test_symmetric_loss(backend, features, pairs, normalize, dtype):
    for width, scale in ((1, 2.0), (33, 10.0), (130, 10.0)):
        rows = features(2 * pairs, width, dtype=dtype)
        arguments = [rows, torch.tensor(scale), normalize, True]
        exact = reference.pair_softmax_symmetric_loss(*wide(arguments))
        plain = reference.pair_softmax_symmetric_loss(*arguments)
        out = module(backend).pair_softmax_symmetric_loss(*arguments)
        one_sided = [rows, rows.roll(pairs, 0), rows, arguments[1], None, None]
        grads = plain_gradients([*one_sided, [0, pairs, -pairs], normalize])
        total = grads[0] + grads[1].roll(pairs, 0) + grads[2]
        assert_loss(out, exact, plain, [total, grads[3]], dtype)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("positives", ["in-batch", "given"])
def test_only_what_is_needed(backend, features, positives, needs):
    arguments = loss_arguments(features, (33, 97, 31), positives, dtype=torch.float32)
    whole = module(backend).pair_softmax_loss(*arguments, *ALL)
    out = module(backend).pair_softmax_loss(*arguments, *needs)
    torch.testing.assert_close(out[:4], whole[:4])
    made = [need and x is not None for need, x in zip(needs, arguments[:3], strict=True)]
    for grad, expected, need in zip(out[4:7], whole[4:7], made, strict=True):
        assert grad.shape == (expected.shape if need else (0,))
        if need:
            torch.testing.assert_close(grad, expected)
    if any(made):
        torch.testing.assert_close(out[7], whole[7])
    elif not any(needs):
        assert out[7].shape == (0,)


def test_symmetric_loss_without_gradient(backend, features, dtype):
    rows = features(66, 13, dtype=dtype)
    whole = module(backend).pair_softmax_symmetric_loss(rows, torch.tensor(5.0), True, True)
    out = module(backend).pair_softmax_symmetric_loss(rows, torch.tensor(5.0), True, False)
    torch.testing.assert_close(out[:4], whole[:4])
    assert out[4].shape == out[5].shape == (0,)


@pytest.mark.parametrize("positives", ["in-batch", "given"])
def test_zero_rows(backend, features, positives, dtype):
    arguments = loss_arguments(features, (33, 40, 13), positives, dtype=dtype)
    for rows in arguments[:3]:
        if rows is not None:
            rows[3:33:5] = 0.0
    exact = reference.pair_softmax_loss(*wide(arguments), *ALL)
    out = module(backend).pair_softmax_loss(*arguments, *ALL)
    for name, x, e in zip((*NAMES, *GRADIENTS[:3]), out, exact, strict=False):
        assert torch.isfinite(x).all(), name
        assert_near(x, e, dtype, what=name)
    for rows, grad in zip(arguments[:3], out[4:7], strict=True):
        if rows is not None:
            assert torch.all(grad[3:33:5] == 0.0)
    rows = torch.zeros(10, 4, dtype=dtype)
    loss, *_, grad, _ = module(backend).pair_softmax_symmetric_loss(
        rows, torch.tensor(2.0), True, True
    )
    torch.testing.assert_close(loss, torch.full((10,), 9.0).log())
    assert torch.all(grad == 0.0)


@pytest.mark.parametrize("normalize", [True, False])
def test_scale_100(backend, features, normalize, dtype):
    arguments = loss_arguments(
        features, (97, 130, 64), "given", scale=100.0, normalize=normalize, dtype=dtype
    )
    exact = reference.pair_softmax_loss(*wide(arguments), *ALL)
    plain = reference.pair_softmax_loss(*arguments, *ALL)
    out = module(backend).pair_softmax_loss(*arguments, *ALL)
    assert all(torch.isfinite(x).all() for x in out)
    assert_loss(out, exact, plain, plain_gradients(arguments), dtype)


def test_small_losses_keep_their_digits(backend):
    """An aligned pair among far negatives: a loss of 1e-6 has its value and its gradient."""
    query = torch.nn.functional.normalize(torch.eye(16) + 0.01 * torch.rand(16, 16))
    arguments = [query, None, query.clone(), torch.tensor(16.0), None, None, [0], False]
    exact = reference.pair_softmax_loss(*wide(arguments), *ALL)
    out = module(backend).pair_softmax_loss(*arguments, *ALL)
    assert 1e-7 < exact[0].mean() < 1e-5
    torch.testing.assert_close(out[0].double(), exact[0], rtol=2e-5, atol=0.0)
    for x, e in zip((out[4], out[6]), (exact[4], exact[6]), strict=True):
        assert (x.double() - e).norm() < 1e-4 * e.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_not_finite_features_propagate(backend, features, normalize, value):
    for place, positives in itertools.product(range(3), ("in-batch", "given")):
        arguments = loss_arguments(
            features, (13, 40, 8), positives, normalize=normalize, dtype=torch.float32
        )
        if arguments[place] is None:
            continue
        arguments[place][5, 3] = value
        exact = reference.pair_softmax_loss(*arguments, *ALL)
        out = module(backend).pair_softmax_loss(*arguments, *ALL)
        for name, x, e in zip((*NAMES, *GRADIENTS), out, exact, strict=True):
            assert torch.equal(torch.isfinite(x), torch.isfinite(e)), (name, place, positives)
    rows = features(26, 8)
    rows[5, 3] = value
    exact = reference.pair_softmax_symmetric_loss(rows, torch.tensor(5.0), normalize, True)
    out = module(backend).pair_softmax_symmetric_loss(rows, torch.tensor(5.0), normalize, True)
    for name, x, e in zip((*NAMES, "grad_features"), out, exact, strict=False):
        assert torch.equal(torch.isfinite(x), torch.isfinite(e)), name


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_is_written(backend, features, shape, dtype):
    for positives in ("in-batch", "given"):
        arguments = loss_arguments(features, shape, positives, dtype=dtype)
        for needs in (ALL, (False, True, False)):
            for result in module(backend).pair_softmax_loss(*arguments, *needs):
                assert not torch.isnan(result).any()
    rows = features(2 * shape[0], shape[2], dtype=dtype)
    for result in module(backend).pair_softmax_symmetric_loss(rows, torch.tensor(3.0), True, True):
        assert not torch.isnan(result).any()


def test_bits_do_not_depend_on_threads_or_repetition(backend, features, dtype):
    arguments = loss_arguments(features, (300, 513, 40), "in-batch", dtype=dtype)
    rows = features(514, 40, dtype=dtype)
    results = []
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        one_sided = module(backend).pair_softmax_loss(*arguments, *ALL)
        symmetric = module(backend).pair_softmax_symmetric_loss(rows, torch.tensor(9.0), True, True)
        results.append((*one_sided, *symmetric))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_reference_gradient_is_the_derivative_of_its_loss(features):
    for positives, normalize in itertools.product(("in-batch", "given"), (True, False)):
        arguments = wide(
            loss_arguments(
                features, (7, 9, 4), positives, normalize=normalize, ids=True, dtype=torch.float64
            )
        )
        present = [i for i in range(4) if arguments[i] is not None]
        for i in present:
            arguments[i].requires_grad_()
        loss, _, _, _, *grads, grad_scale = reference.pair_softmax_loss(*arguments, *ALL)
        expected = torch.autograd.grad(loss.sum(), [arguments[i] for i in present])
        found = [*grads, grad_scale.sum()]
        torch.testing.assert_close([found[i] for i in present], list(expected))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    n=st.integers(0, 70),
    extra=st.integers(-70, 70),
    d=st.integers(1, 70),
    in_batch=st.booleans(),
    normalize=st.booleans(),
    ids=st.booleans(),
    scale=st.sampled_from([0.5, 5.0, 20.0]),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    half=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_loss(backend, features, n, extra, d, in_batch, normalize, ids, scale, needs, half):
    arguments = loss_arguments(
        features, (n, max(0, n + extra), d), "in-batch" if in_batch else "given",
        normalize=normalize, scale=scale, ids=ids, dtype=half,
    )  # fmt: skip
    exact = reference.pair_softmax_loss(*wide(arguments), *needs)
    plain = reference.pair_softmax_loss(*arguments, *needs)
    out = module(backend).pair_softmax_loss(*arguments, *needs)
    for name, x, e, p in zip(NAMES, out, exact, plain, strict=False):
        assert_near(x, e, torch.float32, plain=p, what=name)
    plains = plain_gradients(arguments)
    for name, x, e, p in zip(GRADIENTS[:3], out[4:7], exact[4:7], plains, strict=False):
        assert_near(x, e, half, plain=p if e.numel() else None, what=name)
