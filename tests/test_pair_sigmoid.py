"""The pairwise sigmoid and its gradient: every backend against the reference in float64."""

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
from ssl_fast.backends.reference import pair_sigmoid as reference
from ssl_fast.backends.reference import pairs
from ssl_fast.ops.pair_sigmoid import pair_sigmoid

SHAPES = [
    (0, 0, 3), (0, 5, 3), (5, 0, 3), (1, 1, 1), (2, 1, 13), (3, 5, 2), (5, 3, 1), (13, 33, 31),
    (33, 13, 97), (97, 130, 64), (130, 257, 128), (257, 130, 5), (300, 1, 2),
]  # fmt: skip
NAMES = ("loss", "grad_query", "grad_key", "grad_query_scale", "grad_key_scale", "grad_bias")


def sigmoid_arguments(features, shape, diagonal=0, dtype=torch.float32, weighted=True, scale=4.0):
    """Up to positive_diagonal."""
    n, m, d = shape
    generator = torch.Generator().manual_seed(n * 1000 + m)
    scales = [torch.rand(size, generator=generator) * scale for size in (n, m)]
    for some in scales:
        some[1::7] = 0.0
    weight = torch.randn(n, generator=generator) if weighted else None
    query, key = features(n, d, dtype=dtype), features(m, d, dtype=dtype)
    return [query, key, *scales, torch.tensor(-2.5), weight, diagonal]


def widened(arguments):
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments
    ]


def module(name):
    return dispatch.load(name, "pair_sigmoid")


def plain_gradients(arguments):
    *inputs, weight, diagonal = arguments
    weight = torch.ones(len(inputs[0])) if weight is None else weight
    return plainly.gradients(lambda *x: (plainly.pair_sigmoid(*x, diagonal),), inputs, [weight])


def assert_agrees(backend, arguments, dtype):
    exact = reference.pair_sigmoid(*widened(arguments), True, True)
    plain = list(reference.pair_sigmoid(*arguments, True, True))
    plain[1:5] = plain_gradients(arguments)[:4]
    out = module(backend).pair_sigmoid(*arguments, True, True)
    for name, x, e, p in zip(NAMES, out, exact, plain, strict=True):
        assert x.dtype is (dtype if name in ("grad_query", "grad_key") else torch.float32)
        assert_near(x, e, torch.float32 if name == "loss" else dtype, plain=p, what=name)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("diagonal", [None, 0, 2, -3, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, features, shape, diagonal, weighted, dtype):
    assert_agrees(backend, sigmoid_arguments(features, shape, diagonal, dtype, weighted), dtype)


def test_scale_100(backend, features, dtype):
    arguments = sigmoid_arguments(features, (97, 130, 64), 0, dtype)
    arguments[2:5] = [torch.full((97,), 50.0), torch.full((130,), 2.0), torch.tensor(-10.0)]
    assert_agrees(backend, arguments, dtype)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)), ids=str)
def test_only_what_is_needed(backend, features, needs):
    arguments = sigmoid_arguments(features, (33, 97, 31))
    whole = module(backend).pair_sigmoid(*arguments, True, True)
    out = module(backend).pair_sigmoid(*arguments, *needs)
    torch.testing.assert_close(out[0], whole[0])
    made = (*needs, *(any(needs),) * 3)
    for name, grad, expected, need in zip(NAMES[1:], out[1:], whole[1:], made, strict=True):
        assert grad.shape == (expected.shape if need else (0,)), name
        if need:
            torch.testing.assert_close(grad, expected)


def test_small_losses_keep_their_digits(backend):
    """Aligned pairs far from the rest: losses of 1e-6 have their value and their gradient."""
    rows = torch.nn.functional.normalize(torch.eye(16) + 0.01 * torch.rand(16, 16))
    arguments = [
        rows, rows.clone(), torch.full((16,), 36.0), torch.ones(16), torch.tensor(-18.0), None, 0,
    ]  # fmt: skip
    exact = reference.pair_sigmoid(*widened(arguments), True, True)
    out = module(backend).pair_sigmoid(*arguments, True, True)
    assert 1e-8 < exact[0].mean() < 1e-5
    torch.testing.assert_close(out[0].double(), exact[0], rtol=3e-5, atol=0.0)
    for x, e in zip(out[1:], exact[1:], strict=True):
        assert (x.double() - e).norm() < 1e-4 * e.norm()


def test_reference_gradient_is_the_derivative_of_its_loss(features):
    for diagonal, weighted in itertools.product((None, 0, -2), (False, True)):
        arguments = widened(sigmoid_arguments(features, (7, 9, 4), diagonal, weighted=weighted))
        inputs = [x.requires_grad_() for x in arguments[:5]]
        loss, *grads, grad_bias = reference.pair_sigmoid(*arguments, True, True)
        torch.testing.assert_close(loss, plainly.pair_sigmoid(*inputs, diagonal))
        expected = torch.autograd.grad(loss, inputs, arguments[5] if weighted else loss.new_ones(7))
        torch.testing.assert_close((*grads, grad_bias.sum()), expected)


def test_reference_does_not_depend_on_its_chunks(features, monkeypatch):
    arguments = widened(sigmoid_arguments(features, (31, 97, 33)))
    whole = reference.pair_sigmoid(*arguments, True, True)
    monkeypatch.setattr(pairs, "CHUNK_BYTES", 5 * 97 * 8)
    torch.testing.assert_close(reference.pair_sigmoid(*arguments, True, True), whole)


def op_inputs(features, dtype=torch.float32):
    values = features(5, 3), features(7, 3), torch.rand(5) + 0.5, torch.rand(7) + 0.5
    return [x.to(dtype).requires_grad_() for x in (*values, torch.tensor(-1.0))]


@pytest.mark.parametrize("reduce", [False, True])
def test_gradients_of_the_op(features, reduce):
    def loss(*values):
        return pair_sigmoid(*values, positive_diagonal=1, reduce=reduce)

    inputs = op_inputs(features, torch.float64)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("reduce", [False, True])
def test_second_derivatives(backend, features, reduce):
    results = []
    values = op_inputs(features)
    for kind, name in ((torch.float32, backend), (torch.float64, None)):
        inputs = [x.detach().to(kind).requires_grad_() for x in values]
        loss = pair_sigmoid(*inputs, positive_diagonal=0, reduce=reduce, backend=name)
        grads = torch.autograd.grad(loss.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in grads), inputs)
        results.append([x.double() for x in (*grads, *second)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reduce", [False, True])
def test_transforms_and_compile(backend, features, reduce):
    values = [x.detach() for x in op_inputs(features)]

    def total(*inputs):
        loss = pair_sigmoid(*inputs, positive_diagonal=0, reduce=reduce, backend=backend)
        return loss.square().sum()

    leaves = [x.clone().requires_grad_() for x in values]
    expected = torch.autograd.grad(total(*leaves), leaves)
    places = tuple(range(5))
    torch.testing.assert_close(torch.func.grad(total, argnums=places)(*values), expected)
    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), expected)


@pytest.mark.parametrize("reduce", [False, True])
def test_gradients_reach_only_what_asks(backend, features, reduce):
    values = op_inputs(features)
    expected = torch.autograd.grad(
        3.0 * pair_sigmoid(*values, positive_diagonal=0, reduce=reduce, backend=backend).sum(),
        values,
    )
    for place in range(5):
        inputs = [x.detach().clone().requires_grad_(i == place) for i, x in enumerate(values)]
        loss = pair_sigmoid(*inputs, positive_diagonal=0, reduce=reduce, backend=backend)
        (3.0 * loss.sum()).backward()
        for i, x in enumerate(inputs):
            assert (x.grad is not None) is (i == place)
        torch.testing.assert_close(inputs[place].grad, expected[place])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_features_propagate(backend, features, value):
    for place in (0, 1):
        arguments = sigmoid_arguments(features, (13, 40, 8))
        arguments[2:4] = [scale + 0.1 for scale in arguments[2:4]]
        arguments[place][5, 3] = value
        exact = reference.pair_sigmoid(*arguments, True, True)
        out = module(backend).pair_sigmoid(*arguments, True, True)
        for name, x, e in zip(NAMES, out, exact, strict=True):
            assert torch.equal(torch.isfinite(x), torch.isfinite(e)), (name, place)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_is_written(backend, features, shape, dtype):
    arguments = sigmoid_arguments(features, shape, 0, dtype)
    for needs in itertools.product([False, True], repeat=2):
        for result in module(backend).pair_sigmoid(*arguments, *needs):
            assert not torch.isnan(result).any()


def test_bits_do_not_depend_on_threads_or_repetition(backend, features, dtype):
    arguments = sigmoid_arguments(features, (300, 513, 40), 0, dtype)
    results = []
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        results.append(module(backend).pair_sigmoid(*arguments, True, True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    n=st.integers(0, 70),
    m=st.integers(0, 140),
    d=st.integers(1, 70),
    diagonal=st.none() | st.integers(-80, 150),
    weighted=st.booleans(),
    scale=st.sampled_from([0.5, 5.0]),
    half=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_pair_sigmoid(backend, features, n, m, d, diagonal, weighted, scale, half):
    arguments = sigmoid_arguments(features, (n, m, d), diagonal, half, weighted, scale)
    assert_agrees(backend, arguments, half)
