# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""The Triton kernels of mae: a program for each patch."""

import triton
import triton.language as tl


@triton.jit
def _offsets(
    elements, channels, patch_columns, column_stride, channel_stride, row_stride,
    IMAGES: tl.constexpr,
):  # fmt: skip
    """Where the elements of a patch are, from its first: (row, column, channel) of images."""
    if IMAGES:
        pixel = elements // channels
        return (
            (elements % channels).to(tl.int64) * channel_stride
            + (pixel // patch_columns).to(tl.int64) * row_stride
            + (pixel % patch_columns).to(tl.int64) * column_stride
        )
    return elements.to(tl.int64)


@triton.jit
def _corner(
    row, n_patches, batch_stride, row_stride, column_stride, patch_rows, patch_columns,
    grid_columns, IMAGES: tl.constexpr,
):  # fmt: skip
    """The first element of a patch; without images row_stride lies between patches."""
    batch = row // n_patches
    patch = row % n_patches
    if IMAGES:
        return (
            batch * batch_stride
            + (patch // grid_columns) * patch_rows * row_stride
            + (patch % grid_columns) * patch_columns * column_stride
        )
    return batch * batch_stride + patch * row_stride


@triton.jit
def _moments(
    corner, depth, degrees, channels, patch_columns, column_stride, channel_stride, row_stride,
    IMAGES: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A patch's mean and 1 / sqrt(unbiased variance + 1e-6); 0 and 1 without normalisation."""
    mean = 0.0
    inverse = 1.0
    if NORMALIZE:
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, depth, BLOCK):
            elements = start + tl.arange(0, BLOCK)
            offsets = _offsets(
                elements, channels, patch_columns, column_stride, channel_stride, row_stride, IMAGES
            )
            total += tl.load(corner + offsets, mask=elements < depth, other=0.0).to(tl.float32)
        mean = tl.sum(total, 0) / (degrees + 1.0)
        squares = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, depth, BLOCK):
            elements = start + tl.arange(0, BLOCK)
            offsets = _offsets(
                elements, channels, patch_columns, column_stride, channel_stride, row_stride, IMAGES
            )
            value = tl.load(corner + offsets, mask=elements < depth, other=0.0).to(tl.float32)
            away = tl.where(elements < depth, value - mean, 0.0)
            squares += away * away
        # one element has no unbiased variance: 0 / 0, as in torch
        inverse = 1.0 / tl.sqrt(tl.sum(squares, 0) / degrees + 1e-6)
    return mean, inverse


@triton.jit
def loss_kernel(
    pred,  # [B, L, P]
    target,  # [B, L, P], or [B, C, H, W] with IMAGES
    weights,  # [B L] fp32, a patch with 0 is not read
    losses,  # [B L] fp32: weight * mean of squares
    n_patches,
    depth,
    degrees,  # depth - 1 as fp32
    pred_batch_stride,
    pred_row_stride,
    batch_stride,
    row_stride,
    column_stride,
    channel_stride,
    channels,
    patch_rows,
    patch_columns,
    grid_columns,
    IMAGES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of each patch."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    loss = weight * 0.0
    if weight != 0.0:
        corner = target + _corner(
            row, n_patches, batch_stride, row_stride, column_stride, patch_rows, patch_columns,
            grid_columns, IMAGES,
        )  # fmt: skip
        pred_row = (
            pred + (row // n_patches) * pred_batch_stride + (row % n_patches) * pred_row_stride
        )
        mean, inverse = _moments(
            corner, depth, degrees, channels, patch_columns, column_stride, channel_stride,
            row_stride, IMAGES, NORMALIZE, BLOCK,
        )  # fmt: skip
        squares = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, depth, BLOCK):
            elements = start + tl.arange(0, BLOCK)
            inside = elements < depth
            offsets = _offsets(
                elements, channels, patch_columns, column_stride, channel_stride, row_stride, IMAGES
            )
            value = tl.load(corner + offsets, mask=inside, other=0.0).to(tl.float32)
            guess = tl.load(pred_row + elements, mask=inside, other=0.0).to(tl.float32)
            away = tl.where(inside, guess - (value - mean) * inverse, 0.0)
            squares += away * away
        loss = weight * tl.sum(squares, 0) / (degrees + 1.0)
    tl.store(losses + row, loss)


@triton.jit
def gradient_kernel(
    pred,  # [B, L, P]
    target,  # [B, L, P], or [B, C, H, W] with IMAGES
    weights,  # [B L] fp32
    factor,  # [] fp32: of the gradient of a patch's mean of squares
    gradient,  # [B, L, P]
    n_patches,
    depth,
    degrees,
    pred_batch_stride,
    pred_row_stride,
    batch_stride,
    row_stride,
    column_stride,
    channel_stride,
    channels,
    patch_rows,
    patch_columns,
    grid_columns,
    IMAGES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of each patch; zeros where the weight is 0."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    out = gradient + row * depth
    if weight == 0.0:
        for start in range(0, depth, BLOCK):
            elements = start + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], dtype=gradient.dtype.element_ty)
            tl.store(out + elements, zeros, mask=elements < depth)
    else:
        corner = target + _corner(
            row, n_patches, batch_stride, row_stride, column_stride, patch_rows, patch_columns,
            grid_columns, IMAGES,
        )  # fmt: skip
        pred_row = (
            pred + (row // n_patches) * pred_batch_stride + (row % n_patches) * pred_row_stride
        )
        mean, inverse = _moments(
            corner, depth, degrees, channels, patch_columns, column_stride, channel_stride,
            row_stride, IMAGES, NORMALIZE, BLOCK,
        )  # fmt: skip
        scale = tl.load(factor) * weight * 2.0 / (degrees + 1.0)
        for start in range(0, depth, BLOCK):
            elements = start + tl.arange(0, BLOCK)
            inside = elements < depth
            offsets = _offsets(
                elements, channels, patch_columns, column_stride, channel_stride, row_stride, IMAGES
            )
            value = tl.load(corner + offsets, mask=inside, other=0.0).to(tl.float32)
            guess = tl.load(pred_row + elements, mask=inside, other=0.0).to(tl.float32)
            grad = scale * (guess - (value - mean) * inverse)
            tl.store(out + elements, grad.to(gradient.dtype.element_ty), mask=inside)
