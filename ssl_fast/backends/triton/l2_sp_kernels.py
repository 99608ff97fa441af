# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (a kernel's body is Triton's language, whose values have no Python types)
"""The Triton kernel of l2_sp: a block of one of many tensors a program, found in a table."""

import triton
import triton.language as tl


@triton.jit
def distance_kernel(
    table,  # [4, T] int64: sizes, and the addresses of parameters, anchors and gradients (0: none)
    tensors,  # [programs] int64: whose block
    blocks,  # [programs] int64: which of its blocks
    step,  # [] fp32: a factor of the gradients
    sums,  # [programs] fp32: the squared distance
    like,  # a tensor of the dtype of all
    n_tensors,
    HAS_GRAD: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """|parameter - anchor|^2 of a block, and step * (parameter - anchor) into its gradient."""
    program = tl.program_id(0)
    tensor = tl.load(tensors + program)
    places = tl.load(blocks + program) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(table + tensor)
    inside = places < size
    kind = tl.pointer_type(like.dtype.element_ty)
    parameter = tl.load(table + n_tensors + tensor).to(kind)
    anchor = tl.load(table + 2 * n_tensors + tensor).to(kind)
    x = tl.load(parameter + places, mask=inside, other=0.0).to(tl.float32)
    away = x - tl.load(anchor + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + program, tl.sum(away * away, 0))
    if HAS_GRAD:
        address = tl.load(table + 3 * n_tensors + tensor)
        gradient = address.to(kind)
        wanted = places < tl.where(address != 0, size, 0)
        grad = tl.load(step) * away
        if ADD:
            grad += tl.load(gradient + places, mask=wanted, other=0.0).to(tl.float32)
        tl.store(gradient + places, grad.to(like.dtype.element_ty), mask=wanted)
