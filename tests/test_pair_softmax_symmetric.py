"""The symmetric op and its gradient: every backend against the reference in float64."""

from __future__ import annotations

import plain as plainly
import pytest
import torch
from conftest import thread_counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_near

from ssl_fast.backends import dispatch
from ssl_fast.backends.reference import pair_softmax as reference
from ssl_fast.ops.pair_softmax import IGNORED_ID
from ssl_fast.ops.pair_softmax_symmetric import pair_softmax_symmetric

SHAPES = [(0, 3), (1, 1), (2, 5), (3, 2), (6, 1), (13, 31), (34, 97), (97, 33), (130, 64), (258, 5)]
RULES = ["none", "ids", "pairs", "both"]


def symmetric_arguments(features, shape, rule, dtype=torch.float32, scale=4.0):
    """features, scale, row_scale, ids, pairs."""
    n, d = shape
    generator = torch.Generator().manual_seed(n)
    row_scale = torch.rand(n, generator=generator) + 0.2
    row_scale[1::7] = 0.0  # what a zero row under normalisation gives
    ids = torch.randint(-3, 4, (n,), generator=generator)
    ids[2::5] = IGNORED_ID
    pairs = n // 2 if rule in ("pairs", "both") and n % 2 == 0 else 0
    ids = ids if rule in ("ids", "both") else None
    return [features(n, d, dtype=dtype), torch.tensor(scale), row_scale, ids, pairs]


def widened(arguments):
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments
    ]


def module(name):
    return dispatch.load(name, "pair_softmax")


def plain_lse(features, scale, row_scale, ids, pairs):
    diagonals = [0, pairs, -pairs]
    return plainly.pair_softmax(
        features, features, scale * row_scale, row_scale, ids, ids, diagonals
    )[0]


def assert_agrees(backend, arguments, dtype):
    wide = widened(arguments)
    exact = reference.pair_softmax_symmetric(*wide)
    plain = reference.pair_softmax_symmetric(*arguments)
    out = module(backend).pair_softmax_symmetric(*arguments)
    for name, x, e, p in zip(("lse", "max"), out, exact, plain, strict=True):
        assert x.dtype is torch.float32
        assert_near(x, e, torch.float32, plain=p, what=name)
    row_grad = torch.randn_like(exact[0])
    saved = (exact[0], row_grad)
    narrow = [x.float() for x in saved]
    exact = reference.pair_softmax_symmetric_backward(*wide, *saved)
    plain = list(reference.pair_softmax_symmetric_backward(*arguments, *narrow))
    # In fp32 the reference is plain torch, given the same rounded lse: at 200 nats the rounding
    # moves every weight by up to 1.5e-5. With 16 bits, plain torch multiplies in 16 bits.
    if dtype is not torch.float32:
        plain[0] = plainly.gradients(
            lambda x: (plain_lse(x, *arguments[1:]),), arguments[:1], narrow[1:]
        )[0]
    out = module(backend).pair_softmax_symmetric_backward(*arguments, *narrow)
    assert out[0].dtype is dtype
    assert out[1].dtype is torch.float32
    for name, x, e, p in zip(("grad_features", "moment"), out, exact, plain, strict=True):
        assert_near(x, e, dtype, plain=p, what=name)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, features, shape, rule, dtype):
    assert_agrees(backend, symmetric_arguments(features, shape, rule, dtype), dtype)


@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_extreme_scales(backend, features, scale, dtype):
    """At scale 0 the moment still is the gradient's for the scale."""
    assert_agrees(
        backend, symmetric_arguments(features, (98, 33), "both", dtype, scale=scale), dtype
    )


def test_it_is_the_sweep_of_the_rows_with_themselves(features):
    for rule in RULES:
        arguments = widened(symmetric_arguments(features, (26, 7), rule))
        lse, maximum = reference.pair_softmax_symmetric(*arguments)
        torch.testing.assert_close(lse, plain_lse(*arguments))
        empty = lse == -torch.inf
        assert torch.equal(maximum == -torch.inf, empty)
        if rule in ("ids", "both"):
            assert torch.all(empty[arguments[3] == IGNORED_ID])


def test_reference_backward_is_the_derivative_of_its_forward(features):
    for rule in RULES:
        arguments = widened(symmetric_arguments(features, (8, 4), rule))
        inputs = [x.requires_grad_() for x in arguments[:3]]
        lse, _ = reference.pair_softmax_symmetric(*arguments)
        row_grad = torch.randn_like(lse)
        expected = torch.autograd.grad(lse, inputs, row_grad)
        grad, moment = reference.pair_softmax_symmetric_backward(*arguments, lse, row_grad)
        scale, row_scale = inputs[1:]
        found = (grad, 0.5 * (row_scale * moment).sum(), scale * moment)
        torch.testing.assert_close(found, expected)


def test_gradients_of_the_op(features):
    for ids, pairs in ((None, 0), (torch.tensor([0, 1, 1, IGNORED_ID, 0, 2]), 3)):
        inputs = [features(6, 3, dtype=torch.float64), torch.tensor(2.0).double()]
        inputs = [x.requires_grad_() for x in (*inputs, torch.rand(6).double() + 0.5)]

        def lse(*values, ids=ids, pairs=pairs):
            found = pair_softmax_symmetric(*values, ids=ids, pairs=pairs)[0]
            return torch.where(found == -torch.inf, 0.0, found)

        assert torch.autograd.gradcheck(lse, inputs)
        assert torch.autograd.gradgradcheck(lse, inputs)


def test_second_derivatives(backend, features):
    results = []
    values = features(8, 4), torch.tensor(3.0), torch.rand(8) + 0.5
    for kind, name in ((torch.float32, backend), (torch.float64, None)):
        inputs = [x.to(kind).requires_grad_() for x in values]
        total = pair_softmax_symmetric(*inputs, pairs=4, backend=name)[0].square().sum()
        grads = torch.autograd.grad(total, inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in grads), inputs)
        results.append([x.double() for x in (*grads, *second)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_transforms_and_compile(backend, features):
    values = [features(8, 4), torch.tensor(3.0), torch.rand(8) + 0.5]

    def total(*inputs):
        return pair_softmax_symmetric(*inputs, pairs=4, backend=backend)[0].square().sum()

    leaves = [x.clone().requires_grad_() for x in values]
    expected = torch.autograd.grad(total(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(total, argnums=(0, 1, 2))(*values), expected)
    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), expected)


def test_gradients_reach_only_what_asks(backend, features):
    values = features(8, 4), torch.tensor(3.0), torch.rand(8) + 0.5
    whole = [x.clone().requires_grad_() for x in values]
    lse, maximum = pair_softmax_symmetric(*whole, backend=backend)
    assert not maximum.requires_grad
    expected = torch.autograd.grad(lse.sum(), whole)
    for place in range(3):
        inputs = [x.clone().requires_grad_(i == place) for i, x in enumerate(values)]
        pair_softmax_symmetric(*inputs, backend=backend)[0].sum().backward()
        for i, x in enumerate(inputs):
            assert (x.grad is not None) is (i == place)
        torch.testing.assert_close(inputs[place].grad, expected[place])


def test_pairs_are_halves(features):
    with pytest.raises(ValueError, match="pairs must be 0 or half of the 8 rows; got 3"):
        pair_softmax_symmetric(features(8, 4), torch.tensor(1.0), torch.ones(8), pairs=3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_features_propagate(backend, features, value):
    for rule in RULES:
        arguments = symmetric_arguments(features, (26, 8), rule)
        arguments[2] = arguments[2] + 0.1
        arguments[0][5, 3] = value
        exact = reference.pair_softmax_symmetric(*arguments)
        out = module(backend).pair_softmax_symmetric(*arguments)
        saved = (exact[0], torch.ones(26))
        exact += reference.pair_softmax_symmetric_backward(*arguments, *saved)
        out += module(backend).pair_softmax_symmetric_backward(*arguments, *saved)
        names = ("lse", "max", "grad_features", "moment")
        for name, x, e in zip(names, out, exact, strict=True):
            assert torch.equal(torch.isfinite(x), torch.isfinite(e)), (name, rule)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_is_written(backend, features, shape, dtype):
    arguments = symmetric_arguments(features, shape, "both", dtype)
    out = module(backend).pair_softmax_symmetric(*arguments)
    grads = module(backend).pair_softmax_symmetric_backward(
        *arguments, out[0], torch.ones(shape[0])
    )
    for result in (*out, *grads):
        assert not torch.isnan(result).any()


def test_bits_do_not_depend_on_threads_or_repetition(backend, features, dtype):
    arguments = symmetric_arguments(features, (514, 40), "both", dtype)
    results = []
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        out = module(backend).pair_softmax_symmetric(*arguments)
        grads = module(backend).pair_softmax_symmetric_backward(*arguments, out[0], torch.ones(514))
        results.append((*out, *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    n=st.integers(0, 140),
    d=st.integers(1, 70),
    rule=st.sampled_from(RULES),
    scale=st.sampled_from([0.5, 5.0, 20.0]),
    half=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_symmetric_sweep(backend, features, n, d, rule, scale, half):
    assert_agrees(backend, symmetric_arguments(features, (n, d), rule, half, scale=scale), half)
