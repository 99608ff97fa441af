"""The divergence of a VAE's latents: every backend against the formula in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import thread_counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_near

from ssl_fast.backends.reference import kl_divergence as reference
from ssl_fast.ops.kl_divergence import kl_divergence

SHAPES = [
    (0,),
    (1,),
    (),
    (3, 5),
    (7, 0),
    (2, 3, 5),
    (1000,),
    (1024,),
    (1029,),
    (3, 16384),
    (40001,),
]
LARGEST = torch.finfo(torch.float32).max


def plain_kl(mu, logvar):
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def inputs_of(shape, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    mu, logvar = (torch.randn(shape, generator=generator) * size for _ in range(2))
    return mu.to(dtype), logvar.to(dtype)


def value_and_grads(mu, logvar, factor=1.0, **options):
    leaves = [x.detach().requires_grad_() for x in (mu, logvar)]
    value = kl_divergence(*leaves, **options)
    return value.detach(), *torch.autograd.grad(value, leaves, torch.tensor(factor).to(value))


def exact_of(mu, logvar, factor=1.0):
    mu, logvar = mu.double(), logvar.double()
    return plain_kl(mu, logvar), factor * mu, factor * 0.5 * torch.expm1(logvar)


def assert_agrees(found, exact, dtype):
    assert found[0].dtype is torch.float32
    assert_near(found[0], exact[0], torch.float32)
    for x, e in zip(found[1:], exact[1:], strict=True):
        assert x.dtype is dtype
        assert_near(x, e, dtype)


@pytest.mark.parametrize("size", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, size, dtype):
    inputs = inputs_of(shape, dtype, size)
    # A gradient of exp(12) is no fp16 number, but with a factor.
    found = value_and_grads(*inputs, factor=2.0**-14, backend=backend)
    assert_agrees(found, exact_of(*inputs, factor=2.0**-14), dtype)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 0.9, 1.1])
def test_near_the_standard_normal(backend, size):
    """Terms of size^2 / 4, which 1 + logvar - exp(logvar) would lose to rounding."""
    logvar = torch.linspace(-size, size, 4999)
    mu = torch.zeros_like(logvar)
    value, _, grad = value_and_grads(mu, logvar, backend=backend)
    exact = (0.5 * (torch.expm1(logvar.double()) - logvar.double())).sum()
    if size < 1e-3:
        wide = logvar.double()
        exact = (wide**2 / 4 + wide**3 / 12 + wide**4 / 48).sum()
    torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(grad.double(), 0.5 * torch.expm1(logvar.double()), rtol=1e-6, atol=0)


def test_every_exponent(backend):
    """Relative accuracy over the whole range, up to the largest finite exponential."""
    logvar = torch.linspace(-110.0, 88.72, 5001)
    for x in logvar[::50]:
        value, _, grad = value_and_grads(torch.zeros(1), x[None], backend=backend)
        exact = 0.5 * (torch.expm1(x.double()) - x.double())
        torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=0.0)
        torch.testing.assert_close(
            grad[0].double(), 0.5 * torch.expm1(x.double()), rtol=1e-6, atol=0
        )


def test_large_log_variances_stay_finite(backend):
    """Where exp is above the largest number it stops there; torch's line gives inf."""
    logvar = torch.full((5000,), 1.0)
    logvar[::3] = torch.tensor([89.0, 100.0, 1e4, LARGEST]).repeat(417)[:1667]
    mu = torch.ones(5000)
    assert plain_kl(mu, logvar) == torch.inf
    value, grad_mu, grad = value_and_grads(mu, logvar, factor=1 / 5000, backend=backend)
    assert value == LARGEST
    assert grad.isfinite().all()
    assert torch.all(grad[::3] > 3e34)
    torch.testing.assert_close(grad_mu, mu / 5000)
    one = value_and_grads(mu[:1], torch.tensor([90.0]), backend=backend)[0]
    torch.testing.assert_close(one, torch.tensor(LARGEST / 2), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_not_finite_values_propagate(backend, value, place):
    for position in (0, 17, 1028):
        inputs = list(inputs_of((1029,)))
        inputs[place][position] = value
        found = value_and_grads(*inputs, backend=backend)
        leaves = [x.clone().requires_grad_() for x in inputs]
        expected = plain_kl(*leaves)
        expected = (expected.detach(), *torch.autograd.grad(expected, leaves))
        for x, e in zip(found, expected, strict=True):
            torch.testing.assert_close(x, e, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_layouts(backend, dtype):
    mu, logvar = inputs_of((6, 35), dtype)
    exact = exact_of(mu, logvar)
    apart = torch.full((6, 70), torch.nan).to(dtype)
    apart[:, ::2] = logvar
    for other in (logvar.T.contiguous().T, apart[:, ::2]):
        assert_agrees(value_and_grads(mu, other, backend=backend), exact, dtype)
    both = torch.cat([mu, logvar], dim=1)
    assert_agrees(value_and_grads(*both.chunk(2, dim=1), backend=backend), exact, dtype)
    row = logvar[:1].expand(6, 35)
    assert_agrees(value_and_grads(mu, row, backend=backend), exact_of(mu, row), dtype)
    leaf = mu.clone().requires_grad_()
    twice = kl_divergence(leaf, leaf, backend=backend)
    (grad,) = torch.autograd.grad(twice, leaf)
    assert_near(grad, mu.double() + 0.5 * torch.expm1(mu.double()), dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_is_written(backend, shape, dtype):
    for result in value_and_grads(*inputs_of(shape, dtype), backend=backend):
        assert not result.isnan().any()


def test_bits_do_not_depend_on_threads_or_repetition(backend, dtype):
    inputs = inputs_of((150001,), dtype)
    results = []
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        results.append(value_and_grads(*inputs, backend=backend))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_a_gradient_larger_than_the_cache(backend):
    mu, logvar = inputs_of(((9 << 20) + 5,))
    found = value_and_grads(mu, logvar, backend=backend)
    assert_agrees(found, exact_of(mu, logvar), torch.float32)


def test_only_what_is_needed(backend):
    mu, logvar = inputs_of((7, 33))
    operator = torch.ops.ssl_fast.kl_divergence
    value, grad = operator(mu, logvar, True, backend=backend)
    alone, nothing = operator(mu, logvar, False, backend=backend)
    assert torch.equal(alone, value)
    assert grad.shape == (7, 33)
    assert nothing.shape == (0,)
    for asked in itertools.product([False, True], repeat=2):
        leaves = [x.clone().requires_grad_(a) for x, a in zip((mu, logvar), asked, strict=True)]
        value = kl_divergence(*leaves, backend=backend)
        assert value.requires_grad is any(asked)
        if any(asked):
            value.backward(retain_graph=True)
            first = [None if x.grad is None else x.grad.clone() for x in leaves]
            value.backward()
            for x, once, ask in zip(leaves, first, asked, strict=True):
                assert (x.grad is not None) is ask
                if ask:
                    assert torch.equal(x.grad, 2.0 * once)
    with torch.no_grad():
        assert not kl_divergence(*leaves, backend=backend).requires_grad


def test_gradcheck():
    inputs = [torch.randn(3, 4).double().requires_grad_() * 2.0 for _ in range(2)]
    assert torch.autograd.gradcheck(kl_divergence, inputs)
    assert torch.autograd.gradgradcheck(kl_divergence, inputs)


def test_reference_equals_torch(dtype):
    mu, logvar = (x.double() for x in inputs_of((6, 35), dtype, 3.0))
    value, grad = reference.kl_divergence(mu, logvar, True)
    torch.testing.assert_close(value, plain_kl(mu, logvar))
    torch.testing.assert_close(grad, 0.5 * (logvar.exp() - 1))


def test_gradients_of_gradients(backend, dtype):
    leaves = [x.requires_grad_() for x in inputs_of((5, 9), dtype)]
    value = kl_divergence(*leaves, backend=backend)
    first = torch.autograd.grad(0.01 * value.square(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(x.float().square().sum() for x in first), leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(0.01 * plain_kl(*wide).square(), wide, create_graph=True)
    expected = torch.autograd.grad(sum(x.square().sum() for x in expected), wide)
    for x, e in zip(second, expected, strict=True):
        assert_near(x, e, dtype, plain=e * (1.0 + torch.finfo(dtype).eps))


def test_transforms_compile_autocast_and_opcheck(backend):
    mu, logvar = inputs_of((5, 9))

    def loss(mu, logvar):
        return kl_divergence(mu, logvar, backend=backend) * 2.0

    leaves = [x.clone().requires_grad_() for x in (mu, logvar)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(mu, logvar), expected)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(mu, logvar), loss(*leaves).detach())
    for need in (False, True):
        torch.library.opcheck(
            torch.ops.ssl_fast.kl_divergence.default, (mu, logvar, need), {"backend": backend}
        )


def test_a_scaled_loss_keeps_gradients_of_halves(backend):
    """A gradient of 3e-8 for logvar times a scale: nothing is rounded to fp16 before the scale."""
    mu, logvar = torch.full((64,), 1e-3).half(), torch.full((64,), 1e-7).half()
    _, grad_mu, grad = value_and_grads(mu, logvar, factor=65536.0, backend=backend)
    torch.testing.assert_close(grad_mu, (mu.float() * 65536.0).half())
    torch.testing.assert_close(grad, (0.5 * 65536.0 * logvar.float()).half(), rtol=2e-3, atol=0.0)


WRONG = {
    "mu must be floating": (torch.zeros(3).int(), torch.zeros(3)),
    "logvar must be": (torch.zeros(3), torch.zeros(4)),
    "logvar must be a torch.float32": (torch.zeros(3), torch.zeros(3).double()),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_arguments(backend, message):
    with pytest.raises(ValueError, match=message):
        kl_divergence(*WRONG[message], backend=backend)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    size=st.sampled_from([1e-2, 1.0, 5.0]),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_kl_divergence(backend, shape, size, kind):
    inputs = inputs_of(tuple(shape), kind, size)
    found = value_and_grads(*inputs, factor=2.0**-14, backend=backend)
    assert_agrees(found, exact_of(*inputs, factor=2.0**-14), kind)
