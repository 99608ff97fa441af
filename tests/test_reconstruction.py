"""Reconstruction losses: every backend against torch.nn.functional in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import thread_counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_reconstruction import BY_WEIGHT, KINDS, inputs_of, plain_loss
from tolerances import assert_near

import ssl_fast
from ssl_fast import reconstruction_loss

SHAPES = [(0,), (), (1,), (3, 5), (7, 0), (2, 3, 5), (1024,), (1029,), (2, 16384), (40001,)]
REDUCTIONS = ("mean", "sum", "none")


def value_and_grad(x, t, kind, reduction="mean", factor=1.0, **options):
    leaf = x.detach().requires_grad_()
    loss = reconstruction_loss(leaf, t, kind, reduction, **options)
    (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, factor))
    return loss.detach(), grad


def exact_of(x, t, kind, reduction="mean", factor=1.0, **options):
    leaf = x.double().requires_grad_()
    wide = {
        name: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for name, v in options.items()
    }
    loss = plain_loss(kind, leaf, t.double(), reduction, **wide)
    (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, factor))
    return loss.detach(), grad


def assert_agrees(found, exact, dtype):
    assert found[0].dtype is torch.float32
    assert found[1].dtype is dtype
    assert_near(found[0], exact[0], torch.float32, what="loss")
    assert_near(found[1], exact[1], dtype, what="gradient")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(backend, kind, shape, reduction, dtype):
    x, t = inputs_of(kind, shape, dtype)
    found = value_and_grad(x, t, kind, reduction, 2.0, backend=backend)
    assert_agrees(found, exact_of(x, t, kind, reduction, 2.0), dtype)


@pytest.mark.parametrize("kind", ["smooth_l1", "huber"])
@pytest.mark.parametrize("parameter", [1e-3, 0.7, 30.0])
def test_parameters(backend, kind, parameter, dtype):
    x, t = inputs_of(kind, (3, 500), dtype)
    option = {"delta" if kind == "huber" else "beta": parameter}
    found = value_and_grad(x, t, kind, backend=backend, **option)
    assert_agrees(found, exact_of(x, t, kind, **option), dtype)


def test_smooth_l1_without_a_smooth_part_is_l1(backend):
    x, t = inputs_of("l1", (3, 50))
    found = value_and_grad(x, t, "smooth_l1", beta=0.0, backend=backend)
    assert_agrees(found, exact_of(x, t, "l1"), torch.float32)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 700), (33, 31)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_masks(backend, kind, shape, reduction, dtype):
    x, t = inputs_of(kind, shape, dtype)
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(shape, generator=generator)
    for dims in range(1, len(shape) + 1):
        mask = torch.rand(shape[:dims], generator=generator) < 0.6
        poisoned = [y.clone() for y in (x, t, weight)]
        for y in poisoned:
            y[~mask] = torch.nan
        for given_mask in (mask, mask.float(), mask.view(*mask.shape, *[1] * (len(shape) - dims))):
            for given_weight, full in ((None, None), (poisoned[2], weight)):
                options = {"mask": given_mask, "weight": given_weight}
                found = value_and_grad(*poisoned[:2], kind, reduction, backend=backend, **options)
                exact = exact_of(x, t, kind, reduction, mask=mask, weight=full)
                assert_agrees(found, exact, dtype)
                assert not found[1][~mask].any()
    found = value_and_grad(x, t, kind, reduction, backend=backend, weight=weight)
    assert_agrees(found, exact_of(x, t, kind, reduction, weight=weight), dtype)


def test_the_input_as_its_own_weight(backend):
    x, t = inputs_of("mse", (3, 500))
    found = reconstruction_loss(x, t, "mse", "sum", weight=x, backend=backend)
    assert_near(found, plain_loss("mse", x.double(), t.double(), "sum", weight=x), torch.float32)


@pytest.mark.parametrize("kind", ["bce", "bce_with_logits"])
def test_weights_of_binary_kinds_broadcast(backend, kind):
    x, t = inputs_of(kind, (2, 3, 5))
    for shape in ((5,), (3, 1), (2, 1, 1), ()):
        weight = torch.rand(shape) + 0.5
        found = value_and_grad(x, t, kind, weight=weight, backend=backend)
        assert_agrees(found, exact_of(x, t, kind, weight=weight), torch.float32)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 1), (2, 3, 5), ()], ids=str)
def test_pos_weight(backend, shape, dtype):
    x, t = inputs_of("bce_with_logits", (2, 3, 5), dtype, size=9.0)
    pos_weight = torch.rand(shape) * 3.0
    options = {"pos_weight": pos_weight}
    found = value_and_grad(x, t, "bce_with_logits", "sum", backend=backend, **options)
    assert_agrees(found, exact_of(x, t, "bce_with_logits", "sum", **options), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_as_targets(backend, kind, dtype):
    x, _ = inputs_of(kind, (3, 1025), dtype)
    t = torch.randint(0, 256, (3, 1025), dtype=torch.uint8)
    options = {"target_scale": 1 / 256, "target_shift": 1 / 512}
    found = value_and_grad(x, t, kind, backend=backend, **options)
    assert_agrees(found, exact_of(x, t.double() / 256 + 1 / 512, kind), dtype)


def test_targets_of_another_dtype(backend, dtype):
    x, t = inputs_of("mse", (3, 1025), dtype)
    for other in (torch.float32, torch.bfloat16, torch.float16):
        given_target = t.to(other)
        found = value_and_grad(x, given_target, "mse", target_scale=0.5, backend=backend)
        assert_agrees(found, exact_of(x, given_target.double() * 0.5, "mse"), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(backend, kind):
    x, t = inputs_of(kind, (6, 40))
    exact = exact_of(x, t, kind)
    every_other = torch.full((6, 80), torch.nan)[:, ::2]
    transposed = torch.empty(40, 6).T
    shifted = torch.full((241,), torch.nan)[1:].view(6, 40)
    for view in (every_other, transposed, shifted):
        view.copy_(x)
        assert_agrees(value_and_grad(view, t, kind, backend=backend), exact, torch.float32)
        view.copy_(t)
        assert_agrees(value_and_grad(x, view, kind, backend=backend), exact, torch.float32)
    row = t[:1].expand(6, 40)
    found = value_and_grad(x, row, kind, backend=backend)
    assert_agrees(found, exact_of(x, row, kind), torch.float32)


def test_small_losses_keep_their_digits(backend):
    """Where (1 - t) x - logsigmoid(x), which torch computes, has none left."""
    if backend == "reference":
        pytest.skip("the reference is torch's formula")
    x = torch.cat([torch.linspace(8.0, 60.0, 999), -torch.linspace(8.0, 60.0, 999)])
    t = (x > 0).float()
    loss, grad = value_and_grad(x, t, "bce_with_logits", "none", backend=backend)
    small = torch.exp(-x.double().abs())
    torch.testing.assert_close(loss.double(), torch.log1p(small), rtol=1e-6, atol=0)
    wide = torch.where(x > 0, -1.0, 1.0) * small / (1.0 + small)
    torch.testing.assert_close(grad.double(), wide, rtol=1e-6, atol=0)


def test_small_losses_go_to_the_backend_of_the_environment(monkeypatch):
    """Without a name they are torch's operator; a name that can't be must not be passed over."""
    x = torch.ones(4)
    monkeypatch.delenv("SSL_FAST_BACKEND", raising=False)
    assert ssl_fast.reconstruction_loss(x, -x, "mse").item() == 4.0
    monkeypatch.setenv("SSL_FAST_BACKEND", "abacus")
    for kind in ("mse", "l1"):
        with pytest.raises(ValueError, match=r"SSL_FAST_BACKEND must be one of.*got 'abacus'"):
            ssl_fast.reconstruction_loss(x, -x, kind)


def test_small_numbers_in_bce(backend):
    x = torch.cat([torch.logspace(-30, -1, 500), 1.0 - torch.logspace(-7, -1, 500)])
    t = torch.rand(1000)
    found = value_and_grad(x, t, "bce", "none", backend=backend)
    exact = exact_of(x, t, "bce", "none")
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-6, atol=1e-30)
    ends = torch.tensor([0.0, 1.0, 0.0, 1.0])
    target = torch.tensor([0.0, 1.0, 1.0, 0.0])
    loss, grad = value_and_grad(ends, target, "bce", "none", backend=backend)
    assert torch.equal(loss, torch.tensor([0.0, 0.0, 100.0, 100.0]))
    assert_near(grad, exact_of(ends, target, "bce", "none")[1], torch.float32)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bce"])
def test_nan_and_infinity_are_as_in_torch(backend, kind):
    values = [torch.nan, torch.inf, -torch.inf, 0.0, 1.0]
    x = torch.tensor(values).repeat(7)
    t = torch.linspace(0.1, 0.9, 7).repeat_interleave(5)
    loss, grad = value_and_grad(x, t, kind, "none", backend=backend)
    leaf = x.clone().requires_grad_()
    expected = plain_loss(kind, leaf, t, "none")
    (wanted,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
    torch.testing.assert_close(grad, wanted, equal_nan=True)


def test_sums_keep_fp32s_digits(backend, dtype):
    """70 million equal terms, far beyond what fp16 or an fp32 running sum can hold."""
    x = torch.full((1 << 20,), 0.5, dtype=dtype).expand(64, 1 << 20)
    t = torch.zeros((), dtype=dtype).expand(64, 1 << 20)
    if backend == "reference":
        x, t = x[:2], t[:2]
    for kind, each in (("mse", 0.25), ("l1", 0.5)):
        assert float(reconstruction_loss(x, t, kind, backend=backend)) == each
        total = float(reconstruction_loss(x, t, kind, "sum", backend=backend))
        assert total == each * x.numel()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_written(backend, kind, dtype):
    for shape in ((5,), (3, 700), (2, 40001)):
        x, t = inputs_of(kind, shape, dtype)
        mask = torch.arange(shape[0]) % 2 == 0
        for reduction in ("sum", "none"):
            found = value_and_grad(x, t, kind, reduction, mask=mask, backend=backend)
            assert_agrees(found, exact_of(x, t, kind, reduction, mask=mask), dtype)


@pytest.mark.parametrize("kind", ["mse", "bce_with_logits"])
def test_same_bits_for_any_number_of_threads(backend, kind, dtype):
    x, t = inputs_of(kind, (300_001,), dtype)
    results = []
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        results.append(value_and_grad(x, t, kind, backend=backend))
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
def test_gradients_that_go_past_the_caches(backend, dtype_name):
    dtype = getattr(torch, dtype_name)
    count = (9 << 20) * (2 if dtype is torch.bfloat16 else 1) + 37
    if backend == "reference":
        count = 5000
    x, t = inputs_of("mse", (count,), dtype)
    loss, grad = value_and_grad(x, t, "mse", "sum", backend=backend)
    assert_near(loss, (x.double() - t.double()).square().sum(), torch.float32)
    assert torch.equal(grad, (2.0 * (x.float() - t.float())).to(dtype))


@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    kind=st.sampled_from(KINDS), shape=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    reduction=st.sampled_from(REDUCTIONS), dims=st.integers(0, 4), weighted=st.booleans(),
)  # fmt: skip
def test_any_shape(backend, kind, shape, reduction, dims, weighted):
    x, t = inputs_of(kind, tuple(shape))
    options = {}
    if dims:
        options["mask"] = torch.rand(shape[:dims]) < 0.5
    if weighted:
        options["weight"] = torch.rand(shape)
    found = value_and_grad(x, t, kind, reduction, backend=backend, **options)
    exact = exact_of(x, t, kind, reduction, **options)
    if x.numel() == 0 and reduction == "mean" and (dims or (weighted and kind in BY_WEIGHT)):
        assert found[0] == 0.0
        return
    assert_agrees(found, exact, torch.float32)


def test_means_are_torchs():
    """Weighted, too: the same divisor for each kind, whichever path serves the call."""
    x, t = inputs_of("mse", (16, 9))
    weight = torch.rand(16, 9)
    for backend in (None, "native", "reference"):
        close = torch.testing.assert_close
        options = {"weight": weight, "backend": backend}
        close(reconstruction_loss(x, t, "mse", **options), F.mse_loss(x, t, weight=weight))
        close(reconstruction_loss(x, t, "l1", **options), F.l1_loss(x, t, weight=weight))
        huber = F.huber_loss(x, t, delta=0.5, weight=weight)
        close(reconstruction_loss(x, t, "huber", delta=0.5, **options), huber)
        wanted = F.binary_cross_entropy_with_logits(x, t, weight)
        close(reconstruction_loss(x, t, "bce_with_logits", **options), wanted)
        for kind, plain in (("mse", F.mse_loss), ("l1", F.l1_loss),
                            ("bce_with_logits", F.binary_cross_entropy_with_logits)):  # fmt: skip
            for reduction in REDUCTIONS:
                found = reconstruction_loss(x, t, kind, reduction, backend=backend)
                close(found, plain(x, t, reduction=reduction))


def test_float64_is_the_references(backend):
    x, t = inputs_of("mse", (4, 5))
    loss, grad = value_and_grad(x.double(), t, "mse")
    assert loss.dtype is grad.dtype is torch.float64
    exact = exact_of(x, t, "mse")
    assert_near(loss, exact[0], torch.float64)
    assert_near(grad, exact[1], torch.float64)
    mixed = ssl_fast.reconstruction_loss(x, t.double(), backend="reference")
    assert mixed.dtype is torch.float64
