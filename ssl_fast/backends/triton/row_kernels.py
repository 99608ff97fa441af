# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""Triton kernels that walk over rows: dot products, and the last step of a gradient."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["shift"])
def row_dot_kernel(
    left,  # [N, D]
    right,  # [N, D]
    dots,  # [N] fp32
    n_rows,
    depth,
    left_stride,
    right_stride,
    shift,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """dots_i = <left_i, right_{(i + shift) mod N}>, in fp32."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    safe_rows = tl.minimum(rows, n_rows - 1).to(tl.int64)
    left_rows = left + safe_rows * left_stride
    right_rows = right + ((safe_rows + shift) % n_rows) * right_stride
    steps = tl.arange(0, BLOCK_DEPTH)
    total = tl.zeros([BLOCK_ROWS, BLOCK_DEPTH], dtype=tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        offsets = (start + steps)[None, :]
        inside = offsets < depth
        a = tl.load(left_rows[:, None] + offsets, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(right_rows[:, None] + offsets, mask=inside, other=0.0).to(tl.float32)
        total += a * b
    tl.store(dots + rows, tl.sum(total, 1), mask=rows < n_rows)


@triton.jit
def _finish_chunk(
    product_rows,
    other_rows,
    restore,
    coefficient,
    paired,
    offsets,
    inside,
    HAS_PRODUCT: tl.constexpr,
    HAS_RESTORE: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    total = tl.zeros([BLOCK_ROWS, BLOCK_DEPTH], dtype=tl.float32)
    if HAS_PRODUCT:
        product = tl.load(product_rows[:, None] + offsets, mask=inside, other=0.0)
        if HAS_RESTORE:
            product *= restore[:, None]
        total += product
    if HAS_OTHER:
        other = tl.load(other_rows[:, None] + offsets, mask=inside & paired[:, None], other=0.0)
        total += coefficient[:, None] * other.to(tl.float32)
    return total


@triton.jit(do_not_specialize=["shift"])
def finish_rows_kernel(
    product,  # [N, D] fp32, read with HAS_PRODUCT
    restore,  # [N] fp32, read with HAS_RESTORE; 1 without
    other,  # [P, D], read with HAS_OTHER
    coefficient,  # [N] fp32, read with HAS_OTHER where a row has a partner
    features,  # [N, D]
    inverse,  # [N] fp32, read with PROJECT
    scale,  # [] fp32
    gradient,  # [N, D], the features' dtype
    dots,  # [N] fp32
    n_rows,
    n_others,
    depth,
    other_stride,
    features_stride,
    shift,
    HAS_PRODUCT: tl.constexpr,
    HAS_RESTORE: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    WRAP: tl.constexpr,
    PROJECT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """From the products of the weights to a gradient, in fp32 up to the one rounding at the end.

    t_i = restore_i product_i + coefficient_i other_{i + shift}, the last term only where that row
    exists (with WRAP, P being N, i + shift is taken modulo N),
    dots_i = <features_i, t_i>, gradient_i = scale (t_i - inverse_i² dots_i features_i): the last
    term, there with PROJECT, is the derivative of the normalisation. The positive enters here,
    after the weights were rounded, or a small loss would lose its gradient.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    safe_rows = tl.minimum(rows, n_rows - 1).to(tl.int64)
    partners = safe_rows + shift
    if WRAP:
        partners %= n_others
    paired = (partners >= 0) & (partners < n_others)
    feature_rows = features + safe_rows * features_stride
    product_rows = product + safe_rows * depth
    other_rows = other + tl.maximum(tl.minimum(partners, n_others - 1), 0) * other_stride
    gradient_rows = gradient + safe_rows * depth
    row_restore = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    row_coefficient = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    if HAS_RESTORE:
        row_restore = tl.load(restore + safe_rows)
    if HAS_OTHER:
        row_coefficient = tl.load(coefficient + safe_rows, mask=paired, other=0.0)
    steps = tl.arange(0, BLOCK_DEPTH)

    dot = tl.zeros([BLOCK_ROWS, BLOCK_DEPTH], dtype=tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        offsets = (start + steps)[None, :]
        inside = offsets < depth
        total = _finish_chunk(
            product_rows, other_rows, row_restore, row_coefficient, paired, offsets, inside,
            HAS_PRODUCT, HAS_RESTORE, HAS_OTHER, BLOCK_ROWS, BLOCK_DEPTH,
        )  # fmt: skip
        feature = tl.load(feature_rows[:, None] + offsets, mask=inside, other=0.0)
        dot += total * feature.to(tl.float32)
    row_dots = tl.sum(dot, 1)
    tl.store(dots + rows, row_dots, mask=rows < n_rows)

    factor = tl.load(scale)
    if PROJECT:
        row_inverse = tl.load(inverse + safe_rows)
        along = row_inverse * row_inverse * row_dots
    for start in range(0, depth, BLOCK_DEPTH):
        offsets = (start + steps)[None, :]
        inside = offsets < depth
        total = _finish_chunk(
            product_rows, other_rows, row_restore, row_coefficient, paired, offsets, inside,
            HAS_PRODUCT, HAS_RESTORE, HAS_OTHER, BLOCK_ROWS, BLOCK_DEPTH,
        )  # fmt: skip
        if PROJECT:
            feature = tl.load(feature_rows[:, None] + offsets, mask=inside, other=0.0)
            total -= along[:, None] * feature.to(tl.float32)
        tl.store(
            gradient_rows[:, None] + offsets,
            (factor * total).to(gradient.dtype.element_ty),
            mask=inside & (rows < n_rows)[:, None],
        )
