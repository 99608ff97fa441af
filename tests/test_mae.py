"""MAE's loss: every backend against the authors' formula in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import thread_counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_near

import ssl_fast
from ssl_fast.backends.reference import mae as reference
from ssl_fast.backends.reference import pairs

# (B, L, P)
SHAPES = [
    (0, 4, 3), (3, 0, 4), (1, 1, 2), (2, 5, 3), (1, 7, 16), (3, 11, 33), (2, 49, 48), (5, 9, 130),
    (2, 3, 768), (1, 2, 5000), (1, 3, 9001),
]  # fmt: skip
# (B, C, H, W, patch rows, patch columns)
IMAGES = [
    (1, 1, 2, 2, 2, 2), (2, 3, 8, 12, 4, 4), (3, 3, 6, 10, 2, 5), (2, 2, 9, 6, 3, 3),
    (1, 3, 32, 48, 16, 16), (2, 5, 4, 6, 4, 2), (2, 1, 6, 4, 1, 4),
]  # fmt: skip
MASKED = [0.0, 0.75, 1.0]


def patchify(images, rows, columns):
    """MAE's, for patches that needn't be square."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // rows, rows, width // columns, columns)
    x = torch.einsum("nchpwq->nhwpqc", x)
    return x.reshape(batch, -1, rows * columns * channels)


def plain_mae(pred, target, mask, norm_pix_loss=True):
    if norm_pix_loss:
        mean = target.mean(dim=-1, keepdim=True)
        var = target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1.0e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def inputs_of(shape, dtype=torch.float32, masked=0.75):
    """pred, target and mask; what isn't masked holds NaN."""
    generator = torch.Generator().manual_seed(sum(shape))
    pred = torch.randn(shape, generator=generator).to(dtype)
    target = (torch.rand(shape, generator=generator) * 2 + 3).to(dtype)
    mask = (torch.rand(shape[:2], generator=generator) < masked).float()
    pred[mask == 0] = torch.nan
    target[mask == 0] = torch.nan
    return pred, target, mask


def exact_of(pred, target, mask, norm_pix_loss=True):
    """Value and gradient of pred in float64; 0 where nothing is masked."""
    if not mask.any():
        return torch.zeros(()).double(), torch.zeros(pred.shape).double()
    wide = [x.double().nan_to_num(0.0) for x in (pred, target)]
    wide[0].requires_grad_()
    value = plain_mae(*wide, mask.double(), norm_pix_loss)
    return value.detach(), torch.autograd.grad(value, wide[0])[0]


def value_and_grad(pred, target, mask, factor=1.0, **options):
    pred = pred.detach().requires_grad_()
    loss = ssl_fast.mae_loss(pred, target, mask, **options)
    (factor * loss).backward()
    return loss.detach(), pred.grad


def assert_agrees(found, exact, dtype):
    loss, grad = found
    assert loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert grad.dtype is dtype
    assert_near(loss, exact[0], torch.float32)
    assert_near(grad, exact[1], dtype)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, masked, norm_pix_loss, dtype):
    inputs = inputs_of(shape, dtype, masked)
    options = {"norm_pix_loss": norm_pix_loss, "backend": backend}
    loss, grad = found = value_and_grad(*inputs, **options)
    assert_agrees(found, exact_of(*inputs, norm_pix_loss), dtype)
    assert torch.all(grad[inputs[2] == 0] == 0.0)
    assert torch.equal(value_and_grad(*inputs[:2], inputs[2].bool(), **options)[0], loss)


@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_images(backend, shape, dtype, target_dtype):
    """Of a dtype and in a layout of their own, without a copy of the patches."""
    batch, channels, height, width, *patch = shape
    images = torch.rand(batch, channels, height, width).to(target_dtype)
    target = patchify(images, *patch)
    pred = torch.randn(target.shape).to(dtype)
    mask = (torch.rand(target.shape[:2]) < 0.6).float()
    mask[0, 0] = 1.0
    exact = exact_of(pred, target, mask)
    spread = torch.full((batch, channels, 2 * height, 2 * width), torch.nan).to(target_dtype)
    spread[:, :, ::2, ::2] = images
    layouts = [
        images,
        images.to(memory_format=torch.channels_last),
        images.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
        spread[:, :, ::2, ::2],
    ]
    for layout in layouts:
        found = value_and_grad(pred, layout, mask, patch_size=tuple(patch), backend=backend)
        assert_agrees(found, exact, dtype)
    one = images[:1].expand(3, -1, -1, -1)
    several = pred[:1].expand(3, -1, -1), one, mask[:1].expand(3, -1)
    found = value_and_grad(*several, patch_size=tuple(patch), backend=backend)
    exact = exact_of(pred[:1].repeat(3, 1, 1), target[:1].repeat(3, 1, 1), mask[:1].repeat(3, 1))
    assert_near(found[0], exact[0], torch.float32)


def test_layouts(backend, dtype):
    """A class token before the patches, columns apart, one row for all; neighbours are NaN."""
    pred, target, mask = inputs_of((3, 10, 19), dtype)
    exact = exact_of(pred, target, mask)
    for place in (0, 1):
        cut = [x.new_full((3, 11, 19), torch.nan) for x in (pred, target)]
        for wide, x in zip(cut, (pred, target), strict=True):
            wide[:, 1:] = x
        inputs = [pred, target]
        inputs[place] = cut[place][:, 1:]
        assert_agrees(value_and_grad(*inputs, mask, backend=backend), exact, dtype)
        apart = torch.full((3, 10, 38), torch.nan).to(dtype)
        apart[..., ::2] = (pred, target)[place]
        inputs[place] = apart[..., ::2]
        assert_agrees(value_and_grad(*inputs, mask, backend=backend), exact, dtype)
    turned = mask.T.contiguous().T
    assert_agrees(value_and_grad(pred, target, turned, backend=backend), exact, dtype)
    row = pred[:1, :1].nan_to_num(0.5).expand(3, 10, 19)
    found = value_and_grad(row, target, mask, backend=backend)
    assert_agrees(found, exact_of(row, target, mask), dtype)


def test_patch_far_from_zero(backend):
    """The variance of 1e-2 beside a mean of 1000, and a patch with one far element in front."""
    target = 1000.0 + 0.1 * torch.rand(2, 3, 768)
    target[0, 1, 0] = 1e6
    pred, mask = torch.randn(2, 3, 768), torch.ones(2, 3)
    exact = exact_of(pred, target, mask)
    found = value_and_grad(pred, target, mask, backend=backend)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-3, atol=0.0)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=2e-2, atol=1e-5)


def test_constant_patches(backend):
    """No variance: eps alone divides."""
    pred, mask = torch.randn(2, 3, 50), torch.ones(2, 3)
    target = torch.arange(6.0).reshape(2, 3, 1).expand(2, 3, 50)
    assert_agrees(
        value_and_grad(pred, target, mask, backend=backend),
        exact_of(pred, target, mask),
        torch.float32,
    )


def test_losses_near_zero_keep_their_digits(backend):
    target = torch.rand(4, 9, 64)
    pred = (target.double() + 1e-4 * torch.randn(4, 9, 64)).float()
    mask = torch.ones(4, 9)
    loss, _ = value_and_grad(pred, target, mask, norm_pix_loss=False, backend=backend)
    exact, _ = exact_of(pred, target, mask, False)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0.0)


def test_counts_of_halves(backend):
    """A bf16 mask sums to what fp32 counts: 3000 is no bf16 number."""
    pred, target = torch.ones(1, 3000, 2).bfloat16(), torch.zeros(1, 3000, 2).bfloat16()
    mask = torch.ones(1, 3000).bfloat16()
    loss, grad = value_and_grad(pred, target, mask, norm_pix_loss=False, backend=backend)
    assert loss == 1.0
    torch.testing.assert_close(grad.float(), torch.full((1, 3000, 2), 1 / 3000).bfloat16().float())


def test_weights_of_patches(backend):
    pred, target, _ = inputs_of((2, 9, 33), masked=1.0)
    mask = torch.rand(2, 9)
    assert_agrees(
        value_and_grad(pred, target, mask, backend=backend),
        exact_of(pred, target, mask),
        torch.float32,
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_not_finite_values_propagate(backend, value, place):
    inputs = list(inputs_of((2, 9, 40), masked=1.0))
    inputs[place][1, 3, 17] = value
    for norm_pix_loss in (True, False):
        loss, grad = value_and_grad(*inputs, norm_pix_loss=norm_pix_loss, backend=backend)
        wide = inputs[0].clone().requires_grad_()
        expected = plain_mae(wide, *inputs[1:], norm_pix_loss)
        torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
        (expected,) = torch.autograd.grad(expected, wide)
        assert torch.equal(grad.isfinite(), expected.isfinite())


def test_one_element_has_no_variance(backend):
    """NaN where it counts, as torch's var; a patch that isn't masked stays out of it."""
    pred, target = torch.randn(1, 3, 1), torch.randn(1, 3, 1)
    loss, grad = value_and_grad(pred, target, torch.tensor([[0.0, 1.0, 0.0]]), backend=backend)
    assert loss.isnan()
    assert torch.equal(grad.isnan().flatten(), torch.tensor([False, True, False]))
    mask = torch.ones(1, 3)
    options = {"norm_pix_loss": False, "backend": backend}
    found = value_and_grad(pred, target, mask, **options)
    assert_agrees(found, exact_of(pred, target, mask, False), torch.float32)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_is_written(backend, shape, dtype):
    for masked in MASKED:
        for result in value_and_grad(*inputs_of(shape, dtype, masked), backend=backend):
            assert not result.isnan().any()


def test_bits_do_not_depend_on_threads_or_repetition(backend, dtype):
    inputs = inputs_of((7, 90, 130), dtype)
    results = []
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        results.append(value_and_grad(*inputs, backend=backend))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_gradients_larger_than_the_cache(backend, dtype):
    """Stores that go past the caches, to rows that begin anywhere."""
    for depth in (1024, 1021):
        pred, target, mask = inputs_of((1, (40 << 20) // (depth * dtype.itemsize), depth), dtype)
        mask[0, 3:] = 0.0
        mask[0, [0, 1, 5, 900, -1]] = 1.0
        pred, target = pred.nan_to_num(0.5), target.nan_to_num(0.25)
        target[0, 900, 3] = 1.0
        found = value_and_grad(pred, target, mask, backend=backend)
        kept = mask[0] != 0.0
        exact = exact_of(pred[:, kept], target[:, kept], mask[:, kept])
        assert_near(found[0], exact[0], torch.float32)
        assert_near(found[1][:, kept], exact[1], dtype)
        assert not found[1][:, ~kept].any()


def test_reference_does_not_depend_on_its_chunks(monkeypatch):
    inputs = [x.double() for x in inputs_of((5, 7, 12))]
    whole = reference.mae(*inputs, (), True)
    one = torch.ones(()).double()
    grads = reference.mae_backward(*inputs, whole[1], one, (), True, True, True)
    monkeypatch.setattr(pairs, "CHUNK_BYTES", 2 * 7 * 12 * 8)
    torch.testing.assert_close(reference.mae(*inputs, (), True), whole)
    again = reference.mae_backward(*inputs, whole[1], one, (), True, True, True)
    torch.testing.assert_close(again, grads)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(0, 30), st.integers(2, 200)),
    masked=st.floats(0.0, 1.0),
    norm_pix_loss=st.booleans(),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_mae(backend, shape, masked, norm_pix_loss, kind):
    inputs = inputs_of(shape, kind, masked)
    options = {"norm_pix_loss": norm_pix_loss, "backend": backend}
    assert_agrees(value_and_grad(*inputs, **options), exact_of(*inputs, norm_pix_loss), kind)
