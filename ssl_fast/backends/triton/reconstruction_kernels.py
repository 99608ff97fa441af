# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""The Triton kernel of reconstruction: a block of elements a program."""

import triton
import triton.language as tl

from ssl_fast.backends.triton.pointwise_kernels import terms


@triton.jit
def reconstruction_kernel(
    input,  # [N]
    target,  # [N]
    weight,  # [N] fp32, read with HAS_WEIGHT
    mask,  # [N / mask_span] int8, read with HAS_MASK
    pos_weight,  # [period] fp32, read with POSITIVE
    sums,  # [programs] fp32, written with REDUCE
    losses,  # [N] fp32, written without
    grad,  # [N] in the input's dtype, written with HAS_GRAD; it may be the input
    size,
    mask_span,
    period,
    parameter,
    target_scale,
    target_shift,
    grad_factor,
    KIND: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    POSITIVE: tl.constexpr,
    REDUCE: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weighted losses of a block, or their sum, and grad_factor times the derivatives."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    x = tl.load(input + places, mask=inside, other=0.5).to(tl.float32)
    t = tl.load(target + places, mask=inside, other=0).to(tl.float32)
    t = t * target_scale + target_shift
    positive = x
    if POSITIVE:
        positive = tl.load(pos_weight + places % period, mask=inside, other=1.0)
    loss, slope = terms(x, t, positive, parameter, KIND, POSITIVE)
    if HAS_WEIGHT:
        factor = tl.load(weight + places, mask=inside, other=0.0)
        loss *= factor
        slope *= factor
    keep = inside
    if HAS_MASK:
        keep = inside & (tl.load(mask + places // mask_span, mask=inside, other=0) != 0)
    loss = tl.where(keep, loss, 0.0)
    if REDUCE:
        tl.store(sums + tl.program_id(0), tl.sum(loss, 0))
    else:
        tl.store(losses + places, loss, mask=inside)
    if HAS_GRAD:
        slope = tl.where(keep, slope, 0.0) * grad_factor
        tl.store(grad + places, slope.to(grad.dtype.element_ty), mask=inside)
